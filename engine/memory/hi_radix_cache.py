"""The hierarchical cache: what the device has no room for stays in host memory, and comes back.

With `write_through`, pages are copied to the host in the pass after they entered the tree, so that
an eviction finds them there and costs nothing. With `write_back`, only what is next to be evicted
is copied, as soon as few pages are free: an eviction waits for a copy only if it comes before that
has ended. Either way a page that is evicted is saved first where host memory has room for it, by
giving up older pages there.

A hit in host memory is loaded back all or nothing (scheduling.md section 3). The pages are nobody's
until they have arrived and been compared with what had left; then they are in the tree as if they
had never gone, and whoever waited matches again. A spoilt page is thrown away with all behind it,
and what it held is computed again.

Copies never run under anybody's feet. Pages that are being saved stay in the tree (eviction waits
for the copy), pages being loaded are not yet in it, and host pages being read are not evicted.
"""

from collections.abc import Iterator, Sequence

from engine.memory.chain_hash import namespace_hash, page_chain_hashes
from engine.memory.host_backed_tree import HostBackedTree
from engine.memory.host_pool import HostPool
from engine.memory.page_allocator import PageAllocator
from engine.memory.page_transfer import Direction, PageTransfer
from engine.memory.prefix_cache import LoadBack, TreeNode
from engine.memory.req_to_token import ReqToTokenPool
from engine.types import HostWritePolicy, RadixEvictionPolicy

EVICTED_AT_LEAST = 8
"""Pages that leave a leaf together, where it has that many: each departure cuts a node in two, and
a prefix in single pages would be slow to match. They are not lost, so a few more do no harm."""

CLEAN_SHARE = 16
"""Under `write_back`, one page in so many of the pool is free, or saved and evictable at once, as
far as copies keep up."""

WRITTEN_AT_MOST = 256
"""Pages that a pass begins to copy: queueing a copy takes microseconds of the scheduler's time."""


class HiRadixCache(HostBackedTree):
    """The tree with its two residences, and the copies between them."""

    def __init__(
        self,
        allocator: PageAllocator,
        req_to_token: ReqToTokenPool,
        host: HostPool,
        *,
        write_policy: HostWritePolicy = "write_through",
        eviction_policy: RadixEvictionPolicy = "lru",
    ) -> None:
        super().__init__(allocator, req_to_token, host, eviction_policy=eviction_policy)
        self.write_policy = write_policy
        self._transfers: list[PageTransfer] = []
        self._to_write: list[TreeNode] = []
        """Nodes that are to be copied; looked at again when their turn comes."""
        self._looked_at = (-1, 0)
        """The tree's version and the pages missing when `_write_ahead` last looked."""

    # ---- polled

    def check_hicache_events(self) -> None:
        for transfer in [t for t in self._transfers if t.copy.done()]:
            self._finish(transfer)
        if self.write_policy == "write_through":
            self._write_through()
        else:
            self._write_ahead()

    def has_pending_copies(self) -> bool:
        return bool(self._transfers or self._to_write)

    def pages_under_copy(self) -> Iterator[Sequence[int]]:
        for transfer in self._transfers:
            yield transfer.device_pages

    def _host_pages_on_their_way(self) -> list[int]:
        return [
            page
            for transfer in self._transfers
            if transfer.direction is Direction.OUT
            for page in transfer.host_pages
        ]

    def _start(self, transfer: PageTransfer) -> bool:
        """Starts a copy. Returns whether it has ended already."""
        for node in transfer.nodes:
            node.transfer = transfer
        copier = self.host.copier
        if transfer.direction is Direction.OUT:
            transfer.copy = copier.to_host(transfer.device_pages, transfer.host_pages)
        else:
            transfer.copy = copier.to_device(transfer.host_pages, transfer.device_pages)
        self._transfers.append(transfer)
        if not transfer.copy.done():
            return False
        self._finish(transfer)
        return True

    def _finish(self, transfer: PageTransfer) -> None:
        """Waits for the copy if it has not ended yet."""
        transfer.copy.wait()
        self._transfers.remove(transfer)
        for node in transfer.nodes:
            node.transfer = None
        self.host.measure(transfer.copy, len(transfer.device_pages))
        if transfer.direction is Direction.OUT:
            self._finish_write(transfer)
        else:
            self._finish_load(transfer)

    # ---- to the host

    def _put_on_device(self, node: TreeNode, pages: list[int]) -> None:
        super()._put_on_device(node, pages)
        self._write_later(node)

    def _split(self, node: TreeNode, num_pages: int) -> TreeNode:
        upper = super()._split(node, num_pages)
        self._write_later(upper)
        return upper

    def _write_later(self, node: TreeNode) -> None:
        if self.write_policy == "write_through" and self._can_write(node):
            self._to_write.append(node)

    def _can_write(self, node: TreeNode) -> bool:
        return bool(node.pages) and not node.host_pages and node.transfer is None

    def _write_through(self) -> None:
        nodes: list[TreeNode] = []
        host_pages: list[int] = []
        queue, self._to_write = self._to_write, []
        for i, node in enumerate(queue):
            if len(host_pages) >= WRITTEN_AT_MOST:
                self._to_write.extend(queue[i:])
                break
            if node in nodes or not self._can_write(node):
                continue
            room, wanted = WRITTEN_AT_MOST - len(host_pages), len(node.pages)
            found = self._host_room(node, min(room, wanted))
            if found is None:
                continue
            nodes.append(found[0])
            host_pages.extend(found[1])
            if len(found[1]) == room < wanted:
                self._to_write.append(node)  # its lower part, which was cut off
        if nodes:
            self._write(nodes, host_pages)

    def _write_ahead(self) -> None:
        """Saves what goes next, before anybody waits for its room."""
        missing = -(-self.allocator.num_pages // CLEAN_SHARE) - self.allocator.free_pages
        looked_at = (self.version, missing)
        if missing <= 0 or self._transfers or looked_at == self._looked_at:
            return
        self._looked_at = looked_at
        nodes: list[TreeNode] = []
        host_pages: list[int] = []
        for node in self._next_to_leave(min(missing, WRITTEN_AT_MOST)):
            if missing <= 0 or len(host_pages) >= WRITTEN_AT_MOST:
                break
            if not self._can_write(node):
                missing -= len(node.pages)  # saved already
                continue
            if len(node.pages) > missing:
                self._split(node, len(node.pages) - missing)
            missing -= len(node.pages)
            found = self._host_room(node, min(len(node.pages), WRITTEN_AT_MOST - len(host_pages)))
            if found is not None:
                nodes.append(found[0])
                host_pages.extend(found[1])
        if nodes:
            self._write(nodes, host_pages)

    def _next_to_leave(self, count: int) -> Iterator[TreeNode]:
        """Leaves of what is on the device, and what will be one once they have gone."""
        for leaf in self._next_leaves(count):
            node: TreeNode | None = leaf
            while node is not None and node.parent is not None and node.lock_ref == 0:
                above = node.parent if node.parent.resident_children == 1 else None
                yield node
                node = above

    def _host_room(self, node: TreeNode, wanted: int) -> tuple[TreeNode, list[int]] | None:
        """Host pages for the first `wanted` pages of a node, or for as many as there are: with the
        part of the node that they are for, the upper one if it had to be cut. None where there is
        no room at all."""
        pages = self.host.alloc(self._make_host_room(wanted))
        if not pages:
            return None
        part = node if len(pages) == len(node.pages) else self._split(node, len(pages))
        return part, pages

    def _write(self, nodes: list[TreeNode], host_pages: list[int]) -> bool:
        return self._start(
            PageTransfer(
                direction=Direction.OUT,
                nodes=nodes,
                host_pages=host_pages,
                device_pages=[page for node in nodes for page in node.pages],
            )
        )

    def _finish_write(self, transfer: PageTransfer) -> None:
        digests = transfer.copy.digests()
        start = 0
        for node in transfer.nodes:
            end = start + len(node.pages)
            host_pages = transfer.host_pages[start:end]
            if self._as_sealed(node.pages, digests[start:end]):
                self.host.filled(host_pages, digests[start:end])
                self._put_on_host(node, host_pages)
            else:
                self.host.counters.spoilt += len(host_pages)
                self.host.free(host_pages)
            start = end

    def _as_sealed(self, pages: list[int], digests: list[bytes]) -> bool:
        """Whether pages that were sealed when they were computed still hold that."""
        if self.seals is None:
            return True
        seals = map(self.seals.digest_of, pages)
        return all(seal in (None, digest) for seal, digest in zip(seals, digests, strict=True))

    # ---- off the device

    def evict(self, num_tokens: int) -> int:
        wanted = -(-num_tokens // self.page_size)
        freed = 0
        while freed < wanted and (leaf := self._pop_leaf()) is not None:
            pages = self._evict_tail(leaf, max(wanted - freed, EVICTED_AT_LEAST))
            self.allocator.free(pages)
            freed += len(pages)
        return freed * self.page_size

    def _evict_tail(self, leaf: TreeNode, num_pages: int) -> list[int]:
        """The last pages of a leaf leave the device, for the host as far as there is room."""
        if leaf.transfer is not None and leaf.transfer.direction is Direction.OUT:
            self._finish(leaf.transfer)
        if num_pages < len(leaf.pages):
            self._split(leaf, len(leaf.pages) - num_pages)
        leaving = [leaf]
        if not leaf.host_pages:
            found = self._host_room(leaf, len(leaf.pages))
            if found is not None:
                saved, host_pages = found
                if not self._write([saved], host_pages):
                    self._finish(self._transfers[-1])
                if saved is not leaf:
                    leaving.append(saved)
        return [page for node in leaving for page in self._leave_device(node)]

    # ---- back from the host

    def load_back(self, last_host_node: TreeNode) -> LoadBack:
        path: list[TreeNode] = []
        anchor = last_host_node
        while anchor.parent is not None and not anchor.pages:
            path.insert(0, anchor)
            anchor = anchor.parent
        if not path:
            return LoadBack.NOTHING
        if any(node.transfer is not None for node in path):
            return LoadBack.PENDING
        transfer = PageTransfer(
            direction=Direction.BACK,
            nodes=path,
            host_pages=[page for node in path for page in node.host_pages],
            anchor=anchor,
        )
        self.inc_lock_ref(anchor)
        for node in path:
            node.transfer = transfer  # making room must not take what is to be loaded
        pages = self._device_room(len(transfer.host_pages), anchor)
        if pages is None:
            for node in transfer.nodes:
                node.transfer = None
                self._offer_host(node)
            self.dec_lock_ref(anchor)
            return LoadBack.NOTHING
        transfer.device_pages = pages
        return LoadBack.DONE if self._start(transfer) else LoadBack.PENDING

    def _device_room(self, num_pages: int, anchor: TreeNode) -> list[int] | None:
        missing = num_pages - self.allocator.free_pages
        if missing > self._evictable_pages:
            return None
        if missing > 0:
            self.evict(missing * self.page_size)
        return self.allocator.alloc(num_pages, after=anchor.pages[-1] if anchor.pages else None)

    def _finish_load(self, transfer: PageTransfer) -> None:
        digests = transfer.copy.digests()
        spare: list[int] = []
        start = 0
        for node in list(transfer.nodes):
            end = start + self._page_count(node)
            pages = transfer.device_pages[start:end]
            if node.parent is None:
                spare.extend(pages)  # went with a spoilt page above it
            else:
                whole = self.host.whole(transfer.host_pages[start:end], digests[start:end])
                spare.extend(self._take_loaded(node, pages, whole))
            start = end
        self.allocator.free(spare)
        if transfer.anchor is not None:
            self.dec_lock_ref(transfer.anchor)

    def _take_loaded(self, node: TreeNode, pages: list[int], whole: int) -> list[int]:
        """Gives a node the first `whole` of the pages that arrived for it; the rest of it is
        spoilt. Returns the pages it has no use for."""
        self.host.counters.spoilt += whole < len(pages)
        if node.pages:  # somebody computed it meanwhile
            if whole < len(pages):
                self._leave_host(node)
            self._offer_host(node)
            return pages
        taker = node
        if 0 < whole < len(pages):
            taker = self._split(node, whole)
        if whole < len(pages):
            self._leave_host(node)
        if whole > 0:
            self._put_on_device(taker, pages[:whole])
            self._reseal(taker)
            self._offer_host(taker)
            self.host.counters.loaded += whole
        return pages[whole:]

    def _reseal(self, node: TreeNode) -> None:
        """Pages that came back carry the seal of what was computed, under their new numbers."""
        if self.seals is None:
            return
        tokens: list[int] = []
        above = node
        while above.parent is not None:
            tokens = above.tokens + tokens
            above = above.parent
        chain = page_chain_hashes(tokens, self.page_size, previous=namespace_hash(above.namespace))
        links = chain[-len(node.pages) :]
        for page, host_page, link in zip(node.pages, node.host_pages, links, strict=True):
            self.seals.reseal(page, chain_hash=link, digest=self.host.digest(host_page))

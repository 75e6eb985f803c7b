"""The prefix tree whose nodes may be on the device, in host memory, or both.

What is on the device is a top of the tree: a node's parent is on the device if the node is. What
hangs below it is in host memory only. A node that is in neither is not in the tree. Host memory is
given back leaf by leaf, in the order of the eviction policy, the tail of a leaf first.

This file knows who is where; which copies run is `hi_radix_cache`'s.
"""

import heapq
from collections.abc import Sequence

from engine.memory.audit import MemoryInvariantError
from engine.memory.host_pool import HostPool
from engine.memory.page_allocator import PageAllocator
from engine.memory.page_transfer import Direction
from engine.memory.prefix_cache import PrefixMatch, TreeNode
from engine.memory.radix_cache import PrefixCacheError, RadixCache
from engine.memory.req_to_token import ReqToTokenPool
from engine.types import RadixEvictionPolicy


class HostBackedTree(RadixCache):
    """`RadixCache` with a second residence for its nodes."""

    def __init__(
        self,
        allocator: PageAllocator,
        req_to_token: ReqToTokenPool,
        host: HostPool,
        *,
        eviction_policy: RadixEvictionPolicy = "lru",
    ) -> None:
        super().__init__(allocator, req_to_token, eviction_policy=eviction_policy)
        self.host = host
        self._host_heap: list[tuple[tuple[int, int], int, TreeNode]] = []

    # ---- on the device

    def _is_leaf(self, node: TreeNode) -> bool:
        return bool(node.pages) and node.resident_children == 0

    def _revive(self, match: PrefixMatch, pages: Sequence[int]) -> TreeNode:
        """Nodes that are in host memory only take the pages that the caller has computed anew."""
        path: list[TreeNode] = []
        node = match.last_host_node or match.last_node
        while node is not match.last_node and node.parent is not None:
            path.append(node)
            node = node.parent
        start = len(match.pages)
        for node in reversed(path):
            end = start + self._page_count(node)
            self._put_on_device(node, list(pages[start:end]))
            start = end
        return node

    def _put_on_device(self, node: TreeNode, pages: list[int]) -> None:
        super()._put_on_device(node, pages)
        self._parent(node).resident_children += 1

    def _leave_device(self, node: TreeNode) -> list[int]:
        """Takes the pages of a leaf of what is on the device, which is in host memory or goes
        altogether. Returns them; they are the caller's to free."""
        parent, pages = self._parent(node), node.pages
        node.pages = []
        parent.resident_children -= 1
        self._evictable_pages -= len(pages)
        self.version += 1
        if node.host_pages:
            self._offer_host(node)
        else:
            self._remove_subtree(node)
        if parent.parent is not None:
            self._offer(parent)
        return pages

    def _split(self, node: TreeNode, num_pages: int) -> TreeNode:
        upper = super()._split(node, num_pages)
        upper.host_pages, node.host_pages = node.host_pages[:num_pages], node.host_pages[num_pages:]
        upper.resident_children = int(bool(node.pages))
        upper.hosted_children = int(bool(node.host_pages))
        upper.transfer = node.transfer
        if node.transfer is not None:
            node.transfer.on_split(upper=upper, lower=node)
        return upper

    # ---- in host memory

    def _put_on_host(self, node: TreeNode, host_pages: list[int]) -> None:
        node.host_pages = host_pages
        self._parent(node).hosted_children += 1
        self._offer_host(node)

    def _leave_host(self, node: TreeNode) -> None:
        """Gives a node's host pages back. One that is nowhere else goes, with all below it."""
        parent = self._parent(node)
        self.host.free(node.host_pages)
        node.host_pages = []
        parent.hosted_children -= 1
        if not node.pages:
            self._remove_subtree(node)
        self._offer_host(parent)

    def _make_host_room(self, num_pages: int) -> int:
        """Evicts from host memory until `num_pages` are free there, or nothing more may go.
        Returns how many of them there are."""
        while (missing := num_pages - self.host.free_pages) > 0:
            leaf = self._pop_host_leaf()
            if leaf is None:
                break
            if missing < len(leaf.host_pages):
                self._offer_host(self._split(leaf, len(leaf.host_pages) - missing))
            self._leave_host(leaf)
        return min(num_pages, self.host.free_pages)

    def _is_host_leaf(self, node: TreeNode) -> bool:
        return bool(node.host_pages) and node.hosted_children == 0 and node.transfer is None

    def _offer_host(self, node: TreeNode) -> None:
        if node.in_host_heap or not self._is_host_leaf(node):
            return
        node.in_host_heap = True
        self._entries += 1
        heapq.heappush(self._host_heap, (self._eviction_key(node), self._entries, node))

    def _pop_host_leaf(self) -> TreeNode | None:
        while self._host_heap:
            key, _, node = heapq.heappop(self._host_heap)
            node.in_host_heap = False
            if not self._is_host_leaf(node) or node.parent is None:
                continue  # offered again once it is a leaf that no copy reads
            if key == self._eviction_key(node):
                return node
            self._offer_host(node)
        return None

    # ---- the shape of the tree

    def _page_count(self, node: TreeNode) -> int:
        return len(node.tokens) // self.page_size

    def _parent(self, node: TreeNode) -> TreeNode:
        if node.parent is None:
            raise PrefixCacheError("a root has no pages, and what was removed has none either")
        return node.parent

    def _remove_subtree(self, node: TreeNode) -> None:
        """Takes `node`, which is not on the device, and all below it out of the tree."""
        self.version += 1
        parent = self._parent(node)
        del parent.children[tuple(node.tokens[: self.page_size])]
        if node.host_pages:
            parent.hosted_children -= 1
        stack = [node]
        while stack:
            gone = stack.pop()
            if gone.pages or gone.transfer is not None:
                raise PrefixCacheError("a prefix that is in use cannot be removed")
            self.host.free(gone.host_pages)
            gone.host_pages = []
            gone.parent = None
            stack.extend(gone.children.values())
        if parent.parent is not None:
            self._offer_host(parent)
        elif not parent.children:
            self._roots.pop(parent.namespace, None)

    # ---- counting

    def check_host(self) -> None:
        """Recounts host memory from its owners, and looks at who is where."""
        owners: list[int] = []
        for _, node in self._nodes():
            children = node.children.values()
            sound = (
                node.resident_children == sum(bool(child.pages) for child in children)
                and node.hosted_children == sum(bool(child.host_pages) for child in children)
                and all(len(held) in (0, self._page_count(node)) for held in _residences(node))
                and (
                    node.parent is None
                    or (bool(node.host_pages) if not node.pages else _is_resident(node.parent))
                )
            )
            if not sound:
                raise MemoryInvariantError(
                    f"the prefix tree contradicts itself at {node.tokens[:8]}\n"
                    f"{self.pretty_print()}"
                )
            owners.extend(node.host_pages)
        owners.extend(self._host_pages_on_their_way())
        free = self.host.allocator.free_list()
        if sorted(owners + free) != list(range(self.host.allocator.num_pages)):
            raise MemoryInvariantError(
                f"host pages do not balance: {len(owners)} owned, {len(set(owners))} of them "
                f"different, {len(free)} free, of {self.host.allocator.num_pages}"
            )

    def _host_pages_on_their_way(self) -> list[int]:
        """Host pages that a copy still fills, and no node has."""
        return []

    def _describe(self, node: TreeNode) -> str:
        copying = ""
        if node.transfer is not None:
            copying = " writing" if node.transfer.direction is Direction.OUT else " loading"
        return f"{super()._describe(node)} host={len(node.host_pages)}{copying}"

    def pretty_print(self, max_nodes: int = 100) -> str:
        counters, allocator = self.host.counters, self.host.allocator
        return (
            f"{super().pretty_print(max_nodes)}\n"
            f"host memory: {allocator.num_pages - allocator.free_pages} of {allocator.num_pages} "
            f"pages in use; {counters.written} written, {counters.loaded} loaded, "
            f"{counters.spoilt} spoilt"
        )


def _residences(node: TreeNode) -> tuple[list[int], list[int]]:
    return node.pages, node.host_pages


def _is_resident(node: TreeNode) -> bool:
    return node.parent is None or bool(node.pages)

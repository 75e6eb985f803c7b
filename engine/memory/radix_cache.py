"""A radix tree over whole pages of tokens: KV of past requests, found by prefix.

A page is the unit: shorter common prefixes are not shared, so no page is ever written by two
requests. Namespaces (`extra_key`: LoRA id, cache salt) have a tree each, so tenants never share.
"""

import heapq
from collections.abc import Iterator, Sequence

from engine.errors import EngineError
from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import (
    BasePrefixCache,
    CacheableRequest,
    InsertResult,
    PrefixMatch,
    TreeNode,
)
from engine.memory.req_to_token import ReqToTokenPool, page_slots
from engine.types import RadixEvictionPolicy


class PrefixCacheError(EngineError):
    """Locks or lengths that do not fit the tree: a caller's bookkeeping is broken."""


class RadixCache(BasePrefixCache):
    """The tree, its locks, and eviction of the least recently (or least frequently) used leaves."""

    disable = False

    def __init__(
        self,
        allocator: PageAllocator,
        req_to_token: ReqToTokenPool,
        *,
        eviction_policy: RadixEvictionPolicy = "lru",
    ) -> None:
        super().__init__(allocator, req_to_token)
        self._by_hits = eviction_policy == "lfu"
        self._roots: dict[str, TreeNode] = {}
        self._evictable_pages = 0
        self._protected_pages = 0
        self._clock = 0
        self._age = 0
        """Worth of what was evicted last under `lfu`. What is used from now on counts from here, so
        that uses of long ago weigh less and less: a prefix used n times outlives what came after it
        about n turnovers of the cache, not for ever."""
        # Candidates for eviction as (key, entry number, node). Entries may be stale: a
        # node is looked at again when it comes up, which keeps locking and matching O(depth).
        self._heap: list[tuple[tuple[int, int], int, TreeNode]] = []
        self._entries = 0

    # ---- lookup and insertion

    def match_prefix(self, token_ids: Sequence[int], extra_key: str = "") -> PrefixMatch:
        root = self._roots.get(extra_key)
        if root is None:
            root = TreeNode(parent=None, tokens=[], pages=[], namespace=extra_key)
        return self._walk(root, list(token_ids))

    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], extra_key: str = ""
    ) -> InsertResult:
        if len(token_ids) != len(pages) * self.page_size:
            raise PrefixCacheError(
                f"{len(pages)} pages of {self.page_size} cannot hold {len(token_ids)} tokens"
            )
        root = self._roots.get(extra_key)
        if root is None:
            root = TreeNode(parent=None, tokens=[], pages=[], namespace=extra_key)
            self._roots[extra_key] = root
        tokens = list(token_ids)
        match = self._walk(root, tokens)
        node = self._revive(match, pages)
        known = len(match.pages) + match.host_hit_pages
        new_pages = list(pages[known:])
        if new_pages:
            leaf = TreeNode(parent=node, tokens=tokens[known * self.page_size :], pages=[])
            leaf.last_access, leaf.worth = self._clock, self._age + 1
            node.children[tuple(leaf.tokens[: self.page_size])] = leaf
            self._put_on_device(leaf, new_pages)
            node = leaf
        return InsertResult(match.pages, node)

    def _revive(self, match: PrefixMatch, pages: Sequence[int]) -> TreeNode:
        """Nodes of the match that are not on the device take their part of `pages`, which hold the
        KV of the same tokens. Returns where the match ends."""
        return match.last_node

    def _put_on_device(self, node: TreeNode, pages: list[int]) -> None:
        """`pages` belong to `node` from now on; nobody locks it yet."""
        node.pages = pages
        self._evictable_pages += len(pages)
        self._offer(node)
        self.version += 1

    def _walk(self, root: TreeNode, tokens: list[int]) -> PrefixMatch:
        """Follows `tokens` as far as whole pages agree, splitting the last node there."""
        self._clock += 1
        node, position, pages = root, 0, []
        last_node, host_hit_pages = root, 0
        while position + self.page_size <= len(tokens):
            child = node.children.get(tuple(tokens[position : position + self.page_size]))
            if child is None:
                break
            agreeing = self._agreeing_pages(child, tokens, position)
            if agreeing * self.page_size < len(child.tokens):
                child = self._split(child, agreeing)
            child.last_access = self._clock
            if child.pages:
                pages.extend(child.pages)
                last_node = child
            else:
                host_hit_pages += agreeing
            position += agreeing * self.page_size
            node = child
        return PrefixMatch(pages, last_node, host_hit_pages, node)

    def _agreeing_pages(self, node: TreeNode, tokens: list[int], position: int) -> int:
        low = min(len(node.tokens), len(tokens) - position) // self.page_size
        if (
            node.tokens[: low * self.page_size]
            == tokens[position : position + low * self.page_size]
        ):
            return low
        low, high = 0, low  # the first `low` pages agree, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            start, end = low * self.page_size, middle * self.page_size
            if node.tokens[start:end] == tokens[position + start : position + end]:
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: TreeNode, num_pages: int) -> TreeNode:
        """Cuts `node` after `num_pages`; returns the upper part. Locks point at the lower part,
        which is still the same object, and cover both.
        """
        parent = node.parent
        if parent is None:
            raise PrefixCacheError("the root holds no pages to split")
        cut = num_pages * self.page_size
        upper = TreeNode(parent=parent, tokens=node.tokens[:cut], pages=node.pages[:num_pages])
        upper.lock_ref = node.lock_ref
        upper.last_access = node.last_access
        upper.hit_count, upper.worth = node.hit_count, node.worth
        parent.children[tuple(upper.tokens[: self.page_size])] = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[num_pages:], upper
        upper.children[tuple(node.tokens[: self.page_size])] = node
        return upper

    # ---- locks and eviction

    def inc_lock_ref(self, node: TreeNode) -> None:
        while node.parent is not None:
            if node.lock_ref == 0:
                self._evictable_pages -= len(node.pages)
                self._protected_pages += len(node.pages)
            node.lock_ref += 1
            node = node.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        while node.parent is not None:
            if node.lock_ref == 0:
                raise PrefixCacheError("a prefix is unlocked more often than it was locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self._protected_pages -= len(node.pages)
                self._evictable_pages += len(node.pages)
                self._offer(node)
            node = node.parent

    def evict(self, num_tokens: int) -> int:
        wanted = -(-num_tokens // self.page_size)
        freed: list[int] = []
        while len(freed) < wanted and (leaf := self._pop_leaf()) is not None:
            freed.extend(self._trim(leaf, wanted - len(freed)))
        self._evictable_pages -= len(freed)
        self.allocator.free(freed)
        return len(freed) * self.page_size

    def _is_leaf(self, node: TreeNode) -> bool:
        return not node.children

    def _pop_leaf(self) -> TreeNode | None:
        """The unlocked leaf to evict first; it is no candidate any more until it is offered."""
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            node.in_heap = False
            if not self._is_leaf(node) or node.lock_ref > 0 or node.parent is None:
                continue  # offered again once it is an unlocked leaf
            if key == self._eviction_key(node):
                self._age = max(self._age, key[0])
                return node
            self._offer(node)
        return None

    def _next_leaves(self, count: int) -> list[TreeNode]:
        """At most `count` unlocked leaves, the first to be evicted first; none is evicted."""
        age = self._age
        leaves: list[TreeNode] = []
        while len(leaves) < count and (leaf := self._pop_leaf()) is not None:
            leaves.append(leaf)
        self._age = age
        for leaf in leaves:
            self._offer(leaf)
        return leaves

    def _eviction_key(self, node: TreeNode) -> tuple[int, int]:
        """Smaller goes first. Of leaves worth the same, the least recently used one."""
        return (node.worth if self._by_hits else 0, node.last_access)

    def record_hit(self, node: TreeNode) -> None:
        while node.parent is not None:
            node.hit_count += 1
            node.worth = self._age + 1 + node.hit_count
            node = node.parent

    def _trim(self, leaf: TreeNode, num_pages: int) -> list[int]:
        """Takes the last pages of a leaf: what is left is still a useful prefix."""
        self.version += 1
        kept = max(0, len(leaf.pages) - num_pages)
        removed = leaf.pages[kept:]
        if kept > 0:
            del leaf.pages[kept:], leaf.tokens[kept * self.page_size :]
            self._offer(leaf)
            return removed
        parent = leaf.parent
        if parent is None:
            raise PrefixCacheError("the root is never evicted")
        del parent.children[tuple(leaf.tokens[: self.page_size])]
        leaf.parent = None
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            self._roots.pop(parent.namespace, None)
        return removed

    def _offer(self, node: TreeNode) -> None:
        if node.in_heap or not self._is_leaf(node) or node.lock_ref > 0:
            return
        node.in_heap = True
        self._entries += 1
        heapq.heappush(self._heap, (self._eviction_key(node), self._entries, node))

    # ---- requests

    def cache_unfinished_req(
        self,
        req: CacheableRequest,
        *,
        replace_duplicates: bool = True,
        computed_len: int | None = None,
    ) -> None:
        computed = req.kv_committed_len if computed_len is None else computed_len
        num_pages = computed // self.page_size
        if num_pages * self.page_size <= req.tree_len:
            return
        tokens = req.token_ids(num_pages * self.page_size)
        owned_from = req.tree_len // self.page_size
        if not replace_duplicates:
            match = self.match_prefix(tokens, req.extra_key)
            if len(match.pages) > owned_from:
                return
        existing, node = self.insert(tokens, req.pages[:num_pages], req.extra_key)
        self.inc_lock_ref(node)
        if req.last_node is not None:
            self.dec_lock_ref(req.last_node)
        self._replace_duplicates(req, owned_from, existing)
        req.last_node = node
        req.tree_len = num_pages * self.page_size

    def _replace_duplicates(
        self, req: CacheableRequest, owned_from: int, existing: list[int]
    ) -> None:
        if len(existing) <= owned_from:
            return
        self.allocator.free(req.pages[owned_from : len(existing)])
        req.pages[owned_from : len(existing)] = existing[owned_from:]
        if req.req_pool_idx is not None:
            start, end = owned_from * self.page_size, len(existing) * self.page_size
            slots = page_slots(req.pages, self.page_size, start, end)
            self.req_to_token.write(req.req_pool_idx, start, slots)

    def cache_finished_req(self, req: CacheableRequest, *, insert: bool = True) -> None:
        owned_from = req.tree_len // self.page_size
        kept_to = owned_from
        if insert:
            kept_to = max(owned_from, req.kv_committed_len // self.page_size)
            tokens = req.token_ids(kept_to * self.page_size)
            existing, _ = self.insert(tokens, req.pages[:kept_to], req.extra_key)
            self.allocator.free(req.pages[owned_from : len(existing)])
        self.allocator.free(req.pages[kept_to:])
        if req.last_node is not None:
            self.dec_lock_ref(req.last_node)
        req.pages = []
        req.tree_len = 0
        req.last_node = None

    # ---- counting

    def evictable_size(self) -> int:
        return self._evictable_pages * self.page_size

    def protected_size(self) -> int:
        return self._protected_pages * self.page_size

    def total_pages(self) -> int:
        return sum(1 for _ in self.iter_pages())

    def iter_pages(self) -> Iterator[int]:
        for _, node in self._nodes():
            yield from node.pages

    def _nodes(self) -> Iterator[tuple[int, TreeNode]]:
        stack = [(0, root) for root in self._roots.values()]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack.extend((depth + 1, child) for child in node.children.values())

    def pretty_print(self, max_nodes: int = 100) -> str:
        lines = [
            f"prefix cache: {self.evictable_size()} tokens evictable, "
            f"{self.protected_size()} locked"
        ]
        for count, (depth, node) in enumerate(self._nodes()):
            if count == max_nodes:
                lines.append("...")
                break
            name = f"namespace {node.namespace!r}" if node.parent is None else f"{node.tokens[:8]}"
            lines.append(f"{'  ' * depth}{name} {self._describe(node)}")
        return "\n".join(lines)

    def _describe(self, node: TreeNode) -> str:
        return f"pages={len(node.pages)} locks={node.lock_ref}"

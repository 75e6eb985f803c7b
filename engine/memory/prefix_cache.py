"""What the scheduler asks of a prefix cache, whether it keeps anything or not.

Ownership, in one sentence: of a request's pages, those of its first `tree_len` tokens belong to
the tree and are locked through `last_node`; the rest belong to the request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.memory.page_allocator import PageAllocator
from engine.memory.req_to_token import ReqToTokenPool

if TYPE_CHECKING:
    from engine.memory.page_transfer import PageTransfer


class TreeNode:
    """A run of whole pages of tokens below `parent`; the root has none and is never locked.

    Its KV is on the device (`pages`), in host memory (`host_pages`), or both; then there is one
    page in each for every page of tokens.
    """

    __slots__ = ("children", "hit_count", "host_pages", "hosted_children", "in_heap",
                 "in_host_heap", "last_access", "lock_ref", "namespace", "pages", "parent",
                 "resident_children", "tokens", "transfer", "worth")  # fmt: skip

    def __init__(
        self,
        *,
        parent: TreeNode | None,
        tokens: list[int],
        pages: list[int],
        namespace: str = "",
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.namespace = namespace
        self.children: dict[tuple[int, ...], TreeNode] = {}
        """By the tokens of the child's first page."""
        self.lock_ref = 0
        """Requests that read this node's pages or pages below it."""
        self.last_access = 0
        self.hit_count = 0
        """Requests that were admitted with this prefix; both parts of a split keep it."""
        self.worth = 0
        """By which the least often used goes first: its uses, and the cache's age at the last."""
        self.in_heap = False
        self.host_pages: list[int] = []
        self.resident_children = 0
        """Children that are on the device; kept by a cache with a host tier only, as the rest."""
        self.hosted_children = 0
        """Children that are in host memory."""
        self.in_host_heap = False
        self.transfer: PageTransfer | None = None
        """The copy, still going on, that reads or fills this node's pages."""


class PrefixMatch(NamedTuple):
    """The longest cached prefix, in whole pages."""

    pages: list[int]
    last_node: TreeNode
    """Where it ends. Nothing is locked yet: lock it before anything may evict."""
    host_hit_pages: int = 0
    """Pages right behind it that are in host memory only."""
    last_host_node: TreeNode | None = None
    """Where those end; `load_back` takes it."""


class LoadBack(Enum):
    """What became of a hit in host memory."""

    NOTHING = auto()
    """Nothing to load, or no memory for all of it: what is on the device is the hit."""
    PENDING = auto()
    """On its way; whoever wants it looks again in a later pass."""
    DONE = auto()
    """The copy has ended: match again. More is on the device now, unless it was spoilt."""


class InsertResult(NamedTuple):
    existing_pages: list[int]
    """The tree's own pages for the leading tokens it had already. The caller keeps its duplicates
    of them; all its other pages belong to the tree now."""
    last_node: TreeNode
    """Where the inserted tokens end."""


class CacheableRequest(Protocol):
    """The part of a request that a cache reads and updates."""

    req_pool_idx: int | None
    pages: list[int]
    tree_len: int
    last_node: TreeNode | None

    @property
    def extra_key(self) -> str: ...

    @property
    def kv_committed_len(self) -> int: ...

    def token_ids(self, end: int) -> list[int]:
        """The first `end` tokens of prompt and output."""
        ...


class PageSeals(Protocol):
    """Where a role that hands pages over keeps what each was sealed with when it was computed."""

    def digest_of(self, page: int) -> bytes | None:
        """Of the whole page; None: it has no seal, or is no whole page."""
        ...

    def reseal(self, page: int, *, chain_hash: bytes, digest: bytes) -> None:
        """A page that was computed earlier has come back as `page`; `digest` was compared."""
        ...


class BasePrefixCache(ABC):
    """Keeps KV pages of past requests for those that start with the same tokens."""

    disable: bool
    """True where nothing is kept: a finished request's pages are free at once."""

    seals: PageSeals | None = None
    """Set by a role that seals pages; None: nobody does."""

    version: int = 0
    """Changes whenever what is cached does."""

    def __init__(self, allocator: PageAllocator, req_to_token: ReqToTokenPool) -> None:
        self.allocator = allocator
        self.req_to_token = req_to_token
        self.page_size = allocator.page_size

    @abstractmethod
    def match_prefix(self, token_ids: Sequence[int], extra_key: str = "") -> PrefixMatch:
        """The longest cached prefix of `token_ids` under the namespace `extra_key`."""

    @abstractmethod
    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], extra_key: str = ""
    ) -> InsertResult:
        """Gives pages to the tree; `len(token_ids) == len(pages) * page_size`."""

    @abstractmethod
    def record_hit(self, node: TreeNode) -> None:
        """Called once when a request is admitted whose prefix ends at `node`; a look at the tree
        alone is no use of it."""

    @abstractmethod
    def inc_lock_ref(self, node: TreeNode) -> None:
        """Protects `node` and all above it from eviction, until `dec_lock_ref`."""

    @abstractmethod
    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undoes one `inc_lock_ref`."""

    @abstractmethod
    def evict(self, num_tokens: int) -> int:
        """Frees at least `num_tokens` tokens of unlocked pages, in the order of the eviction
        policy, or all there are; returns how many.
        """

    @abstractmethod
    def evictable_size(self) -> int:
        """Tokens in pages that `evict` could free."""

    @abstractmethod
    def protected_size(self) -> int:
        """Tokens in locked pages."""

    @abstractmethod
    def total_pages(self) -> int:
        """Pages in the tree, counted by walking it."""

    @abstractmethod
    def iter_pages(self) -> Iterator[int]:
        """Every page in the tree, by walking it (for the audit)."""

    @abstractmethod
    def cache_unfinished_req(
        self,
        req: CacheableRequest,
        *,
        replace_duplicates: bool = True,
        computed_len: int | None = None,
    ) -> None:
        """Called when a request that goes on has computed more KV: its whole pages become matches
        for others, and stay locked. Pages the tree had already replace the request's own, in its
        list and its row. With `replace_duplicates` false (somebody still reads them) such a
        request keeps its own and gives nothing. `computed_len`: tokens whose KV exists; None: the
        committed ones, as no launched step is still writing any.
        """

    @abstractmethod
    def cache_finished_req(self, req: CacheableRequest, *, insert: bool = True) -> None:
        """Called once when a request lets go of its pages: finished, aborted or retracted. Keeps
        what is whole and computed (unless `insert` is false), frees the rest, unlocks. The row
        stays the caller's.
        """

    def check_hicache_events(self) -> None:
        """Called in every pass: takes note of copies between device and host that have ended, and
        starts those that are due. Never waits."""
        return None

    def load_back(self, last_host_node: TreeNode) -> LoadBack:
        """Brings a match's pages back from host memory, all or nothing. Called with the match's
        device part locked, and by somebody who has found that there is room for them: evicts what
        is evictable."""
        return LoadBack.NOTHING

    def has_pending_copies(self) -> bool:
        """Whether `check_hicache_events` must be called soon although nothing is scheduled."""
        return False

    def pages_under_copy(self) -> Iterable[Sequence[int]]:
        """Pages that a copy reads or fills: held, whoever else owns them (for the audit)."""
        return ()

    def check_host(self) -> None:
        """Raises an `EngineError` if a page of host memory is not accounted for."""
        return None

    @abstractmethod
    def pretty_print(self, max_nodes: int = 100) -> str:
        """The tree as text for a log; at most `max_nodes` nodes."""


class ChunkCache(BasePrefixCache):
    """Keeps nothing: each request's pages are its own until it ends."""

    disable = True

    def __init__(self, allocator: PageAllocator, req_to_token: ReqToTokenPool) -> None:
        super().__init__(allocator, req_to_token)
        self._root = TreeNode(parent=None, tokens=[], pages=[])

    def match_prefix(self, token_ids: Sequence[int], extra_key: str = "") -> PrefixMatch:
        return PrefixMatch([], self._root)

    def insert(
        self, token_ids: Sequence[int], pages: Sequence[int], extra_key: str = ""
    ) -> InsertResult:
        self.allocator.free(pages)
        return InsertResult([], self._root)

    def record_hit(self, node: TreeNode) -> None:
        pass

    def inc_lock_ref(self, node: TreeNode) -> None:
        pass

    def dec_lock_ref(self, node: TreeNode) -> None:
        pass

    def evict(self, num_tokens: int) -> int:
        return 0

    def evictable_size(self) -> int:
        return 0

    def protected_size(self) -> int:
        return 0

    def total_pages(self) -> int:
        return 0

    def iter_pages(self) -> Iterator[int]:
        return iter(())

    def cache_unfinished_req(
        self,
        req: CacheableRequest,
        *,
        replace_duplicates: bool = True,
        computed_len: int | None = None,
    ) -> None:
        pass

    def cache_finished_req(self, req: CacheableRequest, *, insert: bool = True) -> None:
        self.allocator.free(req.pages)
        req.pages = []
        req.tree_len = 0
        req.last_node = None

    def pretty_print(self, max_nodes: int = 100) -> str:
        return "prefix cache: off"

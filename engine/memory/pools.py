"""The memory of one engine as its owners ask for it: pages, rows, and the tree that lends pages."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.errors import OutOfMemoryError
from engine.memory.hi_radix_cache import HiRadixCache
from engine.memory.host_pool import HostPool
from engine.memory.page_allocator import PageAllocator
from engine.memory.page_copier import PageCopier
from engine.memory.prefix_cache import BasePrefixCache, ChunkCache
from engine.memory.radix_cache import RadixCache
from engine.memory.req_to_token import ReqToTokenPool
from engine.memory.retracted_kv import RetractedKV
from engine.types import HostWritePolicy, RadixEvictionPolicy


@dataclass(frozen=True, slots=True)
class MemoryPools:
    """Pages, rows and prefix cache, used from the scheduler's thread only."""

    allocator: PageAllocator
    req_to_token: ReqToTokenPool
    tree_cache: BasePrefixCache
    retracted: RetractedKV | None = None
    """Host memory for the KV of retracted requests; None: they compute it again."""

    def available_tokens(self) -> int:
        """Tokens that could be allocated now: free, or cached and evictable, or owned by nobody
        but a copy."""
        tokens = self.allocator.available_size() + self.tree_cache.evictable_size()
        if self.retracted is not None:
            pages = self.retracted.pages_leaving + self.retracted.pages_loaded
            tokens += pages * self.allocator.page_size
        return tokens

    def evict_for(self, num_pages: int) -> None:
        """Makes `num_pages` free by eviction as far as that goes. Waits for copies of retracted
        requests where there is no other way."""
        self._evict_missing(num_pages)
        if self.retracted is not None and num_pages > self.allocator.free_pages:
            self.retracted.reclaim()
            self._evict_missing(num_pages)

    def _evict_missing(self, num_pages: int) -> None:
        missing = num_pages - self.allocator.free_pages
        if missing > 0:
            self.tree_cache.evict(missing * self.allocator.page_size)

    def check_hicache_events(self) -> None:
        """Called in every pass: takes note of copies between device and host that have ended, and
        starts those that are due. Never waits."""
        self.tree_cache.check_hicache_events()
        if self.retracted is not None:
            self.retracted.poll()

    def has_pending_copies(self) -> bool:
        """Whether `check_hicache_events` must be called soon although nothing is scheduled."""
        return self.tree_cache.has_pending_copies() or (
            self.retracted is not None and self.retracted.has_pending_copies()
        )

    def pages_under_copy(self) -> Iterator[Sequence[int]]:
        """Held pages: copies read or fill them (for the audit)."""
        yield from self.tree_cache.pages_under_copy()
        if self.retracted is not None:
            yield from self.retracted.held_pages()

    @property
    def host_cache(self) -> HostPool | None:
        """Host memory of the prefix cache; None: it has none."""
        return self.tree_cache.host if isinstance(self.tree_cache, HiRadixCache) else None

    @property
    def retracted_host(self) -> HostPool | None:
        """Host memory of retracted requests; None: there is none."""
        return None if self.retracted is None else self.retracted.host

    def check_host(self) -> None:
        """Raises `MemoryInvariantError` if a page of host memory is not accounted for."""
        self.tree_cache.check_host()
        if self.retracted is not None:
            self.retracted.check()

    def alloc_pages(self, num_pages: int, *, after: int | None = None) -> list[int]:
        """`num_pages` pages, evicting from the tree first if they are short; neighbours where it
        can be. Raises `OutOfMemoryError`, with nothing allocated.
        """
        self.evict_for(num_pages)
        pages = self.allocator.alloc(num_pages, after=after)
        if pages is None:
            raise OutOfMemoryError(
                f"KV memory is short: {num_pages} pages asked, {self.allocator.free_pages} free, "
                f"{self.tree_cache.evictable_size() // self.allocator.page_size} evictable, of "
                f"{self.allocator.num_pages} pages of {self.allocator.page_size} tokens; lower the "
                "load or give the worker more KV memory"
            )
        return pages

    def free_pages(self, pages: Iterable[int]) -> None:
        """Takes back pages from `alloc_pages` that were given to nobody else."""
        self.allocator.free(pages)


def make_memory_pools(
    *,
    num_pages: int,
    page_size: int,
    num_rows: int,
    max_context_len: int,
    device: str = "cpu",
    enable_radix_cache: bool = True,
    eviction_policy: RadixEvictionPolicy = "lru",
    host_copier: PageCopier | None = None,
    host_write_policy: HostWritePolicy = "write_through",
    retract_copier: PageCopier | None = None,
) -> MemoryPools:
    """All of them, empty. Pages count without the padding page of captured graphs. `host_copier`:
    host memory for evicted prefixes, of no use without the radix cache; `retract_copier`: for
    retracted requests.
    """
    allocator = PageAllocator(num_pages, page_size)
    req_to_token = ReqToTokenPool(num_rows, max_context_len, device)
    tree: BasePrefixCache
    if not enable_radix_cache:
        tree = ChunkCache(allocator, req_to_token)
    elif host_copier is None:
        tree = RadixCache(allocator, req_to_token, eviction_policy=eviction_policy)
    else:
        tree = HiRadixCache(
            allocator,
            req_to_token,
            HostPool(host_copier, page_size),
            write_policy=host_write_policy,
            eviction_policy=eviction_policy,
        )
    retracted = None
    if retract_copier is not None:
        retracted = RetractedKV(allocator, tree, HostPool(retract_copier, page_size))
    return MemoryPools(
        allocator=allocator, req_to_token=req_to_token, tree_cache=tree, retracted=retracted
    )

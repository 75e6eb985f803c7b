"""The memory of one engine as its owners ask for it: pages, rows, and the tree that lends pages."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import OutOfMemoryError
from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import BasePrefixCache, ChunkCache
from engine.memory.radix_cache import RadixCache
from engine.memory.req_to_token import ReqToTokenPool


@dataclass(frozen=True, slots=True)
class MemoryPools:
    """Pages, rows and prefix cache, used from the scheduler's thread only."""

    allocator: PageAllocator
    req_to_token: ReqToTokenPool
    tree_cache: BasePrefixCache

    def available_tokens(self) -> int:
        """Tokens that could be allocated now: free, or cached and evictable."""
        return self.allocator.available_size() + self.tree_cache.evictable_size()

    def evict_for(self, num_pages: int) -> None:
        """Makes `num_pages` free by eviction as far as that goes."""
        missing = num_pages - self.allocator.free_pages
        if missing > 0:
            self.tree_cache.evict(missing * self.allocator.page_size)

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
) -> MemoryPools:
    """The three of them, empty. Pages count without the padding page of captured graphs."""
    allocator = PageAllocator(num_pages, page_size)
    req_to_token = ReqToTokenPool(num_rows, max_context_len, device)
    tree: BasePrefixCache = (
        RadixCache(allocator, req_to_token)
        if enable_radix_cache
        else ChunkCache(allocator, req_to_token)
    )
    return MemoryPools(allocator=allocator, req_to_token=req_to_token, tree_cache=tree)

"""Recounts every page and row from its owners (scheduling.md section 8).

Each page is in one state, decided in this order: in use, held, cached, free. Nothing is found by
subtraction, so a page that somebody forgot shows up as owned by nobody, and a page given out
while its old owner still reads it shows up as contested.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import EngineError
from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import BasePrefixCache
from engine.memory.req_to_token import ReqToTokenPool

_NAMED_AT_MOST = 8


class MemoryInvariantError(EngineError):
    """A page or row leaked, or has two owners. The process should not go on."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state; `balanced` is the invariant of every idle moment."""

    free: int
    cached: int
    held: int
    in_use: int
    total: int

    @property
    def balanced(self) -> bool:
        return self.free + self.cached + self.held + self.in_use == self.total


@dataclass(frozen=True, slots=True)
class PageAudit:
    """The counts and what is wrong with them."""

    counts: PageCounts
    unowned: tuple[int, ...]
    """Pages that nobody owns and that are not free: leaked."""
    contested: tuple[int, ...]
    """Pages that are free although somebody owns them, or of two owners without the tree's word,
    or outside the pool."""

    def raise_if_broken(self) -> None:
        """Raises `MemoryInvariantError`, naming the first pages at fault."""
        if self.unowned or self.contested or not self.counts.balanced:
            raise MemoryInvariantError(
                f"pages do not balance: {self.counts}; without an owner: "
                f"{self.unowned[:_NAMED_AT_MOST]}; contested: {self.contested[:_NAMED_AT_MOST]}"
            )


def audit_pages(
    *,
    allocator: PageAllocator,
    tree_cache: BasePrefixCache,
    request_pages: Iterable[Sequence[int]] = (),
    other_in_use: Iterable[Sequence[int]] = (),
    held: Iterable[Sequence[int]] = (),
) -> PageAudit:
    """Looks at every page of the pool.

    `request_pages`: one list a live request; two may share a page only if the tree has it.
    `other_in_use`: what tickets and the like keep, which may name a request's page again.
    `held`: pages that a transfer still reads, or in quarantine.
    """
    total = allocator.num_pages
    contested: set[int] = set()
    cached_pages, twice_in_tree = _collect([list(tree_cache.iter_pages())])
    used_pages, shared = _collect(request_pages)
    contested |= twice_in_tree | (shared - cached_pages)
    other_pages, _ = _collect(other_in_use)
    used_pages |= other_pages
    held_pages, _ = _collect(held)
    owned = used_pages | held_pages | cached_pages
    contested |= {page for page in owned if not 0 <= page < total}

    pages = set(range(total))
    free_pages = set(allocator.free_list())
    contested |= free_pages & owned
    unowned = sorted(pages - owned - free_pages)
    counts = PageCounts(
        free=len(free_pages - owned),
        cached=len((cached_pages - used_pages - held_pages) & pages),
        held=len((held_pages - used_pages) & pages),
        in_use=len(used_pages & pages),
        total=total,
    )
    return PageAudit(counts, tuple(unowned), tuple(sorted(contested)))


def count_pages(
    *,
    allocator: PageAllocator,
    tree_cache: BasePrefixCache,
    request_pages: Iterable[Sequence[int]] = (),
    other_in_use: Iterable[Sequence[int]] = (),
    held: Iterable[Sequence[int]] = (),
) -> PageCounts:
    """`audit_pages`, raising `MemoryInvariantError` where anything is wrong."""
    audit = audit_pages(
        allocator=allocator,
        tree_cache=tree_cache,
        request_pages=request_pages,
        other_in_use=other_in_use,
        held=held,
    )
    audit.raise_if_broken()
    return audit.counts


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of the request-to-token table by state."""

    free: int
    in_use: int
    total: int

    @property
    def balanced(self) -> bool:
        return self.free + self.in_use == self.total


def count_rows(*, req_to_token: ReqToTokenPool, in_use: Iterable[int]) -> RowCounts:
    """Rows from their owners. Raises `MemoryInvariantError` for one without an owner, with two, or
    free although owned.
    """
    used, shared = _collect([[row] for row in in_use])
    free = set(req_to_token.free_list())
    counts = RowCounts(free=len(free), in_use=len(used), total=req_to_token.size)
    if shared or used & free or not counts.balanced:
        raise MemoryInvariantError(
            f"rows do not balance: {counts}; with two owners: {sorted(shared)[:_NAMED_AT_MOST]}; "
            f"free although owned: {sorted(used & free)[:_NAMED_AT_MOST]}"
        )
    return counts


def _collect(owners: Iterable[Sequence[int]]) -> tuple[set[int], set[int]]:
    """All pages, and those listed more than once."""
    seen: set[int] = set()
    repeated: set[int] = set()
    for pages in owners:
        for page in pages:
            if page in seen:
                repeated.add(page)
            seen.add(page)
    return seen, repeated

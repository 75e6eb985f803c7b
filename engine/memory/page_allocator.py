"""Hands out KV pages, in runs of neighbours where it can.

Neighbouring pages are one block of memory, so a run travels as one descriptor (design.md
section 4). Free pages are kept as maximal runs, filed by size; a request takes the run that fits
it most closely, and single pages of decode growth nibble at the small runs first, so that long
runs stay whole for prompts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from engine.errors import EngineError

_RUNS_LOOKED_AT = 32
"""Runs compared for the closest fit; more would make a fragmented pool slow."""


class PageAllocationError(EngineError):
    """A page was freed twice, or does not exist: the owner's bookkeeping is broken."""


@dataclass(frozen=True, slots=True)
class AllocatorState:
    """What was free at one moment; only for `PageAllocator.restore_state`."""

    free_map: bytes


class PageAllocator:
    """Pages `0 .. num_pages - 1` of `page_size` tokens each.

    The padding page of captured graphs is outside: its pool is one page longer than this counts.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise PageAllocationError(
                f"a pool needs at least one page of one token, not {num_pages} x {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._generations = [0] * num_pages
        self._is_free = bytearray(num_pages)
        self._parked: list[int] | None = None
        self._rebuild(b"\x01" * num_pages)

    @property
    def free_pages(self) -> int:
        """Number of pages that nobody owns."""
        return self._free_count

    @property
    def total_tokens(self) -> int:
        return self.num_pages * self.page_size

    def available_size(self) -> int:
        """Free room in tokens."""
        return self._free_count * self.page_size

    def is_free(self, page: int) -> bool:
        return bool(self._is_free[page])

    def free_list(self) -> list[int]:
        """Every free page, ascending; walks the whole pool (for the audit)."""
        return [page for page, free in enumerate(self._is_free) if free]

    def generation(self, page: int) -> int:
        """How often `page` has been handed out; never goes back.

        Two reads of a page under one generation are reads of one owner's content.
        """
        return self._generations[page]

    def alloc(self, n: int, *, after: int | None = None) -> list[int] | None:
        """`n` pages, or None and nothing taken where fewer are free.

        `after`: the caller's last page; the run right behind it is preferred, so that a prompt
        computed in chunks still ends up in one run.
        """
        if n > self._free_count:
            return None
        pages: list[int] = []
        if after is not None and after + 1 in self._run_length and n > 0:
            pages.extend(self._take(after + 1, n))
        while len(pages) < n:
            missing = n - len(pages)
            pages.extend(self._take(self._best_run(missing), missing))
        for page in pages:
            self._generations[page] += 1
            self._is_free[page] = 0
        self._free_count -= n
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes pages back. Raises `PageAllocationError`, and takes none, if one is free already,
        is listed twice, or does not exist.
        """
        ordered = sorted(pages)
        previous = -1
        for page in ordered:
            if page < 0 or page >= self.num_pages:
                raise PageAllocationError(f"page {page} is not one of {self.num_pages}")
            if page == previous or self._is_free[page]:
                raise PageAllocationError(f"page {page} is freed twice")
            previous = page
        if self._parked is not None:
            self._parked.extend(ordered)
            return
        start = 0
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
                self._give(ordered[start], i - start)
                start = i
        for page in ordered:
            self._is_free[page] = 1
        self._free_count += len(ordered)

    @contextmanager
    def parking(self, parked: list[int] | None) -> Iterator[None]:
        """While this is entered, pages that are freed are put on `parked` instead (None: they are
        free at once), and count as owned until the caller frees them: a launched step may still
        read them."""
        before, self._parked = self._parked, parked
        try:
            yield
        finally:
            self._parked = before

    def backup_state(self) -> AllocatorState:
        """What is free now, to undo allocations of a step that is given up."""
        return AllocatorState(bytes(self._is_free))

    def restore_state(self, state: AllocatorState) -> None:
        """Back to `state`. The caller vouches that nobody kept a page allocated since, and that
        none was freed since. Generations stay, so stale readers are still told apart.
        """
        self._rebuild(state.free_map)

    # Free pages as maximal runs: length by first page, first page by end, and classes of runs
    # whose length has the same highest bit.

    def _rebuild(self, free_map: bytes) -> None:
        self._is_free[:] = free_map
        self._free_count = free_map.count(1)
        self._run_length: dict[int, int] = {}
        self._run_ending: dict[int, int] = {}
        self._classes: list[dict[int, None]] = [{} for _ in range(self.num_pages.bit_length() + 1)]
        start = free_map.find(1)
        while start >= 0:
            end = free_map.find(0, start)
            end = self.num_pages if end < 0 else end
            self._add_run(start, end - start)
            start = free_map.find(1, end)

    def _add_run(self, start: int, length: int) -> None:
        self._run_length[start] = length
        self._run_ending[start + length] = start
        self._classes[length.bit_length()][start] = None

    def _drop_run(self, start: int) -> int:
        length = self._run_length.pop(start)
        del self._run_ending[start + length]
        del self._classes[length.bit_length()][start]
        return length

    def _best_run(self, n: int) -> int:
        """First page of a run of at least `n`, of the smallest class that has one; where there is
        none, of one of the longest runs.
        """
        own_class = n.bit_length()
        best = -1
        for start in islice(self._classes[own_class], _RUNS_LOOKED_AT):
            length = self._run_length[start]
            if length == n:
                return start
            if length > n and best < 0:
                best = start
        if best >= 0:
            return best
        for larger in self._classes[own_class + 1 :]:
            if larger:
                return next(iter(larger))
        for smaller in reversed(self._classes[: own_class + 1]):
            if smaller:
                return next(iter(smaller))
        raise PageAllocationError("the free runs hold fewer pages than the free count says")

    def _take(self, start: int, n: int) -> range:
        length = self._drop_run(start)
        taken = min(n, length)
        if taken < length:
            self._add_run(start + taken, length - taken)
        return range(start, start + taken)

    def _give(self, start: int, length: int) -> None:
        before = self._run_ending.get(start)
        if before is not None:
            length += self._drop_run(before)
            start = before
        if start + length in self._run_length:
            length += self._drop_run(start + length)
        self._add_run(start, length)

"""Pages of host memory: which are free, and what each of them must hold.

A page that comes back from the host is served only if it is, byte for byte, what was computed: the
digest taken when it left is compared with that of what has arrived on the device.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.memory.page_allocator import PageAllocator
from engine.memory.page_copier import PageCopier, PageCopy

_KEPT_SHARE = 0.8
"""Of what was measured before, when something new is."""


class Rate:
    """Units a second, over what was measured lately; None before that. A large amount counts for
    more than a small one, whose time is mostly its start."""

    def __init__(self) -> None:
        self.per_s: float | None = None
        self._amount = 0.0
        self._seconds = 0.0

    def observe(self, amount: float, seconds: float) -> None:
        """Measurements without a duration say nothing."""
        if amount <= 0 or seconds <= 0:
            return
        self._amount = self._amount * _KEPT_SHARE + amount
        self._seconds = self._seconds * _KEPT_SHARE + seconds
        self.per_s = self._amount / self._seconds


@dataclass(slots=True)
class HostCounters:
    """Pages since the start."""

    written: int = 0
    """Copied to the host."""
    loaded: int = 0
    """Copied back, found whole, and used."""
    spoilt: int = 0
    """Found to hold something else than what was computed, and thrown away."""


class HostPool:
    """Host memory of one owner."""

    def __init__(self, copier: PageCopier, page_size: int) -> None:
        self.copier = copier
        self.allocator = PageAllocator(copier.num_pages, page_size)
        self.counters = HostCounters()
        self.rate = Rate()
        """Bytes a second of copies between host and device."""
        self._digests = [b""] * copier.num_pages

    @property
    def free_pages(self) -> int:
        return self.allocator.free_pages

    def alloc(self, num_pages: int) -> list[int] | None:
        """`num_pages`, in runs of neighbours where it can be; None where fewer are free."""
        return self.allocator.alloc(num_pages)

    def free(self, host_pages: Iterable[int]) -> None:
        self.allocator.free(host_pages)

    def filled(self, host_pages: Sequence[int], digests: Sequence[bytes]) -> None:
        """What was copied into `host_pages`."""
        for page, digest in zip(host_pages, digests, strict=True):
            self._digests[page] = digest
        self.counters.written += len(host_pages)

    def digest(self, host_page: int) -> bytes:
        return self._digests[host_page]

    def whole(self, host_pages: Sequence[int], arrived: Sequence[bytes]) -> int:
        """How many leading pages have arrived on the device as they left it."""
        for count, (page, digest) in enumerate(zip(host_pages, arrived, strict=True)):
            if self._digests[page] != digest:
                return count
        return len(host_pages)

    def measure(self, copy: PageCopy, num_pages: int) -> None:
        """Takes note of how fast a copy was that has ended."""
        self.rate.observe(num_pages * self.copier.page_bytes, copy.duration_s())

"""Moves whole pages between the device's pool and host memory.

A page is one contiguous block on both sides, so a page is one copy, and neighbouring pages are
one together. On CUDA, copies run on a stream of their own, behind the steps launched before them,
while the scheduler goes on; on a CPU they are over when the call returns. The owners' bookkeeping
is the same for both, and tests put a copier in between that takes its time.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import ConfigError
from engine.memory.kv_pool import PageMajorKVPool

PageDigest = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""(pool [count, page_bytes] uint8, pages) -> [len(pages), n] int64 on the pool's device, n >= 1:
a page's digest over all its bytes. Queued behind the work of the current stream."""


class PageCopy(Protocol):
    """One copy of some pages."""

    def done(self) -> bool:
        """Whether it has ended; does not wait."""
        ...

    def wait(self) -> None:
        """Returns when it has ended."""
        ...

    def digests(self) -> list[bytes]:
        """Of each page, as it lies on the device: what was read, or what has arrived. Only once
        the copy has ended."""
        ...

    def duration_s(self) -> float:
        """How long it took, once it has ended. Seconds; 0.0: unknown."""
        ...


class PageCopier(Protocol):
    """One host memory beside one device pool. Used from the scheduler's thread only."""

    @property
    def num_pages(self) -> int:
        """Pages of the host memory."""
        ...

    @property
    def page_bytes(self) -> int: ...

    def to_host(self, device_pages: Sequence[int], host_pages: Sequence[int]) -> PageCopy:
        """Reads the device's pages once all steps launched so far have written them. The caller
        keeps both sides from everybody else until the copy has ended."""
        ...

    def to_device(self, host_pages: Sequence[int], device_pages: Sequence[int]) -> PageCopy:
        """Writes the device's pages once no step launched so far touches them. The caller keeps
        both sides from everybody else until the copy has ended."""
        ...


def runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, length) of stretches that are neighbours on both sides."""
    start = 0
    for i in range(1, len(sources) + 1):
        if (
            i == len(sources)
            or sources[i] != sources[i - 1] + 1
            or targets[i] != targets[i - 1] + 1
        ):
            yield sources[start], targets[start], i - start
            start = i


def make_page_copier(pool: PageMajorKVPool, num_pages: int, digest: PageDigest) -> PageCopier:
    """A copier with `num_pages` of host memory for `pool`. Raises ConfigError where the host has
    not that much."""
    pages = pool.as_bytes()
    if pages.is_cuda:
        return StreamPageCopier(pages, num_pages, digest)
    return InPlacePageCopier(pages, num_pages, digest)


class EndedCopy:
    """A copy that was over when it was returned."""

    def __init__(self, digests: torch.Tensor, duration_s: float) -> None:
        self._digests = digests
        self._duration_s = duration_s

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def digests(self) -> list[bytes]:
        return _as_bytes(self._digests)

    def duration_s(self) -> float:
        return self._duration_s


class InPlacePageCopier:
    """For a pool in host memory: the second tier is just more of the same."""

    def __init__(self, pool: torch.Tensor, num_pages: int, digest: PageDigest) -> None:
        self._pool = pool
        self._host = _host_memory(num_pages, pool.shape[1])
        self._digest = digest

    @property
    def num_pages(self) -> int:
        return self._host.shape[0]

    @property
    def page_bytes(self) -> int:
        return self._host.shape[1]

    def to_host(self, device_pages: Sequence[int], host_pages: Sequence[int]) -> PageCopy:
        started = time.perf_counter()
        for source, target, count in runs(device_pages, host_pages):
            self._host[target : target + count].copy_(self._pool[source : source + count])
        digests = self._digest(self._pool, device_pages)
        return EndedCopy(digests, time.perf_counter() - started)

    def to_device(self, host_pages: Sequence[int], device_pages: Sequence[int]) -> PageCopy:
        started = time.perf_counter()
        for source, target, count in runs(host_pages, device_pages):
            self._pool[target : target + count].copy_(self._host[source : source + count])
        digests = self._digest(self._pool, device_pages)
        return EndedCopy(digests, time.perf_counter() - started)


class StreamCopy:
    """A copy on a stream."""

    def __init__(
        self, started: torch.cuda.Event, ended: torch.cuda.Event, digests: torch.Tensor
    ) -> None:
        """`digests` lies in pinned memory and is whole when `ended` has come."""
        self._started = started
        self._ended = ended
        self._digests = digests

    def done(self) -> bool:
        return bool(self._ended.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._ended.synchronize()

    def digests(self) -> list[bytes]:
        return _as_bytes(self._digests)

    def duration_s(self) -> float:
        return float(self._started.elapsed_time(self._ended)) / 1e3


class StreamPageCopier:
    """For a pool on a CUDA device. Host memory is page-locked, or its copies would block."""

    def __init__(self, pool: torch.Tensor, num_pages: int, digest: PageDigest) -> None:
        self._pool = pool
        self._host = _host_memory(num_pages, pool.shape[1])
        _lock_pages(self._host)
        weakref.finalize(self, _unlock_pages, self._host)
        self._digest = digest
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]

    @property
    def num_pages(self) -> int:
        return self._host.shape[0]

    @property
    def page_bytes(self) -> int:
        return self._host.shape[1]

    def to_host(self, device_pages: Sequence[int], host_pages: Sequence[int]) -> PageCopy:
        return self._run(device_pages, self._pool, self._host, runs(device_pages, host_pages))

    def to_device(self, host_pages: Sequence[int], device_pages: Sequence[int]) -> PageCopy:
        return self._run(device_pages, self._host, self._pool, runs(host_pages, device_pages))

    def _run(
        self,
        device_pages: Sequence[int],
        source: torch.Tensor,
        target: torch.Tensor,
        stretches: Iterator[tuple[int, int, int]],
    ) -> PageCopy:
        started, ended = _event(), _event()
        # The steps launched so far wrote what is read here, or may still touch what is written.
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with torch.cuda.stream(self._stream):
            started.record(self._stream)
            for first, to, count in stretches:
                target[to : to + count].copy_(source[first : first + count], non_blocking=True)
            on_device = self._digest(self._pool, device_pages)
            digests = torch.empty(on_device.shape, dtype=torch.int64, pin_memory=True)
            digests.copy_(on_device, non_blocking=True)
            ended.record(self._stream)
        return StreamCopy(started, ended, digests)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_memory(num_pages: int, page_bytes: int) -> torch.Tensor:
    try:
        return torch.empty((num_pages, page_bytes), dtype=torch.uint8)
    except RuntimeError as error:
        raise ConfigError(
            f"the host has no {num_pages * page_bytes / 2**30:.2f} GiB for {num_pages} pages of "
            f"KV: lower --host-cache-tokens or --retract-host-share ({error})"
        ) from error


def _lock_pages(memory: torch.Tensor) -> None:
    """Registered and not allocated by torch, whose pinned allocator rounds up to powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status != 0:
        raise ConfigError(
            f"CUDA cannot lock {memory.numel() / 2**30:.2f} GiB of host memory for KV pages (error "
            f"{status}): lower --host-cache-tokens or --retract-host-share, or raise the limit "
            "of locked memory"
        )


def _unlock_pages(memory: torch.Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())


def _as_bytes(digests: torch.Tensor) -> list[bytes]:
    """Little-endian, as seals of pages travel."""
    rows: npt.NDArray[np.int64] = digests.cpu().numpy().astype("<i8", copy=False)
    return [row.tobytes() for row in rows]

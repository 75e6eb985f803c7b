"""Writing pages into a peer's mapped memory, by the copy engines.

A page is one block, and neighbouring pages in neighbouring slots are one copy, so the engines run
at the speed of the link, and take no multiprocessor from the model. A kernel that writes the peer's
memory and digests what it writes in the same pass was built first and measured beside this
(bench/README.md): it is slower up to 256 MiB, and competes with prefill's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtransfer.cuda_memory import copy_all_async
from kvtransfer.errors import TransportError


@dataclass(frozen=True, slots=True)
class PendingCopy:
    """Copies on their way."""

    _event: torch.cuda.Event

    def ended(self) -> bool:
        """Whether everything has landed at the peer. Raises RuntimeError for an error of the
        device, after which the process cannot use it any more."""
        ended: bool = self._event.query()  # type: ignore[no-untyped-call]
        return ended

    def wait(self) -> None:
        self._event.synchronize()


class PeerCopier:
    """Starts copies from one pool, on a stream of its own."""

    def __init__(self, pool: torch.Tensor) -> None:
        """`pool`: [pages, page_bytes] uint8 on CUDA."""
        self._device = pool.device
        self._base = pool.data_ptr()
        self._page_bytes = int(pool.shape[1])
        self._stream = torch.cuda.Stream(pool.device, priority=-1)  # type: ignore[no-untyped-call]

    def start(
        self,
        copies: Sequence[tuple[int, int]],
        part: tuple[int, int] | None = None,
        passed: torch.cuda.Event | None = None,
    ) -> PendingCopy:
        """Copies (page, address of its slot) pairs, when the device has `passed` the event; `part`:
        bytes `first .. end - 1` of each alone. Without an event whoever wrote the pages must have
        waited for that. Raises TransportError where a copy cannot start, once those before it have
        ended.
        """
        first, end = part or (0, self._page_bytes)
        with torch.cuda.device(self._device):
            if passed is not None:
                self._stream.wait_event(passed)
            try:
                runs = joined(copies, self._page_bytes, whole=part is None)
                size = self._page_bytes if part is None else end - first
                copy_all_async(
                    [address + first for _, address, _ in runs],
                    [self._base + page * self._page_bytes + first for page, _, _ in runs],
                    [count * size for _, _, count in runs],
                    self._stream,
                )
            except TransportError:
                self._stream.synchronize()
                raise
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return PendingCopy(event)


def joined(
    copies: Sequence[tuple[int, int]], page_bytes: int, *, whole: bool
) -> list[tuple[int, int, int]]:
    """(first page, its address, how many): neighbours at both ends are one copy where `whole`
    pages are copied."""
    runs: list[tuple[int, int, int]] = []
    for page, address in copies:
        if whole and runs:
            first, start, count = runs[-1]
            if (page, address) == (first + count, start + count * page_bytes):
                runs[-1] = (first, start, count + 1)
                continue
        runs.append((page, address, 1))
    return runs

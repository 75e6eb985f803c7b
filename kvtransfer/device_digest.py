"""Digests that a GPU computes, for little of the host's time.

Pages are digested as they are sealed, as they leave and as they are copied out: some hundred times
a second, on threads that share one interpreter with a scheduler. A GPU needs 50 us for the pages of
a write; PyTorch's and Triton's own ways to a kernel (tables that are pinned anew, three tensors,
arguments that are looked at again) needed 200 of the host before and after that. So the memory of
a launch is kept for the next one, and a kernel that was compiled is called directly.
"""

import importlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.cuda_memory import copy_async

IntArray = npt.NDArray[np.int64]

_LEAST_WORDS = 4096
"""Of a launch's table and of its sums: most launches fit, and one size serves them all."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class DeviceDigests:
    """Digests of pages, [count] int64, once the device has them."""

    _lane: "_Lane"
    _count: int
    _rows: int

    def ended(self) -> bool:
        """Whether they are known; never waits. Raises RuntimeError for an error of the device."""
        ended: bool = self._lane.event.query()  # type: ignore[no-untyped-call]
        return ended

    def wait(self) -> IntArray:
        """Waits for the device, and for what the launch copies. [count] int64."""
        self._lane.event.synchronize()
        sums = self._lane.sums_here[: self._count * self._rows]
        digests: IntArray = sums.reshape(self._count, self._rows).sum(axis=1)
        return digests


@dataclass(eq=False, slots=True)
class _Lane:
    """Memory of one launch, for whoever comes next: a table on its way to the device and sums on
    their way back."""

    table_here: IntArray
    table: torch.Tensor
    sums_here: IntArray
    sums: torch.Tensor
    pinned: tuple[torch.Tensor, torch.Tensor]
    event: torch.cuda.Event
    user: Callable[[], DeviceDigests | None] = field(default=lambda: None)
    """Whoever dropped its digests before they ended waits no more: the device may still write."""

    @property
    def free(self) -> bool:
        return self.user() is None and bool(self.event.query())  # type: ignore[no-untyped-call]

    def fits(self, table_words: int, sums: int) -> bool:
        return self.table_here.size >= table_words and self.sums_here.size >= sums


class DeviceDigester:
    """Launches of one thread on one device, in a stream of its own that goes ahead of a step's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes: list[_Lane] = []
        self._kernels: dict[tuple[object, ...], Any] = {}
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._later = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        """Of launches that wait for something: those in `stream` do not wait for them."""

    def launch(
        self,
        kernel: str,
        *,
        source: torch.Tensor,
        target: torch.Tensor,
        table: IntArray,
        weights: tuple[torch.Tensor, torch.Tensor],
        numbers: tuple[int, ...],
        stream: torch.cuda.Stream | None = None,
        passed: torch.cuda.Event | None = None,
    ) -> DeviceDigests:
        """Starts `kernel` of digest_kernels over each row of each page: a line of `table`
        ([pages, words]) says which, `weights` are its rows' and its words', `numbers` what the
        layout gives. Behind what `stream` does, or when the device has passed an event; neither:
        behind nothing, so whoever wrote the pages must have waited for that.
        """
        if passed is not None:
            stream = self._later
            stream.wait_event(passed)
        stream = stream or self.stream
        count, rows = len(table), len(weights[0])
        lane = self._lane(table.size, count * rows)
        lane.table_here[: table.size] = table.reshape(-1)
        arguments = (source, target, lane.table, lane.sums, *weights, *numbers)
        key = (kernel, numbers, source.data_ptr() % 16, target.data_ptr() % 16)
        with torch.cuda.device(self._device):
            copy_async(lane.table.data_ptr(), lane.pinned[0].data_ptr(), 8 * table.size, stream)
            compiled = self._kernels.get(key)
            if compiled is None:
                module = importlib.import_module("kvtransfer.digest_kernels")
                with torch.cuda.stream(stream):
                    compiled = getattr(module, kernel)[count, rows](
                        *arguments, num_warps=module.NUM_WARPS
                    )
                self._kernels[key] = compiled
            else:
                compiled[count, rows, 1](*arguments, stream=stream.cuda_stream)
            copy_async(lane.pinned[1].data_ptr(), lane.sums.data_ptr(), 8 * count * rows, stream)
            lane.event.record(stream)
        digests = DeviceDigests(lane, count, rows)
        lane.user = weakref.ref(digests)
        return digests

    def _lane(self, table_words: int, sums: int) -> _Lane:
        for lane in self._lanes:
            if lane.fits(table_words, sums) and lane.free:
                return lane
        table_words, sums = _rounded(table_words), _rounded(sums)
        pinned = _pinned(table_words), _pinned(sums)
        lane = _Lane(
            table_here=pinned[0].numpy(),
            table=torch.empty(table_words, dtype=torch.int64, device=self._device),
            sums_here=pinned[1].numpy(),
            sums=torch.empty(sums, dtype=torch.int64, device=self._device),
            pinned=pinned,
            event=torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )
        self._lanes.append(lane)
        return lane


def digester(device: torch.device) -> DeviceDigester:
    """This thread's for the device."""
    kept: dict[torch.device, DeviceDigester] = _threads.__dict__.setdefault("by_device", {})
    if device not in kept:
        kept[device] = DeviceDigester(device)
    return kept[device]


_threads = threading.local()


def _rounded(words: int) -> int:
    """To the next power of two, so that few lanes serve all sizes."""
    return max(_LEAST_WORDS, 1 << (words - 1).bit_length())


def _pinned(words: int) -> torch.Tensor:
    return torch.empty(words, dtype=torch.int64, pin_memory=True)

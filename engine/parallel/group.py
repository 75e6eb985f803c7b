"""The ranks that share a model, and what they say to one another in the middle of a step.

NCCL between GPUs, gloo between CPU processes. A collective that some rank never joins would wait
for ever: whoever starts the ranks ends all of them when one dies.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol
from weakref import WeakSet

import torch
from torch import distributed

START_LIMIT = timedelta(minutes=30)
"""Longest the ranks wait for one another: reading a large checkpoint takes unequal times."""


class Captured(Protocol):
    """Steps captured as CUDA graphs."""

    def release(self) -> None:
        """Waits for the device, and gives the graphs back; none is replayed any more."""
        ...


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """This process's place among the ranks. Of one rank alone, everything here does nothing."""

    rank: int = 0
    size: int = 1
    _captured: "WeakSet[Captured]" = field(default_factory=WeakSet, compare=False, repr=False)

    def replays(self, captured: "Captured") -> None:
        """Collectives of this group were captured, and are let go before it is left."""
        if self.size > 1:
            self._captured.add(captured)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place of `partial`; the same bits on every rank."""
        if self.size > 1:
            distributed.all_reduce(partial)
        return partial

    def gather_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """[n, size * k]: all ranks' `columns` [n, k], beside one another in order of rank."""
        if self.size == 1:
            return columns
        n, k = columns.shape
        gathered = columns.new_empty((self.size * n, k))
        _all_gather(gathered, columns.contiguous())
        return gathered.view(self.size, n, k).transpose(0, 1).reshape(n, self.size * k)

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Rank 0's `values`, in place of the others'."""
        if self.size > 1:
            distributed.broadcast(values, src=0)
        return values

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of all ranks' values; waits for all of them."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=device)
        distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
        return int(least.item())

    def leave(self) -> None:
        """The last call; all ranks make it.

        NCCL keeps a communicator until every graph that captured it is gone, and would wait here
        for ever for one that something still refers to.
        """
        if self.size > 1:
            for captured in list(self._captured):
                captured.release()
            distributed.destroy_process_group()


_all_gather: Callable[[torch.Tensor, torch.Tensor], object] = getattr(
    distributed, "all_gather_single", None
) or getattr(distributed, "all_gather_into_tensor")  # noqa: B009 - the name before torch 2.13

ALONE = TensorGroup()
"""The whole model in one process."""


def join_group(
    rank: int,
    size: int,
    *,
    device: torch.device,
    meeting_point: str,
    limit: timedelta = START_LIMIT,
) -> TensorGroup:
    """Waits for all ranks. `meeting_point`: path of a file that all of them reach, and that did
    not exist before the first one came. A collective that takes longer than `limit` is an error."""
    if size == 1:
        return ALONE
    on_gpu = device.type == "cuda"
    # The ranks are of one host; a host's name may lead gloo to an interface that is not there.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=distributed.FileStore(meeting_point, size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if on_gpu else None,
    )
    return TensorGroup(rank, size)

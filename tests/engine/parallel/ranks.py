"""Follower ranks as processes of a test; rank 0 is the test itself."""

import contextlib
import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.model_config import ModelConfig
from engine.parallel.commands import StepCommand
from engine.parallel.group import TensorGroup, join_group
from engine.parallel.runners import FollowingRunner, LeadingRunner

LIMIT = timedelta(seconds=50)
"""Of any collective: less than a test may take, so that it is NCCL who says what hangs."""


def load(model: Path, group: TensorGroup, device: str = "cpu", **settings: Any) -> ModelRunner:
    index = group.rank if device == "cuda" else None
    return load_model_runner(
        ModelConfig.from_directory(model),
        model_path=str(model),
        device=torch.device(device, index),
        group=group,
        **{"dtype": torch.float32, **settings},
    )


def follow(pipe: Connection, rank: int, size: int, meeting_point: str, device: str) -> None:
    """Serves one model after another until it is told None."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    where = torch.device(device, rank if device == "cuda" else None)
    group = join_group(rank, size, device=where, meeting_point=meeting_point, limit=LIMIT)
    follower: FollowingRunner | None = None
    with contextlib.suppress(EOFError):
        while (told := pipe.recv()) is not None:
            if isinstance(told, bytes) and follower is not None:
                follower.follow(StepCommand.from_bytes(told))
            else:
                model, settings = told
                follower = FollowingRunner(load(model, group, device, **settings), group)
    group.leave()


class Ranks:
    """Rank 0 in this process, the others in their own."""

    def __init__(self, size: int, meeting_point: Path, device: str = "cpu") -> None:
        self._device = device
        self._pipes: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("spawn")
        for rank in range(1, size):
            mine, theirs = multiprocessing.Pipe()
            process = context.Process(
                target=follow, args=(theirs, rank, size, str(meeting_point), device), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        where = torch.device(device, 0 if device == "cuda" else None)
        self.group = join_group(
            0, size, device=where, meeting_point=str(meeting_point), limit=LIMIT
        )

    def tell(self, command: Any) -> None:
        for pipe in self._pipes:
            pipe.send(command)

    def load(self, model: Path, **settings: Any) -> tuple[ModelRunner, LeadingRunner]:
        """This rank's runner, and the one that leads all of them."""
        self.tell((model, settings))
        runner = load(model, self.group, self._device, **settings)
        return runner, LeadingRunner(runner, self.group, self.tell)

    def close(self) -> None:
        self.tell(None)
        self.group.leave()
        for process in self._processes:
            process.join(20)
            assert process.exitcode == 0
            process.close()


@contextlib.contextmanager
def running_ranks(size: int, directory: Path, device: str = "cpu") -> Iterator[Ranks]:
    ranks = Ranks(size, directory / "meeting", device)
    yield ranks
    ranks.close()

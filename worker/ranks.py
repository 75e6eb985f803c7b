"""The other ranks of a tensor-parallel engine, as the leading one (rank 0) sees them.

Rank 0 is the worker's engine: it alone talks to the front, schedules and draws tokens. It starts
the others, one process each, and they end with it; if one of them dies, it ends itself, and with it
the worker, so that the router replays elsewhere.
"""

import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from engine.parallel.group import ALONE, TensorGroup, join_group
from worker.config import WorkerConfig
from worker.kv_traffic import KvTraffic
from worker.rank_link import Kind, RankLink

logger = logging.getLogger(__name__)

EXIT_RANK_GONE = 4

STOP_GRACE_S = 5.0
"""How long the others may take to end after they were told to, before they are killed."""


class Ranks:
    """Empty for an engine of one rank."""

    def __init__(self) -> None:
        self.links: list[RankLink] = []
        """To the others' main threads; used by the scheduler's."""
        self.transfer_links: list[RankLink] = []
        """To the others' transfer threads; used by the one here."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = ""
        self._stopping = False
        self.group: TensorGroup = ALONE

    @property
    def pids(self) -> list[int]:
        """Process ids of all ranks, this one's first."""
        return [os.getpid(), *(process.pid for process in self._processes)]

    def start(
        self, config: WorkerConfig, *, traffic: KvTraffic, instance_id: str, fds: tuple[int, int]
    ) -> None:
        """Spawns the others; they load their parts of the model while this one loads its own.
        `traffic` and `fds` (the landing window's file and the outbox's): as this rank got them."""
        size = config.tensor_parallel_size
        if size == 1:
            return
        self._directory = tempfile.mkdtemp(prefix="baton-ranks-")
        for rank in range(1, size):
            pairs = [socket.socketpair() for _ in range(2)]
            inherited = (*(theirs.fileno() for _, theirs in pairs), *fds)
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.rank_process", *map(str, inherited)],
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
            )
            for _, theirs in pairs:
                theirs.close()
            link, transfers = (RankLink(mine, on_closed=lambda: None) for mine, _ in pairs)
            start = {
                "rank": rank,
                "meeting_point": self._meeting_point,
                "traffic": traffic.name,
                "instance_id": f"{instance_id}/{rank}",
                "config": dataclasses.asdict(config),
            }
            link.send(Kind.START, json.dumps(start).encode())
            self.links.append(link)
            self.transfer_links.append(transfers)
            self._processes.append(process)
            threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True
            ).start()

    @property
    def _meeting_point(self) -> str:
        return str(Path(self._directory) / "meeting")

    def join(self, device: torch.device) -> TensorGroup:
        """Waits until all ranks are there."""
        if self._processes:
            self.group = join_group(
                0, 1 + len(self._processes), device=device, meeting_point=self._meeting_point
            )
        return self.group

    def tell(self, command: bytes) -> None:
        """A step for all of them, in order."""
        for link in self.links:
            link.send(Kind.STEP, command)

    def close(self) -> None:
        """Ends the others in order, or kills them."""
        self._stopping = True
        for link in self.links:
            link.send(Kind.STOP)
        self.group.leave()
        for process in self._processes:
            try:
                process.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link in (*self.links, *self.transfer_links):
            link.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._stopping:
            logger.error("rank %d (pid %d) ended with status %d", rank, process.pid, status)
            shutil.rmtree(self._directory, ignore_errors=True)
            # At once: the main thread may wait in a collective that nobody completes any more.
            os._exit(EXIT_RANK_GONE)

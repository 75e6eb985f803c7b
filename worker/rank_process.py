"""A process of every rank but the first: loads its part of the model and computes along.

It knows no request and no scheduler (engine/parallel/runners.py says why); it ends with the leading
rank's process, which started it.
"""

import json
import logging
import os
import signal
import socket
import sys

from engine.errors import EngineError
from engine.parallel.commands import StepCommand
from engine.parallel.group import join_group
from engine.parallel.runners import FollowingRunner
from worker.config import WorkerConfig
from worker.kv_traffic import KvTraffic
from worker.rank_link import Kind, RankLink
from worker.rank_model import load_rank_model, rank_device

EXIT_LEADER_GONE = 3


def main(arguments: list[str]) -> int:
    """The process's main function; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = RankLink(
        socket.socket(fileno=int(arguments[0])), on_closed=lambda: os._exit(EXIT_LEADER_GONE)
    )
    start = json.loads(link.receive()[1])
    config = WorkerConfig(**start["config"])
    rank, size = int(start["rank"]), config.tensor_parallel_size
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s",
    )
    try:
        device = rank_device(config, rank)
        group = join_group(rank, size, device=device, meeting_point=start["meeting_point"])
        model = load_rank_model(
            config, group=group, device=device, traffic=KvTraffic[start["traffic"]]
        )
    except EngineError as error:
        print(f"error: rank {rank} of {size}: {error}", file=sys.stderr, flush=True)
        return 1
    logging.getLogger(__name__).info("rank %d of %d computes on %s", rank, size, device)
    follower = FollowingRunner(model.runner, group)
    while True:
        kind, payload = link.receive()
        if kind is Kind.STOP:
            group.leave()
            return 0
        if kind is Kind.STEP:
            follower.follow(StepCommand.from_bytes(payload))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    # Without Python's own ending: the reader's thread would take the closed link for a death.
    os._exit(status)

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
from kvtransfer.errors import TransferError
from observability import logs
from worker.config import WorkerConfig
from worker.ending import end_process
from worker.kv_traffic import KvTraffic
from worker.rank_link import Kind, RankLink
from worker.rank_memory import following_memory
from worker.rank_model import load_rank_model, rank_device

EXIT_LEADER_GONE = 3
EXIT_TRANSFERS_STOPPED = 5


def main(arguments: list[str]) -> int:
    """The process's main function; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main_fd, transfers_fd, window_fd, outbox_fd = map(int, arguments)
    link, transfer_link = (
        RankLink(socket.socket(fileno=fd), on_closed=lambda: os._exit(EXIT_LEADER_GONE))
        for fd in (main_fd, transfers_fd)
    )
    start = json.loads(link.receive()[1])
    config = WorkerConfig(**start["config"])
    rank, size = int(start["rank"]), config.tensor_parallel_size
    traffic = KvTraffic[start["traffic"]]
    facts = {"process": f"rank {rank}"}
    logs.configure(level=config.log_level, format=config.log_format, facts=facts)
    try:
        device = rank_device(config, rank)
        group = join_group(rank, size, device=device, meeting_point=start["meeting_point"])
        model = load_rank_model(config, group=group, device=device, traffic=traffic)
        memory = following_memory(
            config,
            model,
            rank=rank,
            traffic=traffic,
            instance_id=start["instance_id"],
            fds=(window_fd, outbox_fd),
        )
    except (EngineError, TransferError) as error:
        print(f"error: rank {rank} of {size}: {error}", file=sys.stderr, flush=True)
        return 1
    logging.getLogger(__name__).info("rank %d of %d computes on %s", rank, size, device)
    follower = FollowingRunner(model.runner, group)
    memory.transfers(transfer_link).start(on_error=lambda: os._exit(EXIT_TRANSFERS_STOPPED))
    while True:
        kind, payload = link.receive()
        if kind is Kind.STOP:
            group.leave()
            return 0
        if kind is Kind.STEP:
            follower.follow(StepCommand.from_bytes(payload))
        elif kind is Kind.SEAL:
            link.send(Kind.ANSWER, memory.kv.answer_seal(payload))
        elif kind is Kind.LAND:
            link.send(Kind.ANSWER, memory.kv.answer_land(payload, memory.windows))


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

"""One request during which a worker dies, and everything that its stream said."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton import Client
from baton.messages import Report
from protos.baton.v1 import worker_pb2
from tests.e2e.cluster import Cluster
from tests.e2e.worker_status import get_status, wait_for


@dataclass
class Stream:
    """What a client got."""

    ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    report: Report | None = None


def ready(cluster: Cluster, role: str) -> list[dict[str, Any]]:
    return [w for w in cluster.workers() if w["role"] == role and w["state"] == "ready"]


def kill(worker: dict[str, Any]) -> None:
    """Front and engine at once, as when a machine is gone."""
    for pid in (*worker["engine_pids"], worker["pid"]):
        os.kill(pid, signal.SIGKILL)


def has_work(status: worker_pb2.WorkerStatus) -> bool:
    """Whether a worker has any part of a request."""
    return bool(status.running or status.waiting or status.transferring)


def run(
    cluster: Cluster,
    prompt: list[int],
    sampling: dict[str, Any],
    *,
    length: int,
    role: str = "",
    after: int = 0,
    act: Callable[[dict[str, Any]], None] = kill,
) -> Stream:
    """Runs the only request there is to its end. With a `role`, does `act` to the worker of that
    role that works on it, once `after` tokens have come.
    """
    result = Stream()
    with Client(cluster.grpc) as client:
        workers = ready(cluster, role) if role else []
        stream = client.generate(prompt, max_tokens=length, ignore_eos=True, **sampling)
        victims: list[dict[str, Any]] = []

        def at_work() -> bool:
            victims.extend(w for w in workers if has_work(get_status(w["address"])))
            return bool(victims)

        if role:
            wait_for(at_work, "somebody at work")
        if role and after == 0:
            act(victims[0])
            victims.clear()
        for chunk in stream:
            result.ids += [token.id for token in chunk.tokens]
            result.indices += [token.index for token in chunk.tokens]
            if victims and len(result.ids) >= after:
                act(victims[0])
                victims.clear()
            result.report = chunk.report or result.report
    return result


TRIES = 5
"""How often a request is asked for again whose answer was whole before its worker was killed."""


def replayed(ask: Callable[[], Stream], undisturbed: Stream) -> Report:
    """The report of a request whose worker died under it, once, and whose every token was right. On
    a busy machine an answer may be whole before it is read: then another one is asked for."""
    for _ in range(TRIES):
        result = ask()
        assert result.ids == undisturbed.ids
        assert result.indices == list(range(len(undisturbed.ids)))
        assert result.report is not None
        if result.report.replays:
            assert result.report.replays == 1
            return result.report
    raise AssertionError(f"in {TRIES} tries no worker died before its answer was whole")

"""What every process of a cluster holds, asked over gRPC and of the system."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from tests.e2e.cluster import Cluster


def statuses(cluster: Cluster) -> dict[str, worker_pb2.WorkerStatus]:
    """Each live worker's status, asked now, by instance id."""
    return {
        worker["id"]: get_status(worker["address"])
        for worker in cluster.workers()
        if worker["state"] in ("ready", "draining")
    }


class Probe:
    """Asks the only prefill and the only decode worker of a cluster for their status. Its channels
    stay open: a test that waits for a phase asks hundreds of times.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.transport = cluster.worker("prefill")["transports"][0]
        self._channels = {w["role"]: grpc.insecure_channel(w["address"]) for w in cluster.workers()}

    def prefill(self) -> worker_pb2.WorkerStatus:
        return _ask(self._channels["prefill"])

    def decode(self) -> worker_pb2.WorkerStatus:
        return _ask(self._channels["decode"])

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


_channels: dict[str, grpc.Channel] = {}


def get_status(address: str) -> worker_pb2.WorkerStatus:
    """One worker's status, asked now. Its channel stays open: on a busy machine a phase that a test
    waits for may be over before new ones to all workers are.
    """
    known = _channels.get(address)
    if known is not None:
        try:
            return _ask(known)
        except grpc.RpcError:
            # Of a worker that is gone; another one may be at its address.
            del _channels[address]
            known.close()
    channel = _channels[address] = grpc.insecure_channel(address)
    return _ask(channel)


def _ask(channel: grpc.Channel) -> worker_pb2.WorkerStatus:
    stub = worker_pb2_grpc.WorkerStub(channel)
    answer: worker_pb2.WorkerStatus = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=5.0)
    return answer


def owned(status: worker_pb2.WorkerStatus) -> dict[str, int]:
    """What a worker holds for requests; all zero while it is idle."""
    return {
        "pages in use": status.pages.in_use,
        "pages held": status.pages.held,
        "running": status.running,
        "waiting": status.waiting,
        "transferring": status.transferring,
        "rows": status.rows_total - status.rows_free,
        "slots": status.slots_total - status.slots_free,
        "queued tokens": status.queued_tokens,
    }


def leftovers(cluster: Cluster) -> list[str]:
    """What is owned, by worker; empty while nothing is."""
    return [
        f"{worker}: {count} {what}"
        for worker, status in statuses(cluster).items()
        for what, count in owned(status).items()
        if count
    ]


def wait_until_free(cluster: Cluster, *, within_s: float) -> float:
    """Waits until no worker owns anything for a request; how long it took, in seconds."""
    started = time.monotonic()
    while True:
        left = leftovers(cluster)
        took_s = time.monotonic() - started
        if not left:
            return took_s
        assert took_s < within_s, f"after {took_s:.2f} s there is still: {left}"
        time.sleep(0.01)


def wait_for(condition: Callable[[], Any], what: str, *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about within {within_s} s"
        time.sleep(0.01)


@dataclass(frozen=True)
class Footprint:
    """What one process costs the system."""

    name: str
    files: int
    threads: int
    memory_bytes: int


def footprints(cluster: Cluster) -> dict[int, Footprint]:
    """Of every process of the cluster, by process id."""
    return {process.pid: _footprint(process) for process in _processes(cluster)}


def _processes(cluster: Cluster) -> Iterator[psutil.Process]:
    yield from cluster.processes()


def _footprint(process: psutil.Process) -> Footprint:
    with process.oneshot():
        name = " ".join(process.cmdline()[1:4])
        return Footprint(name, process.num_fds(), process.num_threads(), process.memory_info().rss)

"""`baton drain`: takes one worker out of service without losing a request."""

import sys
import time
from dataclasses import dataclass

import grpc

from baton.client import Client
from baton.client_access import ClientAccess
from baton.config import Scalar, fill
from baton.connection import ConnectionConfig, config_for
from baton.errors import error_from_call
from protos.baton.v1 import worker_pb2, worker_pb2_grpc

POLL_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    """How to drain a worker."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server; where workers have a door of their own
    (workers_port), of that one, which alone takes such orders."""

    drain_timeout_s: float = 0.0
    """After this the worker hands over what still runs: it is replayed elsewhere. 0: the worker's
    own setting. Seconds."""

    now: bool = False
    """Hand over at once what runs, instead of letting it finish."""

    wait: bool = True
    """Return when the worker has left; without it, when it has begun."""

    timeout_s: float = 10.0
    """Longest one call of the router may take. Seconds."""

    def __post_init__(self) -> None:
        if not self.drain_timeout_s >= 0:
            raise ValueError(f"drain_timeout_s must not be negative, not {self.drain_timeout_s}")
        if self.now and self.drain_timeout_s:
            raise ValueError("now leaves no time: give either now or drain_timeout_s")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s}")


def run_drain(given: dict[str, Scalar]) -> int:
    """Tells a worker to drain, and waits until it has left.

    Raises:
        RequestError: no such worker, or the router is out of reach.
    """
    config, access = fill(DrainConfig, given), fill(ClientAccess, given)
    connection = config_for(config.router, access.connection(config.router))
    instance_id = _order(config, connection, str(given["worker"]))
    _say(f"{instance_id} drains: it takes no new requests")
    if config.wait:
        with Client(config.router, config=connection) as client:
            _wait_until_gone(client, instance_id, timeout_s=config.timeout_s)
        _say(f"{instance_id} has left")
    return 0


def _order(config: DrainConfig, connection: ConnectionConfig, worker: str) -> str:
    """Sends the order; the worker's instance id."""
    request = worker_pb2.DrainWorkerRequest(worker=worker, drain=_terms(config))
    with connection.open(config.router) as channel:
        try:
            answer = worker_pb2_grpc.RegistryStub(channel).DrainWorker(
                request, timeout=config.timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from None
    return str(answer.instance_id)


def _terms(config: DrainConfig) -> worker_pb2.DrainRequest:
    if config.now:
        return worker_pb2.DrainRequest(timeout_s=0.0)
    if config.drain_timeout_s:
        return worker_pb2.DrainRequest(timeout_s=config.drain_timeout_s)
    return worker_pb2.DrainRequest()


def _wait_until_gone(client: Client, instance_id: str, *, timeout_s: float) -> None:
    told = -1
    while True:
        info = client.server_info(timeout=timeout_s)
        worker = next((w for w in info.workers if w.id == instance_id), None)
        if worker is None or worker.state == "lost":
            return
        if worker.running + worker.waiting != told:
            told = worker.running + worker.waiting
            _say(f"{instance_id}: {worker.running} running, {worker.waiting} waiting")
        time.sleep(POLL_S)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

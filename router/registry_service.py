"""The registry's gRPC door: workers register, send heartbeats and leave here, and operators tell
them to."""

from collections.abc import Callable
from typing import Any

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.errors import BatonError
from router.fleet import Fleet

SERVICE_NAME = "baton.v1.Registry"


class RegistryService(worker_pb2_grpc.RegistryServicer):
    """Translates; the rules are the registry's."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        heartbeat_interval_s: float,
        max_workers: int,
        on_refused: Callable[[str], None],
    ) -> None:
        """`max_workers`: most that are listed; `on_refused` is told why one is not used."""
        self._max_workers = max_workers
        self._on_refused = on_refused
        self._fleet = fleet
        self._registry = fleet.registry
        self._heartbeat_interval_s = heartbeat_interval_s

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.RegisterResponse:
        problem = too_long(request)
        if problem:
            self._on_refused("malformed")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        known = self._registry.members.get(request.instance_id) is not None
        if not known and len(list(self._registry.workers())) >= self._max_workers:
            self._on_refused("full")
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._max_workers} workers are listed, the router's limit (max_workers)",
            )
        reason = await self._registry.register(request)
        if reason:
            self._on_refused(_kind(reason))
        return worker_pb2.RegisterResponse(
            accepted=not reason, reason=reason, heartbeat_interval_s=self._heartbeat_interval_s
        )

    async def Heartbeat(
        self, request: worker_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.HeartbeatResponse:
        known = await self._registry.heartbeat(request.instance_id, request.status)
        return worker_pb2.HeartbeatResponse(known=known)

    async def Deregister(
        self, request: worker_pb2.DeregisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DeregisterResponse:
        await self._registry.remove(request.instance_id, reason="it said so")
        return worker_pb2.DeregisterResponse()

    async def DrainWorker(
        self, request: worker_pb2.DrainWorkerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainWorkerResponse:
        drain = request.drain
        timeout_s = drain.timeout_s if drain.HasField("timeout_s") else None
        try:
            instance_id = await self._fleet.drain(request.worker, timeout_s=timeout_s)
        except BatonError as error:
            await context.abort(grpc.StatusCode[error.code.value], error.message)
            raise
        return worker_pb2.DrainWorkerResponse(instance_id=instance_id)

    async def ProbeLink(
        self, request: worker_pb2.ProbeLinkRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ProbeReport:
        try:
            return await self._fleet.probe(request.prefill, request.decode, request.probe)
        except BatonError as error:
            await context.abort(grpc.StatusCode[error.code.value], error.message)
            raise


MAX_NAME_CHARACTERS = 256
MAX_PATH_CHARACTERS = 4096
MAX_LISTED = 256
"""Most entries of a registration's lists."""


def too_long(request: worker_pb2.RegisterRequest) -> str:
    """What of a registration is longer than anything real; empty: nothing."""
    limits = {
        "instance_id": (request.instance_id, MAX_NAME_CHARACTERS),
        "address": (request.address, MAX_NAME_CHARACTERS),
        "fingerprint": (request.fingerprint, MAX_NAME_CHARACTERS),
        "model.name": (request.model.name, MAX_PATH_CHARACTERS),
        "model.path": (request.model.path, MAX_PATH_CHARACTERS),
        "engine_pids": (request.engine_pids, MAX_LISTED),
        "transports": (request.transports, MAX_LISTED),
        "model.eos_token_ids": (request.model.eos_token_ids, MAX_LISTED),
    }
    for name, (value, limit) in limits.items():
        if len(value) > limit:
            return f"{name} has a length of {len(value)}; at most {limit} is taken"
    return ""


def _kind(reason: str) -> str:
    """A label for a reason, of which there must be few."""
    for kind, sign in (
        ("protocol", "protocol version"),
        ("fingerprint", "fingerprint"),
        ("replaced", "started later"),
    ):
        if sign in reason:
            return kind
    return "other"

"""The registry's gRPC door: workers register, send heartbeats and leave here, and operators tell
them to."""

from typing import Any

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.errors import BatonError
from router.fleet import Fleet

SERVICE_NAME = "baton.v1.Registry"


class RegistryService(worker_pb2_grpc.RegistryServicer):
    """Translates; the rules are the registry's."""

    def __init__(self, fleet: Fleet, *, heartbeat_interval_s: float) -> None:
        self._fleet = fleet
        self._registry = fleet.registry
        self._heartbeat_interval_s = heartbeat_interval_s

    async def Register(
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.RegisterResponse:
        reason = await self._registry.register(request)
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

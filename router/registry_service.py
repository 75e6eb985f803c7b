"""The registry's gRPC door: workers register, send heartbeats and leave here."""

from typing import Any

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from router.registry import WorkerRegistry

SERVICE_NAME = "baton.v1.Registry"


class RegistryService(worker_pb2_grpc.RegistryServicer):
    """Translates; the rules are the registry's."""

    def __init__(self, registry: WorkerRegistry, *, heartbeat_interval_s: float) -> None:
        self._registry = registry
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

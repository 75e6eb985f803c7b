"""The unified role's part of the front: nothing but names, as its worker has no peers."""

import grpc

from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from worker.front import WorkerFront


class UnifiedFront:
    """`FrontRole` of a unified worker."""

    engine_module = "unified_service.engine"
    role = inference_pb2.WORKER_ROLE_UNIFIED
    takes = "generate"

    def attach(self, front: WorkerFront, server: grpc.aio.Server) -> list[str]:
        return []

    def on_peers(self, peers: worker_pb2.PeerUpdate) -> None:
        """No KV comes from or goes to anybody."""

    def on_engine_message(self, message: channel_pb2.EngineToFront) -> None:
        """Its engine sends none of a transfer's messages."""

    async def close(self) -> None:
        """There is no session to end."""

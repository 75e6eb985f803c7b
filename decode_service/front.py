"""The decode role's part of the front: serves KV sessions, and puts the pages that come by gRPC
into the landing window's shared memory.
"""

import grpc

from kvtransfer.grpc_session import KvServicer
from kvtransfer.grpc_stream import SlotMemory
from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from worker.front import WorkerFront
from worker.kv_front import KvFront, write_order

SERVICE_NAME = "baton.v1.Kv"


class DecodeFront:
    """`FrontRole` of a decode worker."""

    engine_module = "decode_service.engine"
    role = inference_pb2.WORKER_ROLE_DECODE
    takes = "reserve"

    def attach(self, front: WorkerFront, server: grpc.aio.Server) -> list[str]:
        self._kv = KvFront(front)
        ready = front.ready
        view = front.engine.window_view(ready.slots * ready.slot_bytes)
        window = SlotMemory(view, ready.slot_bytes) if view is not None else None
        self._servicer = KvServicer(
            info=front.connect_info,
            handler=self._kv,
            window=window,
            refused=lambda error: front.refusals.peer(error.cause),
        )
        self._servicer.add_to(server)
        return [SERVICE_NAME]

    def on_peers(self, peers: worker_pb2.PeerUpdate) -> None:
        """Prefill workers dial; nothing to do here."""

    def on_engine_message(self, message: channel_pb2.EngineToFront) -> None:
        kind = message.WhichOneof("kind")
        if kind == "kv":
            self._servicer.send_message(message.kv.peer, message.kv.message)
        elif kind == "kv_write":
            self._servicer.submit(write_order(message.kv_write))
        elif kind == "peer_attached":
            attached = message.peer_attached
            if not attached.ok:
                self._servicer.close_peer(attached.instance_id, attached.reason)
            self._kv.attached(attached)

    async def close(self) -> None:
        self._servicer.close()
        self._kv.close()

"""The prefill role's part of the front: dials every decode worker and keeps a KV session to it."""

import asyncio
import contextlib

import grpc

from kvtransfer.grpc_session import KvSessionClient, PeerRefused
from kvtransfer.grpc_stream import SlotMemory
from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from worker.front import WorkerFront
from worker.kv_front import KvFront, write_order


class PrefillFront:
    """`FrontRole` of a prefill worker."""

    engine_module = "prefill_service.engine"
    role = inference_pb2.WORKER_ROLE_PREFILL
    takes = "prefill"

    def __init__(self) -> None:
        self._clients: dict[str, KvSessionClient] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def attach(self, front: WorkerFront, server: grpc.aio.Server) -> list[str]:
        self._front = front
        self._kv = KvFront(front)
        ready = front.ready
        view = front.engine.outbox_view(ready.outbox_slots * ready.slot_bytes)
        self._outbox = SlotMemory(view, ready.slot_bytes) if view is not None else None
        return []

    def on_peers(self, peers: worker_pb2.PeerUpdate) -> None:
        wanted = {peer.instance_id: peer.address for peer in peers.peers}
        for instance in self._clients.keys() - wanted.keys():
            self._drop(instance)
        for instance in wanted.keys() - self._clients.keys():
            self._dial(instance, wanted[instance])

    def _dial(self, instance: str, address: str) -> None:
        def refused(error: PeerRefused) -> None:
            self._front.refusals.peer(error.cause)
            state = worker_pb2.PeerState(instance_id=instance, connected=False, reason=str(error))
            self._front.report_peer(state, remember=True)

        client = KvSessionClient(
            address=address,
            info=self._front.connect_info(),
            handler=self._kv,
            outbox=self._outbox,
            transport=self._front.config.transport,
            refused=refused,
            tls=self._front.config,
        )
        self._clients[instance] = client
        self._tasks[instance] = asyncio.create_task(client.run(), name=f"kv session {instance}")

    def _drop(self, instance: str) -> None:
        self._clients.pop(instance).close()
        self._tasks.pop(instance)
        self._front.forget_peer(instance)

    def on_engine_message(self, message: channel_pb2.EngineToFront) -> None:
        kind = message.WhichOneof("kind")
        if kind == "kv":
            client = self._client(message.kv.peer)
            if client is not None:
                client.send_message(message.kv.message)
        elif kind == "kv_write":
            self._submit(message.kv_write)
        elif kind == "peer_attached":
            self._attached(message.peer_attached)

    def _client(self, peer: str) -> KvSessionClient | None:
        client = self._clients.get(peer)
        return client if client is not None and client.peer == peer else None

    def _submit(self, order: channel_pb2.KvWrite) -> None:
        client = self._client(order.peer)
        if client is None:
            self._kv.write_done(order.write_id, order.peer, f"no session with {order.peer}")
        else:
            client.submit(write_order(order))

    def _attached(self, attached: channel_pb2.PeerAttached) -> None:
        client = self._client(attached.instance_id)
        if client is None:
            return
        if not attached.ok:
            client.retry_without(self._kv.transport_of(attached.instance_id), attached.reason)
        self._kv.attached(attached)

    async def close(self) -> None:
        for client in self._clients.values():
            client.close()
        for task in self._tasks.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._kv.close()

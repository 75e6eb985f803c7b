"""Two workers in one process: agents with their transfer threads, fronts on real sockets."""

import asyncio
from collections.abc import Callable

import grpc
import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.digest import copy_and_digest, digest_pages, seals_of
from kvtransfer.events import KvEvent, PagesLanded
from kvtransfer.grpc_session import KvServicer, KvSessionClient, connect_info
from kvtransfer.grpc_stream import SessionTiming, SlotMemory
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.orders import WriteOrder
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.window import LandingWindow
from protos.baton.v1 import kv_pb2

LAYOUT = PageLayout(layers=10, page_size=16, kv_heads=2, head_dim=64, itemsize=4)
"""Pages of 160 KiB."""
TIMING = SessionTiming(heartbeat_s=0.05, silence_s=0.6, handshake_s=2.0, redial_s=0.05)


class Front:
    """A SessionHandler that records, and passes on to an agent where it has one."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.connected: list[tuple[str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.messages: list[bytes] = []
        self.written: list[tuple[int, str]] = []
        self.agent: TransferAgent | None = None
        self.transport: GrpcTransport | None = None

    def peer_connected(self, info: kv_pb2.ConnectInfo, transport: str) -> None:
        self.connected.append((info.instance_id, transport))
        if self.agent is not None:
            self.agent.peer_connected(info.instance_id, transport, b"")

    def peer_lost(self, peer: str, reason: str) -> None:
        self.lost.append((peer, reason))
        if self.agent is not None:
            self.agent.peer_gone(peer, reason, proven_dead=False)

    def message(self, peer: str, data: bytes) -> None:
        self.messages.append(data)
        if self.transport is not None:
            self.transport.on_message(peer, data)

    def write_done(self, write_id: int, peer: str, error: str) -> None:
        self.written.append((write_id, error))
        if self.transport is not None:
            self.transport.on_write_done(write_id, error)

    def from_engine(self, call: Callable[..., None], *arguments: object) -> None:
        self.loop.call_soon_threadsafe(call, *arguments)


def info(instance: str, fingerprint: str = "f") -> kv_pb2.ConnectInfo:
    return connect_info(instance_id=instance, fingerprint=fingerprint, offers=[("grpc", b"")])


class Server:
    """decode's front on a real socket."""

    def __init__(
        self,
        front: Front,
        *,
        window: SlotMemory | None,
        fingerprint: str = "f",
        offers: kv_pb2.ConnectInfo | None = None,
        timing: SessionTiming = TIMING,
    ) -> None:
        mine = offers or info("d", fingerprint)
        self.servicer = KvServicer(info=lambda: mine, handler=front, window=window, timing=timing)
        self.server = grpc.aio.server()
        self.servicer.add_to(self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        self.servicer.close()
        await self.server.stop(0)


class Workers:
    """Prefill and decode, complete but for the engine."""

    def __init__(self, *, pages: int = 24, slots: int = 8, outbox_slots: int = 3) -> None:
        size = LAYOUT.page_bytes
        self.source = torch.randint(0, 256, (pages, size), dtype=torch.uint8)
        self.target = torch.zeros((pages, size), dtype=torch.uint8)
        self.outbox_memory = SharedMemory.create(outbox_slots * size)
        self.window_memory = SharedMemory.create(slots * size)
        outbox = self.outbox_memory.tensor(outbox_slots, size)
        landing = self.window_memory.tensor(slots, size)
        self.window = LandingWindow(landing)
        self.prefill_front, self.decode_front = Front(), Front()
        self.server = Server(self.decode_front, window=SlotMemory(self.window_memory.view, size))
        self.client = KvSessionClient(
            address=self.server.address,
            info=info("p"),
            handler=self.prefill_front,
            outbox=SlotMemory(self.outbox_memory.view, size),
            timing=TIMING,
        )
        prefill = GrpcTransport(
            pool=self.source,
            outbox=outbox,
            landing=None,
            submit=lambda order: self.prefill_front.from_engine(self.client.submit, order),
            send=lambda _, data: self.prefill_front.from_engine(self.client.send_message, data),
        )
        servicer = self.server.servicer
        decode = GrpcTransport(
            pool=None,
            outbox=None,
            landing=landing,
            submit=lambda order: self.decode_front.from_engine(servicer.submit, order),
            send=lambda peer, data: self.decode_front.from_engine(
                servicer.send_message, peer, data
            ),
        )
        self.prefill = TransferAgent(
            instance_id="p",
            layout=LAYOUT,
            transports={"grpc": prefill},
            pool=self.source,
            window=None,
            lease_s=3,
        )
        self.decode = TransferAgent(
            instance_id="d",
            layout=LAYOUT,
            transports={"grpc": decode},
            pool=None,
            window=self.window,
            lease_s=3,
        )
        self.prefill_front.agent, self.prefill_front.transport = self.prefill, prefill
        self.decode_front.agent, self.decode_front.transport = self.decode, decode

    async def __aenter__(self) -> "Workers":
        await self.server.server.start()
        self.prefill.start()
        self.decode.start()
        self.dialling = asyncio.create_task(self.client.run())
        await until(lambda: self.decode.stats().peers == 1 and self.prefill.stats().peers == 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        await self.dialling
        await self.server.stop()
        self.prefill.close()
        self.decode.close()
        self.outbox_memory.close()
        self.window_memory.close()

    def hand_over(self, request: str, tokens: int) -> None:
        self.prefill.open(self.grant(request, tokens))
        self.push(request, tokens)

    def grant(self, request: str, tokens: int) -> Ticket:
        return self.decode.grant(
            request_id=request,
            writer="p",
            total_pages=LAYOUT.pages_of(tokens),
            total_tokens=tokens,
            prefix_len=0,
            token_hash=b"",
        )

    def push(self, request: str, tokens: int) -> None:
        """All pages, and the first token."""
        pages = LAYOUT.pages_of(tokens)
        valid = [LAYOUT.valid_tokens(i, tokens) for i in range(pages)]
        seals = seals_of(digest_pages(self.source, list(range(pages)), valid, LAYOUT))
        self.prefill.push(
            request,
            [
                SourcePage(page=i, position=i, valid_tokens=valid[i], seal=seals[i])
                for i in range(pages)
            ],
        )
        self.prefill.complete(request, 3)

    def verify(self) -> list[KvEvent]:
        """Decode's role, once."""
        events = self.decode.poll_events()
        for event in events:
            if isinstance(event, PagesLanded):
                positions = [page.position for page in event.pages]
                digests = copy_and_digest(
                    event.window,
                    [page.slot for page in event.pages],
                    self.target,
                    positions,
                    [page.valid_tokens for page in event.pages],
                    LAYOUT,
                )
                if seals_of(digests) == [page.seal for page in event.pages]:
                    self.decode.accept(event.request_id, positions)
                else:
                    self.decode.reject(event.request_id, "digest")
        return events


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def order(write_id: int, *copies: tuple[int, int], peer: str = "d") -> WriteOrder:
    return WriteOrder(write_id=write_id, peer=peer, copies=copies, message=b"landed")

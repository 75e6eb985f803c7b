"""The two sides that `kv_handover.py` times: transfer agents without a model, in two processes."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch

from engine.memory.kv_pool import zeros_when_touched
from kvtransfer.agent import TransferAgent
from kvtransfer.cuda_ipc_transport import CudaIpcTransport
from kvtransfer.cuda_memory import allocate_window
from kvtransfer.digest import copy_and_digest, digest_pages, seals_of
from kvtransfer.events import (
    KvEvent,
    PagesLanded,
    PeerAttached,
    SourceReleased,
    TransferCompleted,
    TransferFailedEvent,
    WriterFinished,
)
from kvtransfer.grpc_session import KvServicer, KvSessionClient, connect_info
from kvtransfer.grpc_stream import SlotMemory
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.transport import Transport
from kvtransfer.window import LandingWindow
from protos.baton.v1 import kv_pb2
from worker.engine_process import let_threads_alternate
from worker.rank_model import MAX_WINDOW_TOKENS

WINDOW_BYTES = 4 << 30
OUTBOX_SLOTS = 16
LEASE_S = 30.0


@dataclass(frozen=True)
class Memory:
    """The KV of an 8B Llama in bf16."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    page_sizes: tuple[int, ...] = (64, 16)

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.itemsize


MEMORY = Memory()


def layout_of(page_size: int) -> PageLayout:
    return PageLayout(
        layers=MEMORY.layers,
        page_size=page_size,
        kv_heads=MEMORY.kv_heads,
        head_dim=MEMORY.head_dim,
        itemsize=MEMORY.itemsize,
    )


def random_memory(size: int, device: torch.device) -> torch.Tensor:
    """Random bytes, since zeros flatter; on a CPU where a pool has them."""
    if device.type == "cpu":
        words = zeros_when_touched((size // 8,), torch.int64)
    else:
        words = torch.empty(size // 8, dtype=torch.int64, device=device)
    words.random_(generator=torch.Generator(device).manual_seed(1))
    return words.view(torch.uint8)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Run:
    """Seconds of one handover; the host's clock is the same in both processes."""

    seal_s: float
    wire_s: float
    """From the first push until the last page had landed."""
    total_s: float
    """From the first push until the last page was copied out and checked."""
    marks: tuple[tuple[str, float], ...] = ()
    """What happened to its runs of pages, in seconds since the first push."""


class Marks:
    """Moments of one side, on the host's clock: `Trace` of an agent, and of whoever drives it."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, float]] = []

    def __call__(self, request_id: str, event: str) -> None:
        self.add(event)

    def add(self, event: str) -> None:
        self._marks.append((event, time.monotonic()))

    def take(self) -> list[tuple[str, float]]:
        taken, self._marks = self._marks, []
        return taken


@dataclass
class Side:
    """An agent and what it stands on."""

    agent: TransferAgent
    transport: Transport
    ready: threading.Event
    marks: Marks
    close: list[Callable[[], object]] = field(default_factory=list)

    def events(self) -> list[KvEvent]:
        """Sleeps until there are some, as an engine with nothing to do does."""
        while True:
            self.ready.clear()
            events = self.agent.poll_events()
            if events:
                return events
            self.ready.wait(1.0)

    def attached(self) -> None:
        for event in self.events():
            if isinstance(event, PeerAttached):
                if not event.ok:
                    raise SystemExit(event.reason)
                return

    def end(self) -> None:
        for close in self.close:
            close()
        self.agent.close()


class Front:
    """What a worker's front does for gRPC, on a thread of its own."""

    def __init__(self) -> None:
        self.transport: GrpcTransport | None = None
        self.loop = asyncio.new_event_loop()
        self.connected = threading.Event()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def peer_connected(self, info: kv_pb2.ConnectInfo, transport: str) -> None:
        self.connected.set()

    def peer_lost(self, peer: str, reason: str) -> None:
        pass

    def message(self, peer: str, data: bytes) -> None:
        if self.transport is not None:
            self.transport.on_message(peer, data)

    def write_done(self, write_id: int, peer: str, error: str) -> None:
        if self.transport is not None:
            self.transport.on_write_done(write_id, error)

    def call(self, work: Callable[..., object], *arguments: object) -> None:
        self.loop.call_soon_threadsafe(work, *arguments)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


def make_side(
    transport: Transport,
    *,
    name: str,
    page: int,
    pool: torch.Tensor | None,
    window: torch.Tensor | None,
) -> Side:
    ready, marks = threading.Event(), Marks()
    agent = TransferAgent(
        instance_id="writer" if window is None else "reader",
        layout=layout_of(page),
        transports={transport.name: transport},
        pool=pool,
        window=None if window is None else LandingWindow(window),
        verify=not name.endswith("plain"),
        lease_s=LEASE_S,
        wake=ready.set,
        trace=marks,
    )
    agent.start()
    return Side(agent, transport, ready, marks)


class Reader:
    """Decode's side: grants, copies out, checks."""

    def __init__(self, pipe: Connection, device: torch.device, tokens: int) -> None:
        let_threads_alternate()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        self._pipe, self._device = pipe, device
        size = min(WINDOW_BYTES, 4 * tokens * MEMORY.token_bytes)
        self._shared: SharedMemory | None = None
        if device.type == "cuda":
            self._window = allocate_window(1, size, device).view(-1)
        else:
            self._shared = SharedMemory.create(size)
            self._window = self._shared.tensor(1, size).view(-1)
            self._window.zero_()  # committed now, not under a write
        self._pool = random_memory(tokens * MEMORY.token_bytes, device)

    def serve(self) -> None:
        side: Side | None = None
        raw: tuple[NixlTransport, str] | None = None
        name, page = "", 0
        while True:
            while raw is not None and not self._pipe.poll():
                raw[0].poll()
            command, *arguments = self._pipe.recv()
            if command == "open":
                name, page = arguments
                side = self._open(name, page)
            elif command == "connect" and side is not None:
                side.agent.peer_connected("writer", side.transport.name, arguments[0])
                side.attached()
                self._pipe.send("attached")
            elif command == "grant" and side is not None:
                self._pipe.send(self._receive(side, name, page, *arguments))
            elif command == "close" and side is not None:
                side.end()
                self._pipe.send("closed")
            elif command == "raw":
                block = arguments[0]
                count = min(self._window.numel() // block, 65_536)
                landing = self._window[: count * block].view(count, block)
                raw = (NixlTransport(instance_id="raw-reader", pool=None, landing=landing), "")
                self._pipe.send(raw[0].local_offer())
                raw[0].connect("raw-writer", self._pipe.recv())
            elif command == "end_raw" and raw is not None:
                raw[0].close()
                raw = None
            elif command == "end":
                return

    def _open(self, name: str, page: int) -> Side:
        layout = layout_of(page)
        slots = min(MAX_WINDOW_TOKENS // page, self._window.numel() // layout.page_bytes)
        window = self._window[: slots * layout.page_bytes].view(slots, layout.page_bytes)
        kind = name.split()[0]
        port, closing = 0, []
        if kind == "grpc" and self._shared is not None:
            front = Front()
            servicer = KvServicer(
                info=lambda: connect_info(
                    instance_id="reader", fingerprint="f", offers=[("grpc", b"")]
                ),
                handler=front,
                window=SlotMemory(self._shared.view, layout.page_bytes),
            )

            async def start() -> tuple[grpc.aio.Server, int]:
                server = grpc.aio.server()
                servicer.add_to(server)
                bound = server.add_insecure_port("127.0.0.1:0")
                await server.start()
                return server, bound

            server, port = front.run(start())
            transport: Transport = GrpcTransport(
                pool=None,
                outbox=None,
                landing=window,
                submit=lambda order: front.call(servicer.submit, order),
                send=lambda peer, data: front.call(servicer.send_message, peer, data),
            )
            front.transport = transport  # type: ignore[assignment]
            closing = [lambda: front.call(servicer.close), lambda: front.run(server.stop(0))]
        elif kind == "cuda_ipc":
            transport = CudaIpcTransport(layout=layout, pool=None, landing=window)
        else:
            transport = NixlTransport(instance_id="reader", pool=None, landing=window)
        side = make_side(transport, name=name, page=page, pool=None, window=window)
        side.close += closing
        self._pipe.send((side.agent.local_offers()[kind], port))
        return side

    def _receive(
        self, side: Side, name: str, page: int, request: str, tokens: int
    ) -> tuple[float, float, list[tuple[str, float]]]:
        """When the last page had landed, when it was checked, and all marks; the host's clock."""
        layout = layout_of(page)
        count = layout.pages_of(tokens)
        pool = self._pool.view(-1, layout.page_bytes)
        ticket = side.agent.grant(
            request_id=request,
            writer="writer",
            total_pages=count,
            total_tokens=tokens,
            prefix_len=0,
            token_hash=b"",
        )
        self._pipe.send(ticket)
        checked = landed_at = checked_at = 0.0
        finished = completed = False
        while not completed or not finished or checked < count:
            for event in side.events():
                if isinstance(event, PagesLanded):
                    landed_at = time.monotonic()
                    side.marks.add("arrived")
                    positions = [p.position for p in event.pages]
                    if not name.endswith("plain"):
                        self._check(event, pool, positions, layout)
                    side.marks.add("checked")
                    side.agent.accept(request, positions)
                    checked += len(positions)
                    checked_at = time.monotonic()
                elif isinstance(event, WriterFinished):
                    finished = True
                elif isinstance(event, TransferCompleted):
                    completed = True
                elif isinstance(event, TransferFailedEvent):
                    raise SystemExit(event.detail)
        return landed_at, checked_at, side.marks.take()

    @staticmethod
    def _check(
        event: PagesLanded, pool: torch.Tensor, positions: list[int], layout: PageLayout
    ) -> None:
        slots = [p.slot for p in event.pages]
        valid = [p.valid_tokens for p in event.pages]
        digests = copy_and_digest(event.window, slots, pool, positions, valid, layout)
        if seals_of(digests) != [p.seal for p in event.pages]:
            raise SystemExit("a page is not what was sealed")


class Writer:
    """Prefill's side: seals, pushes, measures."""

    def __init__(self, pipe: Connection, memory: torch.Tensor) -> None:
        let_threads_alternate()
        if memory.device.type == "cpu":
            torch.set_num_threads(1)
        self._pipe, self._memory = pipe, memory
        self._open: tuple[str, int] | None = None
        self._side: Side | None = None
        self._raw: NixlTransport | None = None
        self._requests = 0

    def hand_over(self, name: str, page: int, tokens: int) -> Run:
        side = self._side_for(name, page)
        layout = layout_of(page)
        pool = self._memory.view(-1, layout.page_bytes)
        count = layout.pages_of(tokens)
        indices = list(range(count))
        valid = [layout.valid_tokens(i, tokens) for i in indices]
        self._requests += 1
        request = f"r{self._requests}"
        self._pipe.send(("grant", request, tokens))
        ticket: Ticket = self._pipe.recv()
        side.agent.open(ticket)
        begin = time.monotonic()
        if name.endswith("plain"):
            seals = [b"\0" * 8] * count
        else:
            seals = seals_of(digest_pages(pool, indices, valid, layout))
        sealed = [
            SourcePage(page=i, position=i, valid_tokens=valid[i], seal=seals[i]) for i in indices
        ]
        side.marks.take()
        pushed = time.monotonic()
        side.agent.push(request, sealed, first_token=1)
        side.marks.add("pushed")
        released = False
        while not released:
            for event in side.events():
                if isinstance(event, TransferFailedEvent):
                    raise SystemExit(event.detail)
                released = released or isinstance(event, SourceReleased)
        side.marks.add("released")
        landed_at, checked_at, marks = self._pipe.recv()
        marks = tuple((event, at - pushed) for event, at in side.marks.take() + marks)
        return Run(pushed - begin, landed_at - pushed, checked_at - pushed, marks)

    def _side_for(self, name: str, page: int) -> Side:
        if self._open == (name, page) and self._side is not None:
            return self._side
        self._close_side()
        self._pipe.send(("open", name, page))
        offer, port = self._pipe.recv()
        layout, kind, closing = layout_of(page), name.split()[0], []
        pool = self._memory.view(-1, layout.page_bytes)
        front: Front | None = None
        transport: Transport
        if kind == "grpc":
            front = Front()
            shared = SharedMemory.create(OUTBOX_SLOTS * layout.page_bytes)
            client = KvSessionClient(
                address=f"127.0.0.1:{port}",
                info=connect_info(instance_id="writer", fingerprint="f", offers=[("grpc", b"")]),
                handler=front,
                outbox=SlotMemory(shared.view, layout.page_bytes),
            )
            transport = GrpcTransport(
                pool=pool,
                outbox=shared.tensor(OUTBOX_SLOTS, layout.page_bytes),
                landing=None,
                submit=lambda order: front.call(client.submit, order),
                send=lambda _, data: front.call(client.send_message, data),
            )
            front.transport = transport
            running = asyncio.run_coroutine_threadsafe(client.run(), front.loop)
            closing = [lambda: front.call(client.close), lambda: running.result(30)]
            front.connected.wait(30)
        elif kind == "cuda_ipc":
            transport = CudaIpcTransport(layout=layout, pool=pool, landing=None)
        else:
            transport = NixlTransport(instance_id="writer", pool=pool, landing=None)
        side = make_side(transport, name=name, page=page, pool=pool, window=None)
        side.close += closing
        side.agent.peer_connected("reader", transport.name, offer)
        side.attached()
        self._pipe.send(("connect", side.agent.local_offers()[kind]))
        self._pipe.recv()
        self._open, self._side = (name, page), side
        return side

    def _close_side(self) -> None:
        if self._side is not None:
            self._pipe.send(("close",))
            self._side.end()
            self._pipe.recv()
            self._side = None

    def raw_nixl(self, block: int) -> tuple[NixlTransport, str]:
        """NIXL alone, over blocks of that size on both sides, and its peer's name."""
        self._close_side()
        self._pipe.send(("raw", block))
        pool = self._memory[: self._memory.numel() // block * block].view(-1, block)
        transport = NixlTransport(instance_id="raw-writer", pool=pool, landing=None)
        offer = self._pipe.recv()
        self._pipe.send(transport.local_offer())
        transport.connect("raw-reader", offer)
        self._raw = transport
        return transport, "raw-reader"

    def end_raw_nixl(self) -> None:
        self._pipe.send(("end_raw",))
        if self._raw is not None:
            self._raw.close()

    def end(self) -> None:
        self._close_side()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(("end",))

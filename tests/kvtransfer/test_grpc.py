"""The gRPC transport and its sessions, over real sockets."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import torch

from kvtransfer.events import (
    KvEvent,
    PagesLanded,
    SourceReleased,
    TransferCompleted,
    TransferFailedEvent,
)
from kvtransfer.grpc_session import KvSessionClient, choose_transport, connect_info
from kvtransfer.grpc_stream import SlotMemory
from protos.baton.v1 import kv_pb2, kv_pb2_grpc
from tests.kvtransfer.fronts import (
    LAYOUT,
    TIMING,
    Front,
    Server,
    Workers,
    info,
    order,
    until,
)

SLOT = 3000


async def collect(
    workers: Workers, done: Callable[[list[KvEvent], list[KvEvent]], bool]
) -> tuple[list[KvEvent], list[KvEvent]]:
    """Plays decode's role until `done(prefill's events, decode's events)`."""
    sent: list[KvEvent] = []
    received: list[KvEvent] = []

    def step() -> bool:
        sent.extend(workers.prefill.poll_events())
        received.extend(workers.verify())
        return done(sent, received)

    await until(step)
    return sent, received


async def test_pages_stream_through_a_small_outbox_into_the_window() -> None:
    async with Workers() as workers:
        tokens = 23 * LAYOUT.page_size + 5
        workers.hand_over("r", tokens)
        _, received = await collect(
            workers,
            lambda s, r: (
                any(isinstance(e, SourceReleased) for e in s)
                and any(isinstance(e, TransferCompleted) for e in r)
            ),
        )
        assert torch.equal(workers.target[:23], workers.source[:23])
        completed = next(e for e in received if isinstance(e, TransferCompleted))
        assert completed.transport == "grpc"
        assert completed.first_token == 3
        assert completed.total_bytes == 24 * LAYOUT.page_bytes
        assert workers.window.counts().free == workers.window.slots
        assert workers.prefill.held_pages() == {}


async def test_layers_leave_before_the_rest_of_their_pages_is_computed() -> None:
    """Through fewer outbox slots than pages; decode hears of no page before all of it is there."""
    async with Workers() as workers:
        tokens, first = 5 * LAYOUT.page_size, 2 * LAYOUT.row_bytes
        whole = workers.source.clone()
        workers.source[:, first:] = 0xA5  # not computed yet
        ticket = workers.grant("r", tokens)
        workers.prefill.open(ticket)
        workers.prefill.push_layers("r", [(n, n) for n in range(5)], range(1))
        slots = list(ticket.slots)  # a quarter of the window
        window, taken = workers.window.memory, len(slots)
        await until(lambda: torch.equal(window[slots, :first], whole[:taken, :first]))
        assert not window[:, first:].any(), "the rest is not there"
        assert not [e for e in workers.verify() if isinstance(e, PagesLanded)]
        workers.source.copy_(whole)
        workers.push("r", tokens)
        await collect(workers, lambda s, _: any(isinstance(e, SourceReleased) for e in s))
        assert torch.equal(workers.target[:5], whole[:5])
        assert workers.prefill.stats().early_layers_sent == taken


async def test_the_ranges_of_a_slot_arrive_at_their_places_alone() -> None:
    window = bytearray(2 * SLOT)
    async with session(window=window) as (client, mine, _, theirs, _):
        await until(lambda: bool(theirs.connected))
        client.submit(replace(order(1, (0, 1)), ranges=((100, 300), (2000, SLOT))))
        await until(lambda: mine.written == [(1, "")])
        assert theirs.messages == [b"landed"]
        sent = bytes(range(200)) * 15
        assert window[SLOT + 100 : SLOT + 300] == sent[100:300]
        assert window[SLOT + 2000 :] == sent[2000:]
        rest = window[: SLOT + 100] + window[SLOT + 300 : SLOT + 2000]
        assert rest == bytes(len(rest))


async def test_a_lost_session_fails_both_sides_and_strands_nothing() -> None:
    async with Workers() as workers:
        workers.hand_over("r", 20 * LAYOUT.page_size)
        workers.server.servicer.close_peer("p", "test")
        await collect(
            workers,
            lambda s, r: (
                any(isinstance(e, TransferFailedEvent) and e.quiesced for e in s)
                and any(isinstance(e, TransferFailedEvent) for e in r)
            ),
        )
        assert workers.prefill.held_pages() == {}
        assert workers.window.counts().free == workers.window.slots
        # the client dials again, and the next request goes through
        await until(lambda: workers.decode.stats().peers == 1 and bool(workers.client.peer))
        await until(lambda: workers.prefill.stats().peers == 1)
        workers.hand_over("again", 40)
        await collect(workers, lambda s, _: any(isinstance(e, SourceReleased) for e in s))


@asynccontextmanager
async def session(
    *, window: bytearray | None = None, fingerprint: str = "f"
) -> AsyncIterator[tuple[KvSessionClient, Front, Server, Front, list[str]]]:
    """(client, its front, server, its front, refusals)."""
    theirs, mine = Front(), Front()
    memory = None if window is None else SlotMemory(memoryview(window), SLOT)
    server = Server(theirs, window=memory, fingerprint=fingerprint)
    await server.server.start()
    outbox = bytes(range(200)) * 30
    refusals: list[str] = []
    client = KvSessionClient(
        address=server.address,
        info=info("p"),
        handler=mine,
        outbox=SlotMemory(memoryview(outbox), SLOT),
        timing=TIMING,
        refused=lambda error: refusals.append(str(error)),
    )
    task = asyncio.create_task(client.run())
    try:
        yield client, mine, server, theirs, refusals
    finally:
        client.close()
        await task
        await server.stop()


async def test_a_transport_that_the_engine_cannot_attach_gives_way_to_the_next() -> None:
    """Of two in one PID namespace, cuda_ipc say, when a window cannot be mapped."""
    mine, theirs = Front(), Front()
    server = Server(theirs, window=None, offers=beside("d"))
    await server.server.start()
    client = KvSessionClient(
        address=server.address,
        info=beside("p"),
        handler=mine,
        timing=TIMING,
    )
    task = asyncio.create_task(client.run())
    await until(lambda: mine.connected == [("d", "cuda_ipc")])
    client.retry_without("cuda_ipc", "its window cannot be mapped")
    await until(lambda: mine.connected[1:] == [("d", "grpc")])
    await until(lambda: theirs.connected == [("p", "cuda_ipc"), ("p", "grpc")])
    client.close()
    await task
    await server.stop()


async def test_another_fingerprint_is_refused_by_name() -> None:
    async with session(fingerprint="other") as (_, mine, _, theirs, refusals):
        await until(lambda: bool(refusals))
        assert "fingerprint" in refusals[0]
        assert "other" in refusals[0]
        assert mine.connected == theirs.connected == []


async def test_another_protocol_version_is_refused_by_name() -> None:
    async with (
        session() as (_, _, server, theirs, _),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = kv_pb2_grpc.KvStub(channel).Session()
        hello = info("q")
        hello.protocol_version = 99
        await call.write(kv_pb2.KvFrame(hello=hello))
        frame = await call.read()
        assert "protocol 99" in frame.refused.reason
        call.cancel()
        assert ("q", "grpc") not in theirs.connected


async def test_bytes_and_then_their_message_arrive() -> None:
    window = bytearray(4 * SLOT)
    async with session(window=window) as (client, mine, _, theirs, _):
        await until(lambda: bool(theirs.connected))
        client.submit(order(1, (0, 2), (1, 0)))
        await until(lambda: mine.written == [(1, "")])
        assert theirs.messages == [b"landed"]
        expected = bytes(range(200)) * 30
        assert window[2 * SLOT : 3 * SLOT] == expected[:SLOT]
        assert window[:SLOT] == expected[SLOT : 2 * SLOT]
        assert window[SLOT : 2 * SLOT] == bytes(SLOT)


async def test_a_slot_outside_the_window_is_refused_and_nothing_is_written() -> None:
    window = bytearray(2 * SLOT)
    async with session(window=window) as (client, mine, _, theirs, _):
        await until(lambda: bool(theirs.connected))
        client.submit(order(1, (0, 2)))
        client.submit(order(2, (0, 2**40)))
        await until(lambda: len(mine.written) == 2)
        assert all("outside the landing window" in error for _, error in mine.written)
        assert window == bytes(2 * SLOT)
        assert theirs.messages == []


async def test_an_order_without_a_session_is_answered_with_an_error() -> None:
    async with session(window=bytearray(SLOT)) as (client, mine, _, theirs, _):
        await until(lambda: bool(theirs.connected))
        client.submit(order(1, (0, 0), peer="an-earlier-life"))
        assert mine.written[0][1]


async def test_a_peer_that_falls_silent_is_lost_in_time() -> None:
    class Mute(kv_pb2_grpc.KvServicer):
        async def Session(self, _: object, context: object) -> None:
            await context.read()  # type: ignore[attr-defined]
            await context.write(kv_pb2.KvFrame(hello=info("d")))  # type: ignore[attr-defined]
            await asyncio.sleep(30)

    server = grpc.aio.server()
    kv_pb2_grpc.add_KvServicer_to_server(Mute(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    front = Front()
    client = KvSessionClient(
        address=f"127.0.0.1:{port}",
        info=info("p"),
        handler=front,
        outbox=SlotMemory(memoryview(bytes(SLOT)), SLOT),
        timing=TIMING,
    )
    task = asyncio.create_task(client.run())
    await until(lambda: bool(front.connected))
    started = time.monotonic()
    client.submit(order(5, (0, 0)))
    await until(lambda: bool(front.lost))
    assert "nothing heard" in front.lost[0][1]
    assert time.monotonic() - started < TIMING.silence_s + 1
    assert front.written[0][0] == 5
    assert front.written[0][1]
    client.close()
    await task
    await server.stop(0)


async def test_a_server_that_dies_is_noticed_and_dialled_again() -> None:
    async with session(window=bytearray(SLOT)) as (client, mine, server, theirs, _):
        await until(lambda: bool(theirs.connected) and bool(mine.connected))
        await server.server.stop(0)
        await until(lambda: bool(mine.lost))
        assert mine.lost[0][0] == "d"
        await until(lambda: bool(theirs.lost))
        assert not client.peer


async def test_a_client_that_dies_is_noticed_by_the_server() -> None:
    async with session(window=bytearray(SLOT)) as (client, _, server, theirs, _):
        await until(lambda: bool(theirs.connected))
        client.close()
        await until(lambda: bool(theirs.lost))
        assert server.servicer.peers == []


async def test_a_second_session_of_an_instance_replaces_the_first() -> None:
    async with session(window=bytearray(SLOT)) as (_, _, server, theirs, _):
        await until(lambda: bool(theirs.connected))
        front = Front()
        second = KvSessionClient(
            address=server.address, info=info("p"), handler=front, timing=TIMING
        )
        task = asyncio.create_task(second.run())
        await until(lambda: len(theirs.connected) >= 2)
        assert theirs.lost[0][0] == "p"
        assert server.servicer.peers == ["p"]
        second.close()
        await task


def offers(*names: str, instance: str = "d") -> kv_pb2.ConnectInfo:
    return connect_info(
        instance_id=instance, fingerprint="f", offers=[(name, b"") for name in names]
    )


def beside(instance: str) -> kv_pb2.ConnectInfo:
    """Of a GPU, in the PID namespace of all others."""
    found = offers("cuda_ipc", "grpc", instance=instance)
    found.pid_namespace = "boot/1"
    return found


def test_the_best_common_transport_is_chosen() -> None:
    mine = offers("nixl", "grpc", instance="p")
    assert choose_transport(mine, offers("nixl", "grpc"), "auto", set()) == "nixl"
    assert choose_transport(mine, offers("grpc"), "auto", set()) == "grpc"
    assert choose_transport(mine, offers("nixl", "grpc"), "grpc", set()) == "grpc"
    assert choose_transport(mine, offers("nixl", "grpc"), "auto", {"nixl"}) == "grpc"


def test_cuda_ipc_joins_processes_of_one_pid_namespace_only() -> None:
    def end(namespace: str) -> kv_pb2.ConnectInfo:
        offers = [("cuda_ipc", b""), ("nixl", b"")]
        found = connect_info(instance_id=namespace, fingerprint="f", offers=offers)
        found.pid_namespace = namespace
        return found

    assert choose_transport(end("boot/1"), end("boot/1"), "auto", set()) == "cuda_ipc"
    for theirs in ("boot/2", "other/1", ""):
        assert choose_transport(end("boot/1"), end(theirs), "auto", set()) == "nixl"
        with pytest.raises(LookupError, match="needs cuda_ipc"):
            choose_transport(end("boot/1"), end(theirs), "cuda_ipc", set())


def test_a_named_transport_that_the_peer_lacks_is_refused_by_name() -> None:
    with pytest.raises(LookupError, match="nixl"):
        choose_transport(offers("nixl", "grpc"), offers("grpc"), "nixl", set())

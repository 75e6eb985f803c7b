"""What a connection may cost a worker's door."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos import door_watch
from tests.grpc_by_hand import grpc_call
from worker import server
from worker.config import WorkerConfig

LIMIT_S = 0.3


@pytest.fixture
async def door(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[server.WorkerServer]:
    """With one service, short of time and connections."""
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(server, "MESSAGE_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    door = server.WorkerServer(WorkerConfig(model="none"))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), door.grpc)  # type: ignore[attr-defined]
    door.bind()
    await door.grpc.start()
    yield door
    await door.stop(grace_s=0.0)


@pytest.fixture
def port(door: server.WorkerServer) -> int:
    return int(door.address.rpartition(":")[2])


async def test_a_call_whose_message_never_ends_is_ended(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(grpc_call(b"/grpc.health.v1.Health/Check", message_bytes=100))
    async with asyncio.timeout(10 * LIMIT_S):
        assert b"did not arrive" in await reader.readuntil(b"of the call's beginning")
    writer.close()


async def test_one_connection_more_is_closed_at_once(port: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            readers.append(reader)
        async with asyncio.timeout(5):
            assert await readers[2].read(1) == b""
        assert not readers[0].at_eof()


async def test_garbage_in_plain_text_is_counted_and_calls_are_not(
    door: server.WorkerServer,
) -> None:
    async with grpc.aio.insecure_channel(door.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    host, _, port = door.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    await reader.read()
    writer.close()
    watch = door.watch
    assert watch is not None
    async with asyncio.timeout(10):
        while not watch.refused:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await asyncio.sleep(2 * LIMIT_S)
    assert (watch.refused, watch.reason) == (1, "no_call")

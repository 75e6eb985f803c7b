"""What a gRPC door in plain text turns away is counted; over real sockets, by the kernel's word."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import grpc
import pytest

from protos import door_watch
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.door_watch import PlainDoorWatch
from router.config import RouterConfig
from router.main import RouterServer
from tests.router.fakes import until

LATE_CALL_S = 0.3


class Door:
    """A router's gRPC door without workers."""

    def __init__(self, server: RouterServer, port: int) -> None:
        self._server, self.port = server, port

    @property
    def refused(self) -> int:
        return self._server.router.metrics.refusals.doors["grpc"].refused

    @property
    def metrics(self) -> str:
        return self._server.router.metrics.render().decode()

    async def say(self, data: bytes, *, host: str = "127.0.0.1") -> None:
        """A connection of its own, until it is hung up on."""
        reader, writer = await asyncio.open_connection(host, self.port)
        writer.write(data)
        await reader.read()
        writer.close()

    async def call(
        self, method: str = "/baton.v1.Registry/Heartbeat", *, host: str = "127.0.0.1"
    ) -> grpc.StatusCode:
        """A call over a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            request = worker_pb2.HeartbeatRequest(instance_id="x").SerializeToString()
            answer = channel.unary_unary(method)(request, timeout=5)
            return await answer.code()


@pytest.fixture
async def door(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", LATE_CALL_S)
    server = RouterServer(RouterConfig(http_port=0, grpc_port=0))
    async with server as ports:
        yield Door(server, ports.grpc)


def client_hello() -> bytes:
    """What begins to speak TLS."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(into, out, server_hostname="x").do_handshake()
    return out.read()


async def test_garbage_is_counted_whatever_it_is_and_others_are_unaffected(door: Door) -> None:
    garbage = [
        b"\x00\xffnonsense" * 20,
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        client_hello(),
        b"??",
    ]
    for count, data in enumerate(garbage, 1):
        await door.say(data)
        assert await door.call() is grpc.StatusCode.OK
        await until(lambda count=count: door.refused == count)  # type: ignore[misc]
    # More than gRPC reads: the kernel resets such a connection instead of ending it.
    with socket.create_connection(("127.0.0.1", door.port)) as flood, contextlib.suppress(OSError):
        flood.settimeout(5)
        flood.sendall(b"\xff" * 10_000_000)
    await until(lambda: door.refused == len(garbage) + 1)
    sample = f'baton_connections_refused_total{{door="grpc",reason="no_call"}} {len(garbage) + 1}.0'
    assert sample in door.metrics


async def test_who_only_looks_whether_the_port_is_open_is_not_counted(door: Door) -> None:
    for _ in range(3):
        socket.create_connection(("127.0.0.1", door.port)).close()
    await door.say(b"garbage, so that something is counted")
    await until(lambda: door.refused == 1)
    await asyncio.sleep(2 * LATE_CALL_S)
    assert door.refused == 1


async def test_a_connection_that_made_a_call_is_not_counted_whatever_became_of_the_call(
    door: Door,
) -> None:
    assert await door.call() is grpc.StatusCode.OK
    assert await door.call("/nobody.Knows/This") is grpc.StatusCode.UNIMPLEMENTED
    await door.say(b"garbage, so that something is counted")
    await until(lambda: door.refused == 1)
    await asyncio.sleep(2 * LATE_CALL_S)
    assert door.refused == 1


async def test_each_call_of_a_long_connection_belongs_to_it(door: Door) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
        stub = worker_pb2_grpc.RegistryStub(channel)
        for _ in range(3):
            await stub.Heartbeat(worker_pb2.HeartbeatRequest(instance_id="x"), timeout=5)
            await asyncio.sleep(LATE_CALL_S)
    await door.say(b"garbage, so that something is counted")
    await until(lambda: door.refused == 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_door_for_both_kinds_of_address_knows_its_callers(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", LATE_CALL_S)
    server = RouterServer(RouterConfig(http_port=0, grpc_port=0, grpc_host="::"))
    async with server as ports:
        door = Door(server, ports.grpc)
        assert await door.call(host=host) is grpc.StatusCode.OK
        await door.say(b"garbage", host=host)
        await until(lambda: door.refused == 1)
        await asyncio.sleep(2 * LATE_CALL_S)
        assert door.refused == 1


def test_a_call_that_the_end_of_its_connection_overtook_still_counts() -> None:
    now = 0.0
    watch = PlainDoorWatch(clock=lambda: now)
    for port in (1, 2):
        watch.on_end(f"ipv4:10.0.0.1:{port}", 100)
    watch.on_call("ipv4:10.0.0.1:1")
    assert watch.refused == 0
    now = 11.0
    assert watch.refused == 1


def test_a_caller_with_a_link_local_address_is_known_by_its_end() -> None:
    now = 0.0
    watch = PlainDoorWatch(clock=lambda: now)
    watch.on_call("ipv6:%5Bfe80::1%25eth0%5D:5000")  # gRPC names the interface, the kernel does not
    watch.on_end("ipv6:%5Bfe80::1%5D:5000", 700)
    now = 60.0
    assert watch.refused == 0


async def test_where_the_kernel_tells_nothing_no_figure_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(door_watch, "EndedConnections", forbidden)
    server = RouterServer(RouterConfig(http_port=0, grpc_port=0))
    async with server:
        assert "no_call" not in server.router.metrics.render().decode()

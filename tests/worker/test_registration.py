"""Which routers a worker registers with."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from worker import registration
from worker.registration import register_with_all, router_addresses


@pytest.mark.parametrize(
    ("setting", "addresses"),
    [
        ("", []),
        (" ", []),
        ("a:1", ["a:1"]),
        ("a:1, b:2 ,a:1,", ["a:1", "b:2"]),
    ],
)
def test_the_setting_names_routers_with_commas_between(setting: str, addresses: list[str]) -> None:
    assert router_addresses(setting) == addresses


class Registry(worker_pb2_grpc.RegistryServicer):
    """Notes who is there."""

    def __init__(self) -> None:
        self.listed: set[str] = set()
        self.beats = self.goodbyes = 0
        self.moves = asyncio.Event()
        """Unset, it answers no goodbye."""
        self.moves.set()

    async def Register(self, request: Any, context: Any) -> worker_pb2.RegisterResponse:
        self.listed.add(request.instance_id)
        return worker_pb2.RegisterResponse(accepted=True, heartbeat_interval_s=0.02)

    async def Heartbeat(self, request: Any, context: Any) -> worker_pb2.HeartbeatResponse:
        self.beats += 1
        return worker_pb2.HeartbeatResponse(known=request.instance_id in self.listed)

    async def Deregister(self, request: Any, context: Any) -> worker_pb2.DeregisterResponse:
        self.goodbyes += 1
        await self.moves.wait()
        self.listed.discard(request.instance_id)
        return worker_pb2.DeregisterResponse()


@pytest.fixture
async def routers() -> AsyncIterator[list[tuple[str, Registry]]]:
    found, servers = [], []
    for _ in range(2):
        server, registry = grpc.aio.server(), Registry()
        worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        found.append((f"127.0.0.1:{port}", registry))
        servers.append(server)
    yield found
    for server in servers:
        await server.stop(0)


async def beating(address: str, registry: Registry, **settings: Any) -> asyncio.Task[None]:
    """A worker's registration with one router, which has heard of it."""
    registering = asyncio.create_task(
        register_with_all(
            [address],
            request=worker_pb2.RegisterRequest(instance_id="w"),
            status=worker_pb2.WorkerStatus,
            **settings,
        )
    )
    async with asyncio.timeout(10):
        while not registry.beats:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return registering


async def ended(registering: asyncio.Task[None]) -> None:
    registering.cancel()
    await asyncio.wait_for(asyncio.gather(registering, return_exceptions=True), 10)


async def test_a_worker_is_known_to_every_router_it_names_and_leaves_them_all(
    routers: list[tuple[str, Registry]],
) -> None:
    registries = [registry for _, registry in routers]
    # One router that is away delays none of the others.
    addresses = ["127.0.0.1:1", *(address for address, _ in routers)]
    registering = asyncio.create_task(
        register_with_all(
            addresses,
            request=worker_pb2.RegisterRequest(instance_id="w"),
            status=worker_pb2.WorkerStatus,
        )
    )
    async with asyncio.timeout(10):
        while not all(registry.beats >= 2 for registry in registries):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    registries[1].listed.clear()  # it restarted
    async with asyncio.timeout(10):
        while not registries[1].listed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    registering.cancel()
    await asyncio.gather(registering, return_exceptions=True)
    assert [registry.listed for registry in registries] == [set(), set()]


async def test_a_worker_that_names_none_waits_to_be_found() -> None:
    waiting = asyncio.create_task(
        register_with_all([], request=worker_pb2.RegisterRequest(), status=worker_pb2.WorkerStatus)
    )
    await asyncio.sleep(0.05)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_router_that_stands_still_is_told_goodbye_until_it_hears_it(
    routers: list[tuple[str, Registry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "RPC_TIMEOUT_S", 0.2)
    address, registry = routers[0]
    registering = await beating(address, registry, leave_by=lambda: time.monotonic() + 60.0)
    registry.moves.clear()
    registering.cancel()
    async with asyncio.timeout(10):
        while registry.goodbyes < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert registry.listed
    registry.moves.set()
    await asyncio.wait_for(asyncio.gather(registering, return_exceptions=True), 10)
    assert not registry.listed


async def test_nobody_waits_for_a_router_that_is_no_longer_there() -> None:
    server = grpc.aio.server()
    registry = Registry()
    worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registering = await beating(
        f"127.0.0.1:{port}", registry, leave_by=lambda: time.monotonic() + 60.0
    )
    await server.stop(0)
    await ended(registering)


async def test_a_leaving_worker_that_a_router_has_struck_off_is_not_listed_again(
    routers: list[tuple[str, Registry]],
) -> None:
    address, registry = routers[0]
    left = False
    registering = await beating(address, registry, leaving=lambda: left)
    left = True
    registry.listed.clear()  # it heard the goodbye in its session
    beats = registry.beats
    async with asyncio.timeout(10):
        while registry.beats == beats:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # ten heartbeats
    assert not registry.listed
    await ended(registering)


async def test_a_goodbye_that_is_refused_is_not_said_again(
    routers: list[tuple[str, Registry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, registry = routers[0]
    said: list[str] = []

    async def refuse(request: Any, context: Any) -> worker_pb2.DeregisterResponse:
        said.append(request.instance_id)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not yours")
        raise AssertionError

    monkeypatch.setattr(registry, "Deregister", refuse)
    server = grpc.aio.server()
    worker_pb2_grpc.add_RegistryServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registering = await beating(
        f"127.0.0.1:{port}", registry, leave_by=lambda: time.monotonic() + 60.0
    )
    await ended(registering)
    await server.stop(0)
    assert said == ["w"]

"""What a worker turns away is counted: connections, routers' sessions, peers; over real TLS."""

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
import pytest

from kvtransfer.grpc_session import KvServicer, KvSessionClient, PeerRefused, connect_info
from observability.sheet import Sheet
from protos import door_watch
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.tls import ServerFiles, TlsSettings, open_channel
from protos.version import PROTOCOL_VERSION
from tests.baton.certificates import Authority, Pair
from tests.kvtransfer import fronts
from worker.config import WorkerConfig
from worker.metrics_http import MetricsServer
from worker.refusals import WorkerRefusals
from worker.server import WorkerServer
from worker.service import WorkerService


def settings(pair: Pair, authority: Authority) -> dict[str, str]:
    return {
        "tls_cert": str(pair.certificate),
        "tls_key": str(pair.key),
        "tls_ca": str(authority.certificate),
    }


def counted(refusals: WorkerRefusals, family: str) -> dict[tuple[str, ...], float]:
    """The counter's samples, by the values of their labels."""
    sheet = Sheet()
    refusals.add_to(sheet)
    return {
        tuple(sample.labels.values()): sample.value
        for one in sheet.collect()
        if one.name == family
        for sample in one.samples
    }


async def reached(refusals: WorkerRefusals, key: tuple[str, str], least: int) -> None:
    """Until so many connections to a door are counted."""
    family = "baton_worker_connections_refused"
    await fronts.until(lambda: counted(refusals, family).get(key, 0) >= least)


class Instance:
    """As much of a front as a session needs that does not come about."""

    instance_id = "decode-1"


@pytest.fixture
def parts(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "parts")


@pytest.fixture
def part(parts: Authority) -> Pair:
    return parts.sign("part", addresses=("127.0.0.1",))


@pytest.fixture
async def served(
    parts: Authority, part: Pair, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[str, WorkerRefusals]]:
    """A worker's gRPC server without an engine: its address, and what it counts."""
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", 0.5)
    config = WorkerConfig(model="none", **settings(part, parts))
    door, refusals = WorkerServer(config), WorkerRefusals()
    worker_pb2_grpc.add_WorkerServicer_to_server(
        WorkerService(Instance(), on_refused=refusals.router),  # type: ignore[arg-type]
        door.grpc,
    )
    mine = connect_info(instance_id="decode-1", fingerprint="ours", offers=[("grpc", b"")])
    servicer = KvServicer(
        info=lambda: mine,
        handler=fronts.Front(),
        refused=lambda error: refusals.peer(error.cause),
    )
    servicer.add_to(door.grpc)
    address = door.bind()
    refusals.door = door.watch
    await door.grpc.start()
    yield address, refusals
    servicer.close()
    await door.stop(grace_s=0.0)


async def test_garbage_strangers_and_expired_certificates_at_the_door_are_counted(
    served: tuple[str, WorkerRefusals], parts: Authority, tmp_path: Path
) -> None:
    address, refusals = served
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"\x00\xffnonsense\r\n\r\n" * 20)
    stranger = Authority(tmp_path, "stranger").sign("who", addresses=("127.0.0.1",))
    late = parts.sign("late", addresses=("127.0.0.1",), lasts=timedelta(hours=-1))
    for pair in (stranger, late):
        tls = TlsSettings(**settings(pair, parts))
        async with open_channel(address, tls=tls, options=[]) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                await stub.Describe(worker_pb2.DescribeRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await reached(refusals, ("grpc", "handshake"), 3)


async def test_routers_of_another_release_or_instance_are_counted(
    served: tuple[str, WorkerRefusals], parts: Authority, part: Pair
) -> None:
    address, refusals = served
    old = worker_pb2.SessionHello(protocol_version=PROTOCOL_VERSION + 1, instance_id="decode-1")
    gone = worker_pb2.SessionHello(protocol_version=PROTOCOL_VERSION, instance_id="decode-0")
    first = [
        worker_pb2.RouterMessage(ping=worker_pb2.Ping()),
        worker_pb2.RouterMessage(hello=old),
        worker_pb2.RouterMessage(hello=gone),
    ]
    tls = TlsSettings(**settings(part, parts))
    async with open_channel(address, tls=tls, options=[]) as channel:
        for message in first:
            call = worker_pb2_grpc.WorkerStub(channel).Session(iter([message]), timeout=5)
            with pytest.raises(grpc.RpcError):
                await call.read()
    found = counted(refusals, "baton_worker_sessions_refused")
    assert found == {
        ("router", "malformed"): 1,
        ("router", "protocol"): 1,
        ("router", "instance"): 1,
    }


async def test_a_peer_of_another_fingerprint_is_counted_at_both_ends(
    served: tuple[str, WorkerRefusals], parts: Authority, part: Pair
) -> None:
    address, refusals = served
    told: asyncio.Queue[PeerRefused] = asyncio.Queue()
    client = KvSessionClient(
        address=address,
        info=connect_info(instance_id="prefill-1", fingerprint="theirs", offers=[("grpc", b"")]),
        handler=fronts.Front(),
        refused=told.put_nowait,
        tls=TlsSettings(**settings(part, parts)),
    )
    run = asyncio.create_task(client.run())
    error = await asyncio.wait_for(told.get(), 10.0)
    client.close()
    await run
    assert error.cause == "by_peer"
    assert "fingerprint" in str(error)
    assert counted(refusals, "baton_worker_sessions_refused")[("worker", "fingerprint")] >= 1


# ---- the metrics' port -----------------------------------------------------------------------


@pytest.fixture
async def metrics(
    part: Pair, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[str, WorkerRefusals]]:
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", 0.5)

    async def render() -> bytes:
        return b"figures"

    refusals = WorkerRefusals()
    refusals.metrics_door = door_watch.TlsDoorWatch()
    files = ServerFiles(certificate=str(part.certificate), key=str(part.key))
    server = MetricsServer(render, tls=files, watch=refusals.metrics_door)
    port = await server.start("127.0.0.1", 0)
    yield f"127.0.0.1:{port}", refusals
    await server.stop()


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


async def test_metrics_are_served_in_tls_and_in_nothing_else(
    metrics: tuple[str, WorkerRefusals], parts: Authority
) -> None:
    address, refusals = metrics
    async with httpx.AsyncClient(verify=trusting(parts), trust_env=False) as client:
        answer = await client.get(f"https://{address}/metrics", timeout=5.0)
        assert answer.content == b"figures"
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://{address}/metrics", timeout=5.0)
        with pytest.raises(httpx.TransportError):
            await client.get(f"https://{address}/metrics", timeout=5.0)
    await reached(refusals, ("metrics", "handshake"), 2)
    await asyncio.sleep(0.6)
    found = counted(refusals, "baton_worker_connections_refused")
    assert found[("metrics", "handshake")] == 2, "the one that was answered is none of them"


async def test_the_metrics_certificate_is_renewed_by_its_files(
    metrics: tuple[str, WorkerRefusals], parts: Authority, part: Pair, tmp_path: Path
) -> None:
    address, _ = metrics
    host, _, port = address.rpartition(":")

    async def shown() -> bytes:
        _, writer = await asyncio.open_connection(host, int(port), ssl=trusting(parts))
        try:
            found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return found
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    before = await shown()
    assert await shown() == before
    fresh = parts.sign("fresh", addresses=("127.0.0.1",))
    shutil.copy2(fresh.key, part.key)
    assert await shown() == before, "a key without its certificate changes nothing"
    shutil.copy2(fresh.certificate, part.certificate)
    assert await shown() != before


async def test_what_is_no_http_at_the_metrics_is_counted() -> None:
    async def render() -> bytes:
        return b"figures"

    refusals = WorkerRefusals()
    server = MetricsServer(render, on_garbage=refusals.on_metrics_garbage)
    port = await server.start("127.0.0.1", 0)

    async def say(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        try:
            return await reader.read()
        except OSError:
            return b""
        finally:
            writer.transport.abort()

    assert b"figures" in await say(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    assert await say(b"") == b""  # only looks whether the port is open
    for garbage in (b"nonsense", b"non\r\nsense\r\n\r\n", b"\x00" * 50_000):
        assert await say(garbage) == b""
    await reached(refusals, ("metrics", "garbage"), 3)
    assert counted(refusals, "baton_worker_connections_refused") == {("metrics", "garbage"): 3}
    await server.stop()

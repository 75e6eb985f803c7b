"""TLS between the parts: the workers' door, certificates that are renewed, and who is counted."""

import asyncio
import ssl
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
import pytest

from baton.connection import ConnectionConfig, Tls
from protos import door_watch
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.door_watch import TlsDoorWatch
from router.config import RouterConfig
from router.main import RouterServer
from tests.baton.certificates import Authority, Pair
from tests.router.fakes import until
from worker.config import WorkerConfig


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    return Authority(directory, "parts")


@pytest.fixture(scope="module")
def part(authority: Authority) -> Pair:
    return authority.sign("part", addresses=("127.0.0.1",))


def config(authority: Authority, part: Pair, *, client_ca: str = "") -> RouterConfig:
    return RouterConfig(
        http_port=0,
        grpc_port=0,
        workers_port=0,
        tls_cert=str(part.certificate),
        tls_key=str(part.key),
        tls_ca=str(authority.certificate),
        tls_client_ca=client_ca,
    )


async def heartbeat(port: int, tls: Tls | None) -> bool:
    """Whether the registry answers whoever shows that."""
    connection = ConnectionConfig(tls=tls)
    async with connection.open_async(f"127.0.0.1:{port}") as channel:
        call = worker_pb2_grpc.RegistryStub(channel).Heartbeat(
            worker_pb2.HeartbeatRequest(instance_id="x"), timeout=5
        )
        return await call.code() is grpc.StatusCode.OK


async def say(port: int, data: bytes) -> bytes:
    """What a port answers to these bytes before it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


def shows(pair: Pair | None, trusted: Authority) -> Tls:
    return Tls.from_files(
        root_certificates=trusted.certificate,
        certificate_chain=pair.certificate if pair else None,
        private_key=pair.key if pair else None,
    )


async def test_the_workers_door_opens_to_parts_alone_and_counts_the_others(
    authority: Authority, part: Pair, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_watch, "HANDSHAKE_TIMEOUT_S", 0.5)
    stranger = Authority(directory, "stranger")
    server = RouterServer(config(authority, part))
    async with server as ports:
        assert await heartbeat(ports.workers, shows(part, authority))
        refused = {
            "plain text": None,
            "no certificate": shows(None, authority),
            "another authority's": shows(stranger.sign("one"), authority),
            "an expired one": shows(authority.sign("late", lasts=timedelta(hours=-1)), authority),
        }
        for what, tls in refused.items():
            assert not await heartbeat(ports.workers, tls), what
        await say(ports.workers, b"GET / HTTP/1.1\r\n\r\n")
        assert await heartbeat(ports.workers, shows(part, authority)), "others are unaffected"
        (watch,) = [w for d, w in server.router.metrics.refusals.doors.items() if d == "workers"]
        # gRPC dials again by itself: each of the four is refused at least once.
        await until(lambda: watch.refused >= 5)
        sample = 'baton_connections_refused_total{door="workers",reason="handshake"}'
        assert sample in server.router.metrics.render().decode()


async def test_the_http_door_counts_what_is_no_http_and_what_is_no_tls(
    authority: Authority, part: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.limits.HANDSHAKE_TIMEOUT_MS", 300)
    secure = RouterServer(config(authority, part))
    async with secure as ports:
        await say(ports.http, b"\x00" * 100)
        refusals = secure.router.metrics.refusals
        await until(lambda: refusals.http["handshake"] == 1)
        context = ssl.create_default_context(cafile=str(authority.certificate))
        async with httpx.AsyncClient(verify=context) as client:
            answer = await client.get(f"https://127.0.0.1:{ports.http}/v1/models")
        assert answer.status_code == 200
        await asyncio.sleep(0.5)  # longer than a handshake may take here
        assert refusals.http == {"handshake": 1, "garbage": 0}
    plain = RouterServer(RouterConfig(http_port=0, grpc_port=0))
    async with plain as ports:
        assert b"400" in await say(ports.http, b"\x00\x01\r\n\r\n")
        assert plain.router.metrics.refusals.http["garbage"] == 1


async def test_a_certificate_is_renewed_by_replacing_its_files(
    authority: Authority, part: Pair, tmp_path: Path
) -> None:
    mine = Pair(tmp_path / "tls.crt", tmp_path / "tls.key")

    def put(pair: Pair) -> None:
        mine.certificate.write_bytes(pair.certificate.read_bytes())
        mine.key.write_bytes(pair.key.read_bytes())

    put(part)
    successor = Authority(tmp_path, "successor")
    async with RouterServer(config(authority, mine)) as ports:
        assert await heartbeat(ports.workers, shows(part, authority))
        mine.key.write_bytes(b"half of a renewal")
        assert await heartbeat(ports.workers, shows(part, authority)), "the old one stays"
        put(successor.sign("renewed", addresses=("127.0.0.1",)))
        assert await heartbeat(ports.workers, shows(part, successor))
        assert not await heartbeat(ports.workers, shows(part, authority))
        context = ssl.create_default_context(cafile=str(successor.certificate))
        async with httpx.AsyncClient(verify=context) as client:
            for _ in range(50):
                try:
                    await client.get(f"https://127.0.0.1:{ports.http}/health")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.1)
            else:
                raise AssertionError("the HTTP door shows the old certificate")


async def test_an_authority_of_clients_and_parts_is_refused(
    authority: Authority, part: Pair
) -> None:
    server = RouterServer(config(authority, part, client_ca=str(authority.certificate)))
    with pytest.raises(OSError, match="share an authority"):
        await server.start()
    await server.stop(drain_timeout_s=0)


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_ca"])
def test_a_worker_takes_all_of_tls_or_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs"):
        WorkerConfig(model="m", **{name: "x"})  # type: ignore[arg-type]


async def test_a_registration_is_bounded_and_so_is_the_list(
    authority: Authority, part: Pair
) -> None:
    server = RouterServer(RouterConfig(http_port=0, grpc_port=0, max_workers=1))
    async with server as ports, grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)
        call = registry.Register(worker_pb2.RegisterRequest(instance_id="x" * 10_000))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        for name, code in (
            ("one", grpc.StatusCode.OK),
            ("two", grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("one", grpc.StatusCode.OK),
        ):
            request = worker_pb2.RegisterRequest(instance_id=name, address=f"127.0.0.1:{len(name)}")
            assert await registry.Register(request).code() is code
        text = server.router.metrics.render().decode()
        for reason in ("malformed", "full", "protocol"):
            assert f'baton_workers_refused_total{{reason="{reason}"}}' in text


def test_a_connection_counts_as_refused_when_no_call_follows_its_handshake() -> None:
    now = 0.0
    watch = TlsDoorWatch(clock=lambda: now)
    for _ in range(3):
        watch.on_connection()
    watch.on_call("ipv4:10.0.0.1:5000")
    watch.on_call("ipv4:10.0.0.1:5000")
    assert watch.refused == 0
    now = 11.0
    assert watch.refused == 2
    watch.on_connection()
    watch.on_call("ipv4:10.0.0.1:5001")
    now = 100.0
    assert watch.refused == 2

"""TLS between clients and a real router, with certificates of the test's own authority."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest

import baton
from baton.cli import main
from baton.config import flags_for
from baton.connection import ConnectionConfig, Tls
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from router.config import RouterConfig
from router.main import Ports, RouterServer
from tests.baton.certificates import Authority, Pair

SERVED = "router.test"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    return Authority(directory, "authority")


@pytest.fixture(scope="module")
def stranger(directory: Path) -> Authority:
    return Authority(directory, "stranger")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.sign("server", hosts=(SERVED,), addresses=("127.0.0.1",))


@pytest.fixture(scope="module")
def visitor(authority: Authority) -> Pair:
    return authority.sign("visitor")


def router_config(server: Pair, *, client_ca: str = "") -> RouterConfig:
    return RouterConfig(
        http_port=0,
        grpc_port=0,
        workers_port=0,
        tls_cert=str(server.certificate),
        tls_key=str(server.key),
        tls_client_ca=client_ca,
    )


@pytest.fixture
async def ports(server: Pair) -> AsyncIterator[Ports]:
    async with RouterServer(router_config(server)) as opened:
        yield opened


@pytest.fixture
async def mutual(server: Pair, authority: Authority) -> AsyncIterator[Ports]:
    config = router_config(server, client_ca=str(authority.certificate))
    async with RouterServer(config) as opened:
        yield opened


async def protocol_at(port: int, tls: Tls | None) -> int:
    """Asks the router for its protocol, with a deadline that a dead handshake runs into."""
    config = ConnectionConfig(tls=tls)
    async with baton.AsyncClient(f"127.0.0.1:{port}", config=config) as client:
        return (await client.server_info(timeout=5.0)).protocol_version


async def test_the_right_authority_is_trusted(ports: Ports, authority: Authority) -> None:
    tls = Tls.from_files(root_certificates=authority.certificate)
    assert await protocol_at(ports.grpc, tls) == PROTOCOL_VERSION


async def test_another_authority_is_unavailable(ports: Ports, stranger: Authority) -> None:
    tls = Tls.from_files(root_certificates=stranger.certificate)
    with pytest.raises(baton.Unavailable):
        await protocol_at(ports.grpc, tls)


async def test_the_name_in_the_certificate_can_be_stated(
    ports: Ports, authority: Authority
) -> None:
    right = Tls.from_files(root_certificates=authority.certificate, server_name=SERVED)
    assert await protocol_at(ports.grpc, right) == PROTOCOL_VERSION
    wrong = Tls.from_files(root_certificates=authority.certificate, server_name="other.test")
    with pytest.raises(baton.Unavailable):
        await protocol_at(ports.grpc, wrong)


async def test_plain_text_to_a_tls_port_is_unavailable(ports: Ports) -> None:
    with pytest.raises(baton.Unavailable):
        await protocol_at(ports.grpc, None)


async def test_mutual_tls_serves_whom_the_authority_signed(
    mutual: Ports, authority: Authority, visitor: Pair
) -> None:
    tls = Tls.from_files(
        root_certificates=authority.certificate,
        certificate_chain=visitor.certificate,
        private_key=visitor.key,
    )
    assert await protocol_at(mutual.grpc, tls) == PROTOCOL_VERSION


async def test_mutual_tls_refuses_who_shows_no_certificate(
    mutual: Ports, authority: Authority
) -> None:
    tls = Tls.from_files(root_certificates=authority.certificate)
    with pytest.raises(baton.Unavailable):
        await protocol_at(mutual.grpc, tls)


async def test_mutual_tls_refuses_whom_a_stranger_signed(
    mutual: Ports, authority: Authority, stranger: Authority
) -> None:
    intruder = stranger.sign("intruder")
    tls = Tls.from_files(
        root_certificates=authority.certificate,
        certificate_chain=intruder.certificate,
        private_key=intruder.key,
    )
    with pytest.raises(baton.Unavailable):
        await protocol_at(mutual.grpc, tls)


async def test_the_http_door_speaks_tls_as_well(
    mutual: Ports, authority: Authority, visitor: Pair
) -> None:
    url = f"https://127.0.0.1:{mutual.http}/v1/models"
    context = ssl.create_default_context(cafile=str(authority.certificate))
    async with httpx.AsyncClient(verify=context) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(url)
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(visitor.certificate, visitor.key)
    async with httpx.AsyncClient(verify=context) as client:
        assert (await client.get(url)).status_code == 200


async def test_workers_register_at_a_door_of_their_own_that_takes_no_requests(
    ports: Ports,
) -> None:
    assert ports.workers != ports.grpc
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.workers}") as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)
        beat = await registry.Heartbeat(worker_pb2.HeartbeatRequest(instance_id="x"), timeout=5)
        assert not beat.known
    async with baton.AsyncClient(f"127.0.0.1:{ports.workers}") as client:
        assert (await client.server_info(timeout=5.0)).protocol_version == PROTOCOL_VERSION
        with pytest.raises(baton.FailedPrecondition):
            await client.complete("Hi", timeout=5.0)


async def test_the_registry_is_closed_to_those_at_the_public_door(
    ports: Ports, authority: Authority
) -> None:
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{ports.grpc}", credentials) as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await registry.Heartbeat(worker_pb2.HeartbeatRequest(instance_id="x"), timeout=5)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["private_key", "certificate_chain"])
def test_half_a_pair_is_refused_by_name(name: str) -> None:
    other = {"private_key": "certificate_chain", "certificate_chain": "private_key"}[name]
    with pytest.raises(ValueError, match=f"{other} is missing"):
        Tls(**{name: b"-----BEGIN X-----"})


def test_what_is_no_pem_is_refused_by_name(directory: Path) -> None:
    path = directory / "noise.pem"
    path.write_bytes(b"noise")
    with pytest.raises(ValueError, match="root_certificates is not in PEM format"):
        Tls.from_files(root_certificates=path)


def test_an_address_and_a_configuration_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for plain text"):
        baton.Client("grpc://127.0.0.1:1", config=ConnectionConfig(tls=Tls()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "x"}, "tls_cert needs tls_key"),
        ({"tls_key": "x"}, "tls_key needs tls_cert"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs tls_cert"),
    ],
)
def test_a_router_with_half_of_tls_is_refused_by_name(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**given)  # type: ignore[arg-type]


def test_a_router_with_a_key_of_another_certificate_does_not_start(
    server: Pair, visitor: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    config = router_config(Pair(server.certificate, visitor.key))
    assert main(["router", *flags_for(config)]) == 1
    assert "no PEM certificate with its own key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-client-cert", "x"], "tls_client_cert needs tls_client_key"),
        (["--tls-root-ca", "/nowhere.pem"], "TLS: "),
        (["--tls", "--router", "grpc://127.0.0.1:1"], "asks for plain text"),
    ],
)
def test_a_command_with_wrong_tls_says_so(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ps", *flags]) == 2
    assert message in capsys.readouterr().err


async def test_ps_reaches_a_router_that_speaks_tls(
    ports: Ports, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--router", f"127.0.0.1:{ports.grpc}", "--tls-root-ca", str(authority.certificate)]
    assert await asyncio.to_thread(main, ["ps", *flags]) == 0
    assert f"protocol {PROTOCOL_VERSION}" in capsys.readouterr().out

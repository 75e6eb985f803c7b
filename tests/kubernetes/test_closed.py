"""A release whose every connection is in TLS and whose clients need a key, from given secrets."""

import base64
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import baton
from baton.connection import ConnectionConfig, Tls
from router.api_keys import ApiKey, digest_of, draw_key, write_keys
from tests.baton.certificates import Authority
from tests.helm.helms import Values
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.releases import CERTIFIED, Access, Release, installed

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

NAME = "closed"
VALUES: Values = {
    "tls": {
        "enabled": True,
        "secretName": "routers",
        "workers": {"enabled": True, "secretName": "workers"},
    },
    "apiKeys": {"secretName": "keys"},
    "test": {"apiKeySecretName": "visitor"},
}


@pytest.fixture(scope="module")
def key() -> tuple[str, str]:
    """A key and its id."""
    return draw_key()


@pytest.fixture(scope="module")
def release(
    cluster: Cluster, key: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    directory = tmp_path_factory.mktemp("closed")
    parts = Authority(directory, "parts")
    # Clients name the Service, workers the routers' part.
    router = parts.sign("router", hosts=(CERTIFIED, f"{NAME}-baton"))
    worker = parts.sign("worker", hosts=(CERTIFIED,))
    file = directory / "keys.yaml"
    digest = digest_of(key[0])
    write_keys(file, [ApiKey(id=key[1], tenant="acme", sha256=digest, operator=True)])
    cluster.api.create("/api/v1/namespaces", {"metadata": {"name": NAME}})
    for name, pair in (("routers", router), ("workers", worker)):
        files = {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": parts.certificate}
        _secret(cluster, name, {entry: path.read_bytes() for entry, path in files.items()})
    _secret(cluster, "keys", {"keys.yaml": file.read_bytes()})
    _secret(cluster, "visitor", {"key": key[0].encode()})
    access = Access(
        connection=ConnectionConfig(tls=trusting(parts.certificate), api_key=key[0]),
        verify=ssl.create_default_context(cafile=str(parts.certificate)),
        headers={"Authorization": f"Bearer {key[0]}"},
    )
    with installed(cluster, NAME, VALUES, workers=2, access=access) as release:
        yield release


def trusting(authority: Path) -> Tls:
    return Tls.from_files(root_certificates=authority, server_name=CERTIFIED)


def _secret(cluster: Cluster, name: str, files: dict[str, bytes]) -> None:
    data = {entry: base64.b64encode(content).decode() for entry, content in files.items()}
    body = {"metadata": {"name": name}, "data": data}
    cluster.api.create(f"/api/v1/namespaces/{NAME}/secrets", body)


def test_who_has_a_key_is_served_through_mutual_tls(release: Release) -> None:
    assert release.answer()
    assert "Succeeded" in release.helm("test", "--timeout", "3m")
    release.wait_until_balanced()


def test_nobody_else_is(release: Release) -> None:
    address = release.router.address
    config = ConnectionConfig(tls=release.access.connection.tls, api_key=draw_key()[0])
    with (
        baton.Client(f"{address}:50051", config=config) as client,
        pytest.raises(baton.Unauthenticated),
    ):
        client.complete("x", max_tokens=1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{address}:8000/health", timeout=10.0, trust_env=False)
    (worker,) = release.pods("decode")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{worker.address}:9464/metrics", timeout=10.0, trust_env=False)

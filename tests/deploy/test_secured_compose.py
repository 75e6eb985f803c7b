"""deploy/compose.tls.yaml and deploy/compose.keys.yaml: TLS on every connection, and API keys."""

import shutil
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import baton
from baton.connection import ConnectionConfig, Tls
from router.api_keys import ApiKey, digest_of, draw_key, write_keys
from tests.baton.certificates import Authority
from tests.deploy.container_engine import Engine
from tests.deploy.stack import COMPOSE, Stack, free_port, settings
from tests.deploy.traffic import PROMPT

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]

SUBNET = "172.31.89"
SERVICES = ("redis", "router", "prefill-1", "decode-1")


@dataclass(frozen=True)
class Secured:
    """A deployment behind certificates and keys."""

    stack: Stack
    authority: Path
    key: str

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))

    def client(self, key: str) -> baton.Client:
        tls = Tls.from_files(root_certificates=self.authority)
        return baton.Client(self.stack.grpc, config=ConnectionConfig(tls=tls, api_key=key))


@pytest.fixture(scope="module")
def secured(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    tls, keys = directory / "tls", directory / "keys"
    for folder in (tls, keys):
        folder.mkdir()
    parts = Authority(directory, "parts")
    part = parts.sign("part", hosts=("baton-part",), addresses=("127.0.0.1",))
    shutil.copy2(part.certificate, tls / "part.pem")
    shutil.copy2(part.key, tls / "part-key.pem")
    shutil.copy2(parts.certificate, tls / "parts-ca.pem")
    key, key_id = draw_key()
    known = ApiKey(id=key_id, tenant="acme", sha256=digest_of(key), operator=True)
    write_keys(keys / "keys.yaml", [known])
    for file in (*tls.iterdir(), *keys.iterdir()):
        file.chmod(0o444)
    # The containers' user is nobody here.
    for folder in (directory, *directory.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    http_port, grpc_port = free_port(), free_port()
    given = {"SUBNET": SUBNET, "TLS_DIR": str(tls), "KEYS_DIR": str(keys)}
    stack = Stack(
        engine,
        settings(http_port, grpc_port) | given,
        http=f"https://127.0.0.1:{http_port}",
        grpc=f"127.0.0.1:{grpc_port}",
        project="baton-test-secured",
        files=(COMPOSE, *(COMPOSE.with_name(f"compose.{name}.yaml") for name in ("tls", "keys"))),
    )
    stack.compose("down", "--volumes", "--timeout", "1")
    try:
        # --wait: until every health check is content, which speaks TLS, too.
        stack.compose(
            "up", "--no-build", "--detach", "--wait", "--no-deps", *SERVICES, limit_s=300.0
        )
        yield Secured(stack, parts.certificate, key)
    except Exception as error:
        raise AssertionError(f"{error}\n{stack.logs()}") from error
    finally:
        stack.compose("down", "--volumes", "--timeout", "1")


def test_both_doors_answer_who_trusts_the_certificate_and_has_a_key(secured: Secured) -> None:
    with secured.client(secured.key) as client:
        answer = client.complete(PROMPT, max_tokens=16, temperature=0, ignore_eos=True)
    body = {"model": "baton-tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    headers = {"Authorization": f"Bearer {secured.key}"}
    said = httpx.post(
        f"{secured.stack.http}/v1/completions",
        json={**body, "ignore_eos": True},
        headers=headers,
        verify=secured.trusted,
        timeout=60.0,
    )
    assert said.status_code == 200, said.text
    assert said.json()["choices"][0]["text"] == answer.text


def test_nobody_else_is_answered(secured: Secured) -> None:
    with secured.client(draw_key()[0]) as client, pytest.raises(baton.Unauthenticated):
        client.complete(PROMPT, max_tokens=1)
    answer = httpx.get(f"{secured.stack.http}/v1/models", verify=secured.trusted, timeout=10.0)
    assert answer.status_code == 401
    plain = secured.stack.http.replace("https", "http", 1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{plain}/health", timeout=10.0)


def test_workers_serve_their_metrics_in_tls_where_the_router_says(secured: Secured) -> None:
    headers = {"Authorization": f"Bearer {secured.key}"}
    listed = httpx.get(
        f"{secured.stack.http}/metrics/targets",
        headers=headers,
        verify=secured.trusted,
        timeout=10.0,
    ).json()
    assert len(listed) == 2
    for group in listed:
        assert group["labels"]["__scheme__"] == "https"
        (target,) = group["targets"]
        with httpx.Client(verify=secured.trusted, timeout=10.0, trust_env=False) as client:
            name = {"sni_hostname": "baton-part"}
            text = client.get(f"https://{target}/metrics", extensions=name).text
        assert "baton_worker_info" in text
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{target}/metrics", timeout=10.0, trust_env=False)


def test_a_command_in_the_router_needs_a_key_and_nothing_else(secured: Secured) -> None:
    said = secured.stack.compose(
        *("exec", "-T", "--env", f"BATON_API_KEY={secured.key}", "router"),
        *("baton", "generate", PROMPT, "--max-tokens", "8"),
    )
    assert said.strip()

"""A whole deployment over mutual TLS, with API keys: it works, and nobody else gets in.

KV goes over gRPC, so that every byte between the processes travels in TLS.
"""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

import baton
from baton.cli import main
from baton.connection import ConnectionConfig, Tls
from protos.baton.v1 import kv_pb2_grpc, worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from router.api_keys import ApiKey, digest_of, draw_key, write_keys
from tests.baton.certificates import Authority, Pair
from tests.e2e.cluster import Cluster, HttpAccess, running_cluster
from tests.e2e.deaths import ready
from tests.e2e.parts import free_port
from tests.e2e.worker_status import wait_for

PAGE = 16
LENGTH = 800
PROMPT = [5 + (i * 11) % 300 for i in range(5 * PAGE + 3)]
TENANTS = ("ops", "acme", "other")
REFUSED = re.compile(
    r'^baton_worker_connections_refused_total\{door="grpc",.*\} (.*)$', re.MULTILINE
)


@dataclass
class Secured:
    """A deployment, its certificates and its keys."""

    cluster: Cluster
    parts: Authority
    part: Pair
    clients: Authority
    visitor: Pair
    keys: dict[str, str]
    workers_port: int

    def client(self, tenant: str) -> baton.Client:
        tls = shown(self.visitor, self.parts)
        config = ConnectionConfig(tls=tls, api_key=self.keys[tenant], reconnect_wait_s=0.0)
        return baton.Client(self.cluster.grpc, config=config)

    def flags(self) -> list[str]:
        """Of a command that talks to the clients' doors."""
        flags = ["--tls-root-ca", str(self.parts.certificate), "--api-key", self.keys["ops"]]
        flags += ["--tls-client-cert", str(self.visitor.certificate)]
        return [*flags, "--tls-client-key", str(self.visitor.key)]

    def part_flags(self) -> list[str]:
        """Of any process of the deployment."""
        flags = ["--tls-cert", str(self.part.certificate), "--tls-key", str(self.part.key)]
        return [*flags, "--tls-ca", str(self.parts.certificate)]

    def metric(self, sample: str) -> float:
        for line in self.cluster.get("/metrics").text.splitlines():
            if line.startswith(sample + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def refused_by_workers(self) -> list[float]:
        """Connections, by each worker that the router names as a target."""
        context = ssl.create_default_context(cafile=str(self.parts.certificate))
        groups = self.cluster.get("/metrics/targets").json()
        urls = [f"https://{target}/metrics" for group in groups for target in group["targets"]]
        texts = [httpx.get(url, verify=context, timeout=10.0).text for url in urls]
        return [float(found[1]) if (found := REFUSED.search(t)) else 0.0 for t in texts]


def shown(pair: Pair | None, trusted: Authority) -> Tls:
    return Tls.from_files(
        root_certificates=trusted.certificate,
        certificate_chain=pair.certificate if pair else None,
        private_key=pair.key if pair else None,
    )


@pytest.fixture(scope="module")
def secured(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    parts, clients = Authority(directory, "parts"), Authority(directory, "clients")
    part = parts.sign("part", addresses=("127.0.0.1",))
    visitor = clients.sign("visitor")
    keys, known = {}, []
    for tenant in TENANTS:
        keys[tenant], key_id = draw_key()
        digest = digest_of(keys[tenant])
        known.append(ApiKey(id=key_id, tenant=tenant, sha256=digest, operator=tenant == "ops"))
    write_keys(directory / "keys.yaml", known)
    context = ssl.create_default_context(cafile=str(parts.certificate))
    context.load_cert_chain(visitor.certificate, visitor.key)
    access = HttpAccess(context, {"Authorization": f"Bearer {keys['ops']}"})
    port = free_port()
    flags = ["--decode", "2", "--page-size", str(PAGE), "--transport", "grpc", "--restart"]
    flags += ["--tls-cert", str(part.certificate), "--tls-key", str(part.key)]
    flags += ["--tls-ca", str(parts.certificate), "--tls-client-ca", str(clients.certificate)]
    flags += ["--api-keys-file", str(directory / "keys.yaml"), "--workers-port", str(port)]
    flags += ["--log-level", "debug"]
    with running_cluster(llama, directory, *flags, access=access) as cluster:
        yield Secured(cluster, parts, part, clients, visitor, keys, port)


@pytest.fixture(scope="module")
def undisturbed(secured: Secured) -> list[int]:
    with secured.client("acme") as client:
        answer = client.complete(PROMPT, max_tokens=LENGTH, temperature=0, ignore_eos=True)
    assert answer.report.transport == "grpc"
    assert answer.report.kv_bytes > 0
    return answer.token_ids


def test_a_worker_that_is_killed_is_replaced_without_a_gap(
    secured: Secured, undisturbed: list[int]
) -> None:
    cluster = secured.cluster
    with secured.client("acme") as client:
        for _ in range(5):  # on a busy machine an answer may be whole before its worker is found
            stream = client.generate(PROMPT, max_tokens=LENGTH, temperature=0, ignore_eos=True)
            ids = [token.id for token in next(stream).tokens]
            found = [w for w in cluster.workers() if w["role"] == "decode" and w["running"]]
            if found:
                break
            stream.close()
        (busy,) = found
        for pid in (*busy["engine_pids"], busy["pid"]):
            os.kill(pid, signal.SIGKILL)
        report = None
        for chunk in stream:
            ids += [token.id for token in chunk.tokens]
            report = chunk.report or report
    assert ids == undisturbed
    assert report is not None
    assert report.replays == 1
    cluster.wait_until_balanced()


def test_tenants_never_hit_each_others_prefixes(secured: Secured) -> None:
    prompt = [9, *PROMPT]
    cached: dict[str, list[int]] = {tenant: [] for tenant in ("acme", "other")}
    for tenant in ("acme", "acme", "other", "other", "acme"):
        with secured.client(tenant) as client:
            answer = client.complete(prompt, max_tokens=2, temperature=0)
        cached[tenant].append(answer.usage.cached_tokens)
    assert cached["acme"][0] == 0
    assert cached["other"][0] == 0, "what another tenant sent is not in its name space"
    assert min(*cached["acme"][1:], cached["other"][1]) >= 4 * PAGE, "its own prefixes are"
    secured.cluster.wait_until_balanced()


def test_every_command_works_with_certificate_and_key(
    secured: Secured, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster, flags = secured.cluster, secured.flags()
    assert main(["generate", "Hi", "--router", cluster.grpc, "--max-tokens", "2", *flags]) in (0, 1)
    assert main(["ps", "--router", cluster.grpc, *flags]) == 0
    assert "prefill" in capsys.readouterr().out
    assert main(["health", "--address", cluster.grpc, "--service", "baton.v1.Inference",
                 *secured.flags()]) == 0  # fmt: skip
    load = ["--requests", "2", "--concurrency", "1", "--input-length", "8", "--output-length", "4"]
    for url in (f"grpcs://{cluster.grpc}", cluster.http):
        target = tmp_path / "bench.json"
        given = ["--url", url, "--vocab-size", "300", "--json", str(target)]
        assert main(["bench", *given, *load, *flags]) == 0
        assert json.loads(target.read_text())["figures"]["failed"] == 0
    for worker in [w for w in cluster.workers() if w["state"] == "ready"]:
        inside = ["--address", worker["address"], "--service", "baton.v1.Worker"]
        assert main(["health", *inside, *secured.part_flags()]) == 0
    door = ["--router", f"127.0.0.1:{secured.workers_port}", *secured.part_flags()]
    assert main(["ps", *door]) == 0, "operators with a certificate of the parts need no key"


Attack = Callable[[str], None]
"""Something that is said to host:port, and must be refused."""


def garbage(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"\x00\xffnonsense\r\n\r\n" * 20)
        connection.settimeout(15)
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass


def calls(tls: Tls | None) -> Attack:
    """Every call that a part of the deployment would make, by one who shows that."""

    def attack(address: str) -> None:
        with ConnectionConfig(tls=tls).open(address) as channel:
            hello = worker_pb2.RouterMessage(hello=worker_pb2.SessionHello(router_id="r"))
            attempts: list[Callable[[], Any]] = [
                lambda: worker_pb2_grpc.WorkerStub(channel).Describe(
                    worker_pb2.DescribeRequest(), timeout=5
                ),
                lambda: next(worker_pb2_grpc.WorkerStub(channel).Session(iter([hello]), timeout=5)),
                lambda: next(kv_pb2_grpc.KvStub(channel).Session(iter([]), timeout=5)),
                lambda: worker_pb2_grpc.RegistryStub(channel).Register(
                    worker_pb2.RegisterRequest(instance_id="evil"), timeout=5
                ),
            ]
            for attempt in attempts:
                with pytest.raises(grpc.RpcError) as refused:
                    attempt()
                code = refused.value.code()  # type: ignore[attr-defined]
                assert code is grpc.StatusCode.UNAVAILABLE, code

    return attack


def foreign_worker(secured: Secured) -> worker_pb2.RegisterResponse:
    """One with a right certificate, of another model."""
    request = worker_pb2.RegisterRequest(
        protocol_version=PROTOCOL_VERSION,
        instance_id="decode-foreign",
        role=2,
        address="127.0.0.1:9",
        fingerprint="another",
    )
    connection = ConnectionConfig(tls=shown(secured.part, secured.parts))
    with connection.open(f"127.0.0.1:{secured.workers_port}") as channel:
        registry = worker_pb2_grpc.RegistryStub(channel)
        answer = registry.Register(request, timeout=5)
        listed = [w["state"] for w in secured.cluster.workers() if w["id"] == request.instance_id]
        assert listed == ["incompatible"]
        registry.Deregister(worker_pb2.DeregisterRequest(instance_id=request.instance_id))
    return answer


def test_strangers_are_refused_and_counted_while_a_stream_stays_exact(
    secured: Secured, undisturbed: list[int], tmp_path: Path
) -> None:
    cluster, parts = secured.cluster, secured.parts
    # One of them was killed before, and its successor may still be on its way.
    wait_for(lambda: len(ready(cluster, "decode")) == 2, "both decode workers", within_s=90.0)
    stranger = Authority(tmp_path, "stranger")
    late = parts.sign("late", addresses=("127.0.0.1",), lasts=timedelta(hours=-1))
    outsiders: dict[str, Attack] = {
        "garbage": garbage,
        "plain text": calls(None),
        "no certificate": calls(shown(None, parts)),
        "a stranger's certificate": calls(shown(stranger.sign("one"), parts)),
        "a client's certificate": calls(shown(secured.visitor, parts)),
        "an expired certificate": calls(shown(late, parts)),
    }
    workers = [w["address"] for w in cluster.workers() if w["state"] == "ready"]
    assert len(workers) == 3
    inside = [f"127.0.0.1:{secured.workers_port}", *workers]
    with secured.client("acme") as client:
        stream = client.generate(PROMPT, max_tokens=LENGTH, temperature=0, ignore_eos=True)
        ids = [token.id for token in next(stream).tokens]
        for address in inside:
            for attack in outsiders.values():
                attack(address)
        for attack in (garbage, calls(None), calls(shown(stranger.sign("two"), parts))):
            attack(cluster.grpc)
        https = cluster.http.removeprefix("https://")
        garbage(https)
        for context in (False, ssl.create_default_context(cafile=str(parts.certificate))):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"https://{https}/health", verify=context, timeout=5)
        wrong = ConnectionConfig(tls=shown(secured.visitor, parts), api_key=draw_key()[0])
        with pytest.raises(baton.Unauthenticated), baton.Client(cluster.grpc, config=wrong) as who:
            who.complete(PROMPT, max_tokens=1)
        headers = {"Authorization": f"Bearer {draw_key()[0]}"}
        answer = httpx.get(f"{cluster.http}/v1/models", verify=cluster.access.verify,
                           headers=headers)  # fmt: skip
        assert answer.status_code == 401
        foreign = foreign_worker(secured)
        assert not foreign.accepted
        assert "fingerprint" in foreign.reason
        ids += [token.id for chunk in stream for token in chunk.tokens]
    assert ids == undisturbed
    for door in ("grpc", "http"):
        assert secured.metric(f'baton_auth_failures_total{{door="{door}",reason="unknown"}}') >= 1
    assert secured.metric('baton_workers_refused_total{reason="fingerprint"}') >= 1
    least = {"grpc": 3, "workers": len(outsiders), "http": 3}
    deadline = time.monotonic() + 30.0
    for door, count in least.items():
        sample = f'baton_connections_refused_total{{door="{door}",reason="handshake"}}'
        while secured.metric(sample) < count:
            assert time.monotonic() < deadline, f"{door}: {secured.metric(sample)}"
            time.sleep(0.2)
    while min(counts := secured.refused_by_workers()) < len(outsiders):
        assert time.monotonic() < deadline, f"workers: {counts}"
        time.sleep(0.2)
    assert len(counts) == len(workers)
    cluster.wait_until_balanced()


def test_drain_is_ordered_through_the_workers_door(secured: Secured) -> None:
    cluster = secured.cluster
    wait_for(lambda: len(ready(cluster, "decode")) == 2, "both decode workers", within_s=90.0)
    worker = cluster.worker("decode")
    door = ["--router", f"127.0.0.1:{secured.workers_port}"]
    assert main(["drain", worker["id"], *door, *secured.part_flags()]) == 0
    with secured.client("acme") as client:
        assert len(client.complete(PROMPT, max_tokens=3, ignore_eos=True).token_ids) == 3
    cluster.wait_until_balanced()


def test_no_log_holds_a_secret(secured: Secured) -> None:
    log = secured.cluster.log.read_text()
    assert len(log) > 1000
    secrets = [*secured.keys.values()]
    secrets += [key.rpartition("_")[2] for key in secured.keys.values()]
    # Its last line may be a letter or two, which any log holds.
    secrets += [line for line in secured.part.key.read_text().splitlines() if len(line) > 32]
    for secret in secrets:
        assert secret not in log
    assert not re.search(r"bearer\s+\S|BEGIN [A-Z ]*PRIVATE KEY", log, re.IGNORECASE)

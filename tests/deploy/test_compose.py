"""deploy/compose.yaml and its images, with real containers and clients from outside."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from baton import Client
from tests.deploy.container_engine import Engine
from tests.deploy.stack import ADDRESSES, COMPOSE, Stack, settings
from tests.deploy.traffic import PROMPT, TOKENS, Traffic, check_exact_or_typed

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]

LIMIT_S = 5.0
"""Longest silence after a fault: by then there are tokens, or an error."""
PATIENCE_S = 4.0
"""Of a client whose router itself is out of reach: nobody else can tell it so."""
WORKERS = ("prefill-1", "decode-1")
FAULTS = ("pause", "kill", "stop", "disconnect", "deaf", "mute")


@pytest.fixture(scope="module")
def expected(stack: Stack) -> str:
    with Client(stack.grpc) as client:
        answer = client.complete(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return answer.text


@pytest.fixture(autouse=True)
def _whole_afterwards(stack: Stack) -> Iterator[None]:
    yield
    stack.wait_until_whole()


# ---- the images ----------------------------------------------------------------------------------


def test_the_router_image_is_small_and_holds_no_torch(engine: Engine) -> None:
    size = int(engine.docker("image", "inspect", "--format", "{{.Size}}", "baton/router:test"))
    assert size < 250e6
    listed = engine.docker(
        *("run", "--rm", "--entrypoint", "python3", "baton/router:test", "-c"),
        "import importlib.util as u; print([u.find_spec(n) for n in ('torch', 'numpy', 'pip')])",
    )
    assert listed == "[None, None, None]"


@pytest.mark.parametrize("image", ["baton/router:test", "baton/worker-cpu:test"])
def test_an_image_says_what_it_is_and_runs_as_nobody(engine: Engine, image: str) -> None:
    asked = '{{.Config.User}} {{index .Config.Labels "org.opencontainers.image.licenses"}}'
    assert engine.docker("image", "inspect", "--format", asked, image) == "10001:10001 Apache-2.0"
    assert "HEALTHCHECK" in engine.docker("image", "history", "--no-trunc", image)
    assert engine.docker("run", "--rm", "--network", "none", image, "version").startswith("baton ")


def test_a_worker_in_the_router_image_says_what_is_missing(engine: Engine) -> None:
    said = engine.docker(
        *("run", "--rm", "--entrypoint", "sh", "baton/router:test", "-c"),
        "baton prefill --model /models/baton-tiny 2>&1; echo status $?",
    )
    assert "needs torch" in said
    assert said.endswith("status 2")


@pytest.mark.parametrize("overrides", [["gpu"], ["tls", "keys"], ["gpu", "tls", "keys"]])
def test_compose_takes_every_override_and_the_profile(engine: Engine, overrides: list[str]) -> None:
    files = (COMPOSE, *(COMPOSE.with_name(f"compose.{name}.yaml") for name in overrides))
    given = settings(0, 0) | {"TLS_DIR": "/tls", "KEYS_DIR": "/keys"}
    stack = Stack(engine, given, http="", grpc="", files=files)
    merged = json.loads(stack.compose("--profile", "observability", "config", "--format", "json"))
    services = merged["services"]
    assert {*ADDRESSES, "prometheus", "grafana"} <= services.keys()
    workers = [services[name] for name in ADDRESSES if name[:-2] in ("prefill", "decode")]
    assert all(
        ("devices" in str(worker.get("deploy"))) == ("gpu" in overrides) for worker in workers
    )


# ---- the deployment ------------------------------------------------------------------------------


def test_every_container_is_confined(stack: Stack) -> None:
    for service in ADDRESSES:
        host = stack.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert not host["Privileged"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service


def test_health_checks_turn_healthy(stack: Stack) -> None:
    deadline = time.monotonic() + 180
    states: dict[str, str] = {}
    while time.monotonic() < deadline:
        states = {name: stack.inspect(name)["State"]["Health"]["Status"] for name in ADDRESSES}
        if set(states.values()) == {"healthy"}:
            return
        time.sleep(1.0)
    raise AssertionError(states)


def test_the_documented_demo_answers(stack: Stack, expected: str) -> None:
    said = stack.compose("exec", "-T", "router", "baton", "generate", PROMPT, "--max-tokens", "8")
    assert said.strip()
    assert expected.strip().startswith(said.strip())


def test_both_doors_answer_many_clients_from_outside_alike(stack: Stack, expected: str) -> None:
    streams = Traffic(stack.http, stack.grpc, each=3).wait(120.0)
    assert [stream.error for stream in streams] == [None] * 6
    check_exact_or_typed(streams, expected)


def test_metrics_show_all_workers(stack: Stack) -> None:
    text = httpx.get(f"{stack.http}/metrics", timeout=10.0).text
    for role in ("prefill", "decode"):
        assert f'baton_workers{{role="{role}",state="ready"}} 2.0' in text


def test_garbage_is_counted_by_a_process_without_privileges(stack: Stack) -> None:
    host, _, port = stack.grpc.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        connection.sendall(b"no HTTP/2 at all\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    sample = re.compile(
        r'^baton_connections_refused_total\{door="grpc",reason="no_call"\} [1-9]', re.MULTILINE
    )
    deadline = time.monotonic() + 40
    while not sample.search(httpx.get(f"{stack.http}/metrics", timeout=10.0).text):
        assert time.monotonic() < deadline, "it was not counted"
        time.sleep(0.5)


# ---- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("service", WORKERS)
def test_a_workers_fault_gives_exact_tokens_or_a_typed_error(
    stack: Stack, expected: str, service: str, fault: str
) -> None:
    traffic = Traffic(stack.http, stack.grpc)
    traffic.wait_until_begun()
    since = time.monotonic()
    stack.fault(fault, service)
    try:
        streams = traffic.wait(120.0)
        check_exact_or_typed(streams, expected)
        for stream in streams:
            assert stream.longest_silence_s(since) < LIMIT_S, (stream.door, stream.error)
        # The other worker of the role goes on: a new request is served while the fault lasts.
        with Client(stack.grpc) as client:
            answer = client.complete(PROMPT, max_tokens=16, temperature=0, ignore_eos=True)
        assert expected.startswith(answer.text)
    finally:
        stack.heal(fault, service)
    stack.wait_until_whole()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_registry_is_not_noticed(stack: Stack, expected: str, fault: str) -> None:
    traffic = Traffic(stack.http, stack.grpc)
    traffic.wait_until_begun()
    stack.fault(fault, "redis")
    try:
        streams = traffic.wait(120.0)
        assert [stream.error for stream in streams] == [None] * len(streams)
        check_exact_or_typed(streams, expected)
    finally:
        stack.heal(fault, "redis")
    stack.wait_until_whole()


@pytest.mark.parametrize("fault", ["deaf", "mute"])
def test_a_router_cut_off_from_its_workers_says_so(stack: Stack, expected: str, fault: str) -> None:
    traffic = Traffic(stack.http, stack.grpc)
    traffic.wait_until_begun()
    since = time.monotonic()
    stack.fault(fault, "router")
    try:
        streams = traffic.wait(60.0)
        check_exact_or_typed(streams, expected)
        for stream in streams:
            assert stream.longest_silence_s(since) < LIMIT_S, (stream.door, stream.error)
    finally:
        stack.heal(fault, "router")
    stack.wait_until_whole()


@pytest.mark.parametrize("fault", ["pause", "kill", "disconnect"])
def test_a_router_out_of_reach_is_a_typed_error(stack: Stack, expected: str, fault: str) -> None:
    traffic = Traffic(stack.http, stack.grpc, timeout_s=PATIENCE_S)
    traffic.wait_until_begun()
    since = time.monotonic()
    stack.fault(fault, "router")
    try:
        streams = traffic.wait(60.0)
        check_exact_or_typed(streams, expected)
        for stream in streams:
            assert stream.longest_silence_s(since) < LIMIT_S, (stream.door, stream.error)
    finally:
        stack.heal(fault, "router")
    stack.wait_until_whole()


def test_a_router_that_is_stopped_finishes_its_streams(stack: Stack, expected: str) -> None:
    traffic = Traffic(stack.http, stack.grpc)
    traffic.wait_until_begun()
    stack.fault("stop", "router")
    streams = traffic.wait(60.0)
    stack.heal("stop", "router")
    assert [stream.error for stream in streams] == [None] * len(streams)
    check_exact_or_typed(streams, expected)
    stack.wait_until_whole()

"""What operators rely on: readiness, reflection, transports by name, draining, other dtypes."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton import AsyncClient, Client
from baton.errors import RequestError
from tests.e2e.cluster import Cluster, running_cluster
from tests.forked import executed

SERVING = health_pb2.HealthCheckResponse.SERVING

READINESS = {
    "router": "baton.v1.Inference",
    "prefill": "baton.v1.Worker",
    "decode": "baton.v1.Worker",
}
SERVICES = {
    "router": {"baton.v1.Inference", "baton.v1.Registry"},
    "prefill": {"baton.v1.Worker"},
    "decode": {"baton.v1.Worker", "baton.v1.Kv"},
}


@pytest.fixture
def as_an_operators() -> Iterator[None]:
    """Processes are started and ended as an operator's are, imports and all."""
    with executed():
        yield


@pytest.mark.parametrize("server", ["router", "prefill", "decode"])
def test_every_server_tells_its_health_and_its_services(small_memory: Cluster, server: str) -> None:
    address = small_memory.grpc if server == "router" else small_memory.worker(server)["address"]
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", READINESS[server]):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answer = next(stub.ServerReflectionInfo(iter([ask]), timeout=5))
        listed = {service.name for service in answer.list_services_response.service}
        assert SERVICES[server] | {"grpc.health.v1.Health"} <= listed


def test_a_message_over_the_size_limit_is_refused_and_the_next_works(
    small_memory: Cluster,
) -> None:
    with Client(small_memory.grpc) as client:
        with pytest.raises(RequestError, match="larger than max"):
            client.complete("x" * (40 << 20), max_tokens=1)
        assert client.complete([5, 6], max_tokens=2, ignore_eos=True).finish_reason == "length"
    small_memory.wait_until_balanced()


@pytest.fixture
def without_nixl(as_an_operators: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where NIXL is not installed: importing it fails."""
    for name in ("nixl_cu13", "nixl_cu12", "nixl"):
        package = tmp_path / "absent" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))


@pytest.mark.usefixtures("without_nixl")
def test_auto_falls_back_to_grpc_where_nixl_is_missing(llama: Path, tmp_path: Path) -> None:
    with (
        running_cluster(llama, tmp_path, "--transport", "auto") as cluster,
        Client(cluster.grpc) as client,
    ):
        assert client.complete([5] * 70, max_tokens=3).report.transport == "grpc"


@pytest.mark.usefixtures("without_nixl")
def test_nixl_by_name_fails_at_start_where_it_is_missing(llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="transport nixl is not available"),
        running_cluster(llama, tmp_path, "--transport", "nixl"),
    ):
        pass


@pytest.mark.usefixtures("as_an_operators")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stream_that_runs_is_finished_before_everything_stops(
    llama: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with running_cluster(llama, tmp_path) as cluster, Client(cluster.grpc) as client:
        stream = client.generate([5] * 70, max_tokens=300, ignore_eos=True, temperature=0)
        tokens = len(next(stream).tokens)
        threading.Timer(0.0, cluster.process.send_signal, [number]).start()
        tokens += sum(len(chunk.tokens) for chunk in stream)
        assert tokens == 300
        assert cluster.process.wait(timeout=30) == 0


async def test_bfloat16_on_a_cpu_serves_and_a_cancelled_stream_frees_its_pages(
    llama: Path, tmp_path: Path
) -> None:
    with running_cluster(llama, tmp_path, "--dtype", "bfloat16") as cluster:
        async with AsyncClient(cluster.grpc) as client:
            done = await client.complete([5] * 70, max_tokens=5, ignore_eos=True, temperature=0)
            assert len(done.token_ids) == 5
            async with client.generate([5] * 70, max_tokens=800, ignore_eos=True) as stream:
                await anext(aiter(stream))
            began = time.monotonic()
        cluster.wait_until_balanced()
        assert time.monotonic() - began < 2.0

"""`baton health` against real servers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.cli import main

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[tuple[health.HealthServicer, str]]:
    checks = health.HealthServicer()
    with ThreadPoolExecutor(2) as pool:
        made = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(checks, made)
        port = made.add_insecure_port("127.0.0.1:0")
        made.start()
        yield checks, f"127.0.0.1:{port}"
        stopped: threading.Event = made.stop(grace=None)
        stopped.wait(5)


def test_a_serving_process_is_healthy(
    server: tuple[health.HealthServicer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    checks, address = server
    checks.set("baton.v1.Worker", SERVING)
    assert main(["health", "--address", address, "--service", "baton.v1.Worker"]) == 0
    assert main(["health", "--address", address]) == 0
    assert capsys.readouterr().out == "SERVING\nSERVING\n"


def test_a_draining_worker_is_not(server: tuple[health.HealthServicer, str]) -> None:
    checks, address = server
    checks.set("baton.v1.Worker", NOT_SERVING)
    assert main(["health", "--address", address, "--service", "baton.v1.Worker"]) == 1


def test_an_unknown_service_or_nobody_at_all_is_said_in_one_line(
    server: tuple[health.HealthServicer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, address = server
    assert main(["health", "--address", address, "--service", "baton.v1.Nothing"]) == 1
    assert main(["health", "--address", "127.0.0.1:1", "--timeout-s", "2"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert main(["health", "--timeout-s", "0"]) == 2

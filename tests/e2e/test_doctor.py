"""`baton doctor` on a running Baton: what it says, and that it leaves nothing behind."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import statuses

MODEL = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With gRPC, which is slow enough to be complained of."""
    flags = ("--transport", "grpc", "--landing-slots", "128")
    with running_cluster(MODEL, tmp_path_factory.mktemp("doctor"), *flags) as running:
        yield running


def doctor(cluster: Cluster, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton", "doctor", "--router", cluster.grpc, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def assert_nothing_is_left(cluster: Cluster) -> None:
    cluster.wait_until_balanced()
    for status in statuses(cluster).values():
        assert (status.slots_granted, status.slots_quarantined) == (0, 0)


def test_a_slow_transport_is_measured_and_warned_of(cluster: Cluster) -> None:
    seen = doctor(cluster, "--probe-rounds", "1")
    assert seen.returncode == 1, seen
    assert "grpc" in seen.stdout
    assert "cpu → cpu" in seen.stdout
    assert "% of a plain copy" in seen.stdout
    assert "see why NIXL is not taken" in seen.stdout
    assert_nothing_is_left(cluster)


def test_running_requests_and_a_probe_do_not_disturb_one_another(cluster: Cluster) -> None:
    body = {"prompt": "one two three", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = cluster.complete(**body).json()["choices"][0]["text"]
    texts: list[str] = []

    def ask() -> None:
        texts.append(cluster.complete(**body).json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = doctor(cluster, "--probe-rounds", "3")
    for thread in threads:
        thread.join()
    assert "not measured" not in seen.stdout, seen
    assert texts == [alone] * 4
    assert_nothing_is_left(cluster)


def test_without_a_router_it_says_so(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "baton", "doctor", "--router", "127.0.0.1:1"]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert seen.returncode == 1
    assert seen.stderr.startswith("baton: ")

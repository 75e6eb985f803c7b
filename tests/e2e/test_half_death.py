"""A worker is two processes: when one dies, the other ends within a second; when its engine stands
still, its living front must not make it look alive.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton import Client
from baton.errors import RequestError
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import wait_for

LIMIT_S = 1.0
ERROR_LIMIT_S = 5.0


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(llama, tmp_path_factory.mktemp("half")) as running:
        yield running


@contextlib.contextmanager
def _own_worker(cluster: Cluster, model: Path, role: str, log: Path) -> Iterator[dict[str, Any]]:
    """A worker that nobody supervises: what dies with it does so by itself."""
    known = {worker["id"] for worker in cluster.workers()}

    def new() -> list[dict[str, Any]]:
        return [w for w in cluster.workers() if w["id"] not in known and w["state"] == "ready"]

    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", role, "--model", str(model), "--device", "cpu",
             "--router", cluster.grpc],
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(new, "a worker of our own", within_s=60.0)
        yield new()[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("victim", ["front", "engine"])
def test_either_half_ends_with_the_other(
    cluster: Cluster, llama: Path, tmp_path: Path, role: str, victim: str
) -> None:
    with _own_worker(cluster, llama, role, tmp_path / "worker.log") as worker:
        front = psutil.Process(worker["pid"])
        engine = psutil.Process(worker["engine_pids"][0])
        killed, other = (front, engine) if victim == "front" else (engine, front)
        started = time.monotonic()
        killed.kill()
        wait_for(lambda: _is_gone(other), "the other's end", within_s=LIMIT_S)
        wait_for(lambda: not _is_ready(cluster, worker["id"]), "its loss", within_s=LIMIT_S)
        assert time.monotonic() - started < 2 * LIMIT_S
    with Client(cluster.grpc) as client:
        assert client.complete([5, 6, 7], max_tokens=4, ignore_eos=True).finish_reason == "length"
    cluster.wait_until_balanced()


def _is_gone(process: psutil.Process) -> bool:
    """Ended, reaped by its parent or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def _is_ready(cluster: Cluster, instance_id: str) -> bool:
    return any(w["id"] == instance_id and w["state"] == "ready" for w in cluster.workers())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_stands_still_alone_is_noticed(cluster: Cluster, role: str) -> None:
    """Front and heartbeats go on all the while, and dialling anew must not bring it back."""
    worker = cluster.worker(role)
    (engine,) = worker["engine_pids"]
    with Client(cluster.grpc) as client:
        os.kill(engine, signal.SIGSTOP)
        try:
            for _ in range(2):
                started = time.monotonic()
                with pytest.raises(RequestError):
                    client.complete([5, 6, 7], max_tokens=4, ignore_eos=True, timeout=20.0)
                assert time.monotonic() - started < ERROR_LIMIT_S
            assert not _is_ready(cluster, worker["id"])
        finally:
            os.kill(engine, signal.SIGCONT)
        cluster.wait_until_ready()
        assert client.complete([5, 6, 7], max_tokens=4, ignore_eos=True).finish_reason == "length"
    cluster.wait_until_balanced()

"""Routers and workers started one by one, as on several machines."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from tests.e2e.cluster import Cluster

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Parts:
    """Processes of one test; each may be stopped, killed and started again."""

    def __init__(self, model: Path, directory: Path) -> None:
        self._model = model
        self._directory = directory
        self._processes: list[subprocess.Popen[str]] = []

    def router(self, *flags: str, like: Cluster | None = None) -> Cluster:
        """A router, not ready yet; `like` another one that has ended: at the same doors."""
        http = int(like.http.rpartition(":")[2]) if like else free_port()
        grpc = int(like.grpc.rpartition(":")[2]) if like else free_port()
        doors = ("--http-port", str(http), "--grpc-port", str(grpc))
        process, log = self._start("router", *doors, "--tokenizer", str(self._model), *flags)
        cluster = Cluster(process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        deadline = time.monotonic() + START_LIMIT_S
        while not _answers(cluster.http):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the router does not answer"
            time.sleep(0.05)
        return cluster

    def worker(self, role: str, *routers: Cluster, flags: tuple[str, ...] = ()) -> Cluster:
        """A worker that registers with these routers; only its process and log mean anything."""
        addresses = ",".join(router.grpc for router in routers)
        worker = ("--model", str(self._model), "--device", "cpu", "--router", addresses)
        process, log = self._start(role, *worker, *flags)
        return Cluster(process, "", "", log)

    def _start(self, command: str, *flags: str) -> tuple[subprocess.Popen[str], Path]:
        log = self._directory / f"{len(self._processes)}-{command}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "baton", command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)
        return process, log

    def close(self) -> None:
        """Stops all in order, and checks that nothing is left."""
        running = [p for p in self._processes if p.poll() is None]
        families = [c for p in running for c in psutil.Process(p.pid).children(recursive=True)]
        # Routers first, so that no request meets a worker that is gone.
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            assert process.wait(timeout=STOP_LIMIT_S) == 0, f"{process.args} ended badly"
        _, alive = psutil.wait_procs(families, timeout=5)
        assert not alive, f"left running: {alive}"

    def kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


@contextlib.contextmanager
def running_parts(model: Path, directory: Path) -> Iterator[Parts]:
    parts = Parts(model, directory)
    try:
        yield parts
        parts.close()
    finally:
        parts.kill()


def _answers(http: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        httpx.get(f"{http}/health", timeout=2.0)
        return True
    return False

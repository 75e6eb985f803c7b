"""A whole Baton on this machine for a test: `baton up` as a user would start it."""

import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.forked import executed_nevertheless, is_spawner

START_LIMIT_S = 90.0
IDLE_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class HttpAccess:
    """What a test shows at the HTTP door, and whom it trusts there."""

    verify: ssl.SSLContext | bool = True
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Cluster:
    """Addresses and processes of one running `baton up`."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    log: Path
    access: HttpAccess = field(default_factory=HttpAccess)

    def get(self, path: str, *, timeout_s: float = 10.0) -> httpx.Response:
        access = self.access
        return httpx.get(
            self.http + path, timeout=timeout_s, verify=access.verify, headers=access.headers
        )

    def workers(self) -> list[dict[str, Any]]:
        response = self.get("/workers")
        response.raise_for_status()
        listed: list[dict[str, Any]] = response.json()
        return listed

    def worker(self, role: str) -> dict[str, Any]:
        return next(w for w in self.workers() if w["role"] == role and w["state"] == "ready")

    def complete(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.http}/v1/completions", json=body, timeout=60.0)

    def wait_until_balanced(self) -> None:
        """Every page of every live worker is free or cached again, and the counts add up."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            live = [w for w in self.workers() if w["state"] in ("ready", "draining")]
            pages = [w["pages"] for w in live]
            for p in pages:
                total = p["free"] + p["cached"] + p["held"] + p["in_use"]
                assert total == p["total"], f"pages do not add up: {p}"
            if all(p["held"] == 0 and p["in_use"] == 0 for p in pages):
                return
            assert time.monotonic() < deadline, f"pages are still owned while idle: {pages}"
            time.sleep(0.05)

    def wait_until_ready(self, *, limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while self.get("/health", timeout_s=5.0).status_code != 200:
            assert time.monotonic() < deadline, "no usable pair of workers came back"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        return [process for process in family if not is_spawner(process)]


@contextlib.contextmanager
def running_cluster(
    model: Path, directory: Path, *flags: str, access: HttpAccess | None = None
) -> Iterator[Cluster]:
    """Starts `baton up`, yields it when ready, stops it with SIGTERM and checks what is left.

    One thread an engine: two that wait for one another on cores that others use spin most of the
    time, and a step of 3 ms took 50 of CPU.
    """
    log = directory / "up.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", "up", "--model", str(model), "--device", "cpu",
             "--http-port", "0", "--grpc-port", "0", "--threads", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        ready = _ready_line(process, log)
        cluster = Cluster(
            process,
            http=_address(ready, r"(https?://[\d.]+:\d+)"),
            grpc=_address(ready, r"grpcs?://([\d.]+:\d+)"),
            log=log,
            access=access or HttpAccess(),
        )
        slow = executed_nevertheless(cluster.processes())
        assert not slow, f"imported everything anew, for seconds of CPU: {slow}"
        yield cluster
        if process.poll() is not None:
            return  # the test has stopped it
        cluster.wait_until_balanced()
        family = cluster.processes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0, log.read_text()[-4000:]
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left running: {alive}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()


def _ready_line(process: subprocess.Popen[str], log: Path) -> str:
    if process.stdout is None:
        raise AssertionError("baton up was started without a pipe")
    deadline = time.monotonic() + START_LIMIT_S
    line = process.stdout.readline()
    assert line.startswith("ready:"), f"baton up said {line!r}; its log:\n{log.read_text()[-6000:]}"
    assert time.monotonic() < deadline
    return line


def _address(line: str, pattern: str) -> str:
    match = re.search(pattern, line)
    assert match is not None, f"no address in {line!r}"
    return match.group(1)

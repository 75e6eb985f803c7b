"""deploy/compose.yaml as the tests run it: up, faults on its containers, and down again."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.deploy.container_engine import Engine, EngineError, stand_in, twice

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
WHEELS = ROOT / "deploy" / "wheels"
PROJECT = "baton-test"
SUBNET = "172.31.88"
ADDRESSES = {
    "redis": 9,
    "router": 10,
    "prefill-1": 21,
    "prefill-2": 22,
    "decode-1": 31,
    "decode-2": 32,
}
"""Last number of each container's address, as the compose file fixes them."""

REDIS_IMAGE = "redis:7.4.2-bookworm"
SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
"""Where systems keep the authorities they trust: a build behind a proxy needs the proxy's."""

UP_LIMIT_S = 400.0
PAUSE_TRIES = 5
RULE_TRIES = 3
MOST_RESTARTS = 3
"""Ends of one container, without a test's doing, after which it will never serve."""
BUILD_LIMIT_S = 900.0
BALANCE_LIMIT_S = 20.0


@dataclass(frozen=True)
class Stack:
    """A running deployment, seen from outside and from its engine."""

    engine: Engine
    settings: dict[str, str]
    http: str
    grpc: str
    stopping: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """`docker stop`s that wait for a drain, by service."""
    project: str = PROJECT
    files: tuple[Path, ...] = (COMPOSE,)

    def compose(self, *arguments: str, limit_s: float = 120.0) -> str:
        files = [word for file in self.files for word in ("--file", str(file))]
        command = ("compose", "--project-name", self.project, *files)
        return self.engine.docker(*command, *arguments, limit_s=limit_s, more=self.settings)

    # ---- what is there --------------------------------------------------------------------------

    def container(self, service: str) -> str:
        return f"{PROJECT}-{service}-1"

    def inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(
            self.engine.docker("inspect", self.container(service))
        )
        return found[0]

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40")

    def workers(self) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.http}/workers", timeout=10.0)
        response.raise_for_status()
        listed: list[dict[str, Any]] = response.json()
        return listed

    def service_of(self, worker: dict[str, Any]) -> str:
        last = int(worker["address"].split(":")[0].rsplit(".", 1)[1])
        return next(name for name, number in ADDRESSES.items() if number == last)

    def wait_until_whole(self, limit_s: float = UP_LIMIT_S) -> None:
        """All four workers are ready, and every page of each is free or cached."""
        deadline = time.monotonic() + limit_s
        seen: object = None
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                listed = self.workers()
                seen = [(w["id"], w["state"], w["pages"]) for w in listed]
                ready = [w for w in listed if w["state"] == "ready"]
                four = len({w["address"] for w in ready}) == 4
                if four and self._healthy() and self._all_run():
                    self.wait_until_balanced()
                    return
            restarts = {name: self.inspect(name)["RestartCount"] for name in ADDRESSES}
            if max(restarts.values()) > MOST_RESTARTS:
                raise AssertionError(f"containers end again and again: {restarts}\n{self.logs()}")
            time.sleep(0.25)
        raise AssertionError(f"not whole after {limit_s:.0f} s: {seen}\n{self.logs()}")

    def _all_run(self) -> bool:
        """A worker is listed for a moment longer than its container lives."""
        return all(self.inspect(name)["State"]["Running"] for name in ADDRESSES)

    def _healthy(self) -> bool:
        return httpx.get(f"{self.http}/health", timeout=5.0).status_code == 200

    def wait_until_balanced(self) -> None:
        deadline = time.monotonic() + BALANCE_LIMIT_S
        while True:
            pages = {w["id"]: w["pages"] for w in self.workers() if w["state"] == "ready"}
            for worker, p in pages.items():
                total = p["free"] + p["cached"] + p["held"] + p["in_use"]
                assert total == p["total"], f"pages of {worker} do not add up: {p}"
            if all(p["held"] == 0 and p["in_use"] == 0 for p in pages.values()):
                return
            assert time.monotonic() < deadline, f"pages are still owned while idle: {pages}"
            time.sleep(0.1)

    # ---- faults ---------------------------------------------------------------------------------

    def fault(self, kind: str, service: str) -> None:
        """pause, kill, stop, disconnect; deaf: nothing of its peers arrives; mute: nothing of it
        arrives at its peers. Clients of the published ports are no peers."""
        if kind == "pause":
            self._pause(service)
        elif kind == "kill":
            self.engine.docker(kind, self.container(service))
        elif kind == "stop":
            # In the background: a stop waits for the drain, and that for the requests.
            self.stopping[service] = subprocess.Popen(
                ["docker", "stop", "--time", "75", self.container(service)],
                env={**os.environ, **self.engine.environment},
                stdout=subprocess.DEVNULL,
            )
        elif kind == "disconnect":
            self.engine.docker(
                "network", "disconnect", f"{PROJECT}_private", self.container(service)
            )
        else:
            self._partition(kind, service, add=True)

    def _pause(self, service: str) -> None:
        """Tries again where the runtime cannot freeze a container that is starting a process, such
        as its health check.
        """
        for left in reversed(range(PAUSE_TRIES)):
            try:
                self.engine.docker("pause", self.container(service))
                return
            except EngineError as error:
                if "unable to freeze" not in str(error) or not left:
                    raise
            time.sleep(0.2)

    def heal(self, kind: str, service: str) -> None:
        if kind == "pause":
            self.engine.docker("unpause", self.container(service))
        elif kind in ("kill", "stop"):
            if service in self.stopping:
                self.stopping.pop(service).wait(timeout=90)
            self.engine.docker("wait", self.container(service))
            self.engine.docker("start", self.container(service))
        elif kind == "disconnect":
            address = f"{SUBNET}.{ADDRESSES[service]}"
            self.engine.docker(
                *("network", "connect", "--ip", address),
                *(f"{PROJECT}_private", self.container(service)),
            )
        else:
            self._partition(kind, service, add=False)

    def _partition(self, kind: str, service: str, *, add: bool) -> None:
        """Drops packets inside the container's own network name space, on every interface."""
        chain, end = {"deaf": ("INPUT", "--source"), "mute": ("OUTPUT", "--destination")}[kind]
        for other, number in ADDRESSES.items():
            if other != service:
                rule = (chain, end, f"{SUBNET}.{number}", "--jump", "DROP")
                self._packets(service, "-A" if add else "-D", *rule)

    def _packets(self, service: str, *rule: str) -> None:
        """Tries again: it failed once in some hundred times, beside much else."""
        for left in reversed(range(RULE_TRIES)):
            pid = str(self.inspect(service)["State"]["Pid"])
            done = subprocess.run(
                ["nsenter", "-t", pid, "-n", "iptables", *rule],
                check=False,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                return
            if not left:
                raise EngineError(f"iptables {' '.join(rule)} of {service}: {done.stderr}")
            time.sleep(0.2)


def build_images(engine: Engine) -> None:
    """The images of the compose file, one after the other; the machine's CA and wheels at hand."""
    project = Stack(engine, settings(0, 0), http="", grpc="")
    # What a run that was killed left must not compete with the build.
    project.compose("down", "--volumes", "--timeout", "1")
    _fetch_torch()
    stand_in(engine, REDIS_IMAGE, "redis-server", "redis-tools")
    for service in ("router", "prefill-1"):
        twice(partial(project.compose, "build", service, limit_s=BUILD_LIMIT_S))


def _fetch_torch() -> None:
    """torch's CPU build as this machine's pip finds it; without one, the build looks for itself."""
    if any(WHEELS.glob("torch-*.whl")):
        return
    lock = ROOT / "deploy" / "requirements" / "torch-cpu.txt"
    command = (
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
        *("--python-version", "3.11", "--only-binary", ":all:", "--dest", str(WHEELS)),
        *("--requirement", str(lock)),
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, check=False, timeout=BUILD_LIMIT_S)


def settings(http_port: int, grpc_port: int) -> dict[str, str]:
    """The compose file's variables."""
    values = {
        "HTTP_PORT": str(http_port),
        "GRPC_PORT": str(grpc_port),
        "SUBNET": SUBNET,
        "TAG": "test",
    }
    known = (os.environ.get("SSL_CERT_FILE", ""), *SYSTEM_BUNDLES)
    bundle = next((path for path in known if path and Path(path).is_file()), "")
    return values | ({"CA_BUNDLE": bundle} if bundle else {})


@contextlib.contextmanager
def running_stack(engine: Engine) -> Iterator[Stack]:
    """The documented `docker compose up`, and down with volumes at the end."""
    http_port, grpc_port = free_port(), free_port()
    stack = Stack(
        engine,
        settings(http_port, grpc_port),
        http=f"http://127.0.0.1:{http_port}",
        grpc=f"127.0.0.1:{grpc_port}",
    )
    stack.compose("down", "--volumes", "--timeout", "1")
    try:
        # As documented: the images are built before, and so in the cache.
        stack.compose("up", "--build", "--wait", limit_s=UP_LIMIT_S)
        stack.wait_until_whole()
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "1")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

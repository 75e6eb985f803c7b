"""One pod on its node: volumes, containers, probes, and its end, as its description asks."""

import base64
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.kubernetes.api import Api, Object
from tests.kubernetes.container import ENTRYPOINT, Container, Mount, Sandbox, image_environment
from tests.kubernetes.network import HOST

HEALTH = re.compile(
    r'baton health --address "\$\{BATON_HOST:-127\.0\.0\.1\}:(\d+)"(?: --service (\S+))?$'
)
"""The probe of clusters that have no gRPC probes. Asking in its place costs no process."""


class ProbeError(Exception):
    """A probe that these tests cannot play."""


@dataclass
class Probe:
    """One kind of probe of one container."""

    spec: Object
    address: str
    execute: "Callable[..., subprocess.CompletedProcess[str]]"
    """Runs a command in the container."""
    failures: int = 0
    passed: bool = False
    """Its last word, once it has passed or failed often enough."""
    asked_at: float = 0.0
    pending: "Future[bool] | None" = None

    def step(self, pool: Executor) -> None:
        if self.pending is not None:
            if not self.pending.done():
                return
            good, self.pending = self.pending.result(), None
            self.failures = 0 if good else self.failures + 1
            if good:
                self.passed = True
            elif self.failures >= self.spec.get("failureThreshold", 3):
                self.passed = False
        if time.monotonic() - self.asked_at >= self.spec.get("periodSeconds", 10):
            self.asked_at = time.monotonic()
            self.pending = pool.submit(self._ask)

    def _ask(self) -> bool:
        command = self.spec.get("exec", {}).get("command", [""])
        if "--tls-cert" in command[-1]:
            # With certificates that only the container has.
            try:
                return self.execute(*command).returncode == 0
            except subprocess.TimeoutExpired:
                return False
        port, service = target(self.spec)
        # A loaded test machine is slower than a node.
        limit_s = max(5.0, self.spec.get("timeoutSeconds", 1))
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        try:
            with grpc.insecure_channel(f"{self.address}:{port}", options) as channel:
                request = health_pb2.HealthCheckRequest(service=service)
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=limit_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def target(spec: Object) -> tuple[int, str]:
    """Port and service that a probe asks."""
    command = spec.get("exec", {}).get("command", [])
    found = HEALTH.search(command[-1]) if command else None
    if found is None:
        raise ProbeError(f"no test knows how to play {spec}")
    return int(found[1]), found[2] or ""


@dataclass
class PodRun:
    """What runs for one pod."""

    item: Object
    address: str
    directory: Path
    api: Api
    hosts: Path
    sandbox: Sandbox = field(init=False)
    containers: dict[str, Container] = field(default_factory=dict)
    probes: dict[str, dict[str, Probe]] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    """Exit status of each container that has ended for good."""
    killed: bool = False
    """It had to be killed when its time was over."""
    _pre_stop: "list[subprocess.Popen[bytes]] | None" = None
    _told: bool = False
    _deadline: float = 0.0
    _was_ready: bool | None = None
    _since: str = ""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        self.sandbox = Sandbox(self.address)
        for spec in self.item["spec"]["containers"]:
            self._start(spec)

    @property
    def name(self) -> str:
        return str(self.item["metadata"]["name"])

    @property
    def done(self) -> bool:
        return len(self.exits) == len(self.containers)

    @property
    def ready(self) -> bool:
        return not self.exits and all(
            kinds["readinessProbe"].passed for kinds in self.probes.values() if kinds
        )

    def step(self, pool: Executor) -> None:
        """Looks after it once; never waits."""
        for name, container in self.containers.items():
            if name in self.exits:
                continue
            if container.ended is not None:
                self._after_end(name, container)
                continue
            kinds = self.probes[name]
            if kinds and not kinds["startupProbe"].passed:
                kinds["startupProbe"].step(pool)
            elif kinds:
                kinds["readinessProbe"].step(pool)
                liveness = kinds["livenessProbe"]
                liveness.step(pool)
                if liveness.failures >= liveness.spec.get("failureThreshold", 3):
                    container.signal(signal.SIGKILL)
        if self._pre_stop is not None and not self._told:
            self._tell_to_end()

    def end(self) -> None:
        """The pod is being deleted: preStop, SIGTERM, and SIGKILL when its time is over."""
        if self._pre_stop is None:
            hooks = [
                spec["lifecycle"]["preStop"]["exec"]["command"]
                for spec in self.item["spec"]["containers"]
                if "preStop" in spec.get("lifecycle", {})
            ]
            self._pre_stop = [subprocess.Popen(hook) for hook in hooks]
            grace_s = self.item["metadata"].get("deletionGracePeriodSeconds", 30)
            self._deadline = time.monotonic() + grace_s
        elif time.monotonic() > self._deadline and not self.done:
            self.killed = True
            self.kill()

    def kill(self) -> None:
        for name, container in self.containers.items():
            if container.ended is None:
                container.signal(signal.SIGKILL)
                container.process.kill()
                container.process.wait(timeout=10)
            self.exits.setdefault(name, container.process.returncode)

    def status(self, *, held: bool = False) -> Object:
        """As a kubelet reports it; `held`: not Ready, whatever the probes say."""
        is_ready = self.ready and not held
        if is_ready != self._was_ready:
            # How long a pod has been Ready decides when its Deployment goes on.
            self._was_ready = is_ready
            self._since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        states: list[Object] = []
        for name, container in self.containers.items():
            state: Object = {"running": {}}
            if name in self.exits:
                state = {"terminated": {"exitCode": self.exits[name]}}
            states.append(
                {
                    "name": name,
                    "ready": is_ready,
                    "started": True,
                    "restartCount": container.restarts,
                    "state": state,
                    "image": "this machine",
                    "imageID": "",
                }
            )
        phase = "Running"
        if self.done:
            phase = "Failed" if any(self.exits.values()) else "Succeeded"
        ready = "True" if is_ready else "False"
        return {
            "phase": phase,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "hostIP": HOST,
            "containerStatuses": states,
            "conditions": [
                {"type": kind, "status": value, "lastTransitionTime": self._since}
                for kind, value in (
                    *(("PodScheduled", "True"), ("Initialized", "True")),
                    *(("ContainersReady", ready), ("Ready", ready)),
                )
            ],
        }

    # ---- containers -----------------------------------------------------------------------------

    def _start(self, spec: Object, restarts: int = 0) -> None:
        name = spec["name"]
        command = [*spec.get("command", ENTRYPOINT), *spec.get("args", [])]
        container = self.containers[name] = Container(
            name,
            self.sandbox,
            self.directory,
            command,
            image_environment() | self._environment(spec),
            self._mounts(spec),
            restarts,
        )
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        self.probes[name] = {
            kind: Probe(spec[kind], self.address, container.execute)
            for kind in kinds
            if kind in spec
        }

    def _after_end(self, name: str, container: Container) -> None:
        status = container.process.returncode
        restart = self.item["spec"].get("restartPolicy", "Always") == "Always"
        if restart and self._pre_stop is None:
            spec = next(s for s in self.item["spec"]["containers"] if s["name"] == name)
            self._start(spec, container.restarts + 1)
        else:
            self.exits[name] = status

    def _tell_to_end(self) -> None:
        if all(hook.poll() is not None for hook in self._pre_stop or []):
            self._told = True
            for container in self.containers.values():
                container.signal(signal.SIGTERM)

    def _environment(self, spec: Object) -> dict[str, str]:
        found = {"KUBERNETES_SERVICE_HOST": HOST, "KUBERNETES_SERVICE_PORT": "6443"}
        for variable in spec.get("env", []):
            source = variable.get("valueFrom", {})
            if source.get("fieldRef", {}).get("fieldPath") == "status.podIP":
                found[variable["name"]] = self.address
            elif "secretKeyRef" in source:
                of = source["secretKeyRef"]
                found[variable["name"]] = self._secret(of["name"])[of["key"]].decode()
            else:
                found[variable["name"]] = variable.get("value", "")
        return found

    def _mounts(self, spec: Object) -> list[Mount]:
        volumes: dict[str, Any] = {v["name"]: v for v in self.item["spec"].get("volumes", [])}
        mounts = [Mount(self.hosts, "/etc/hosts"), Mount(self.hosts.with_name("resolv.conf"),
                                                         "/etc/resolv.conf")]  # fmt: skip
        for asked in spec.get("volumeMounts", []):
            source = self._volume(volumes[asked["name"]])
            mounts.append(Mount(source, asked["mountPath"], asked.get("readOnly", False)))
        return mounts

    def _volume(self, volume: Object) -> Path:
        directory = self.directory / "volumes" / volume["name"]
        files: dict[str, bytes] = {}
        if "configMap" in volume:
            path = f"{self._namespace}/configmaps/{volume['configMap']['name']}"
            data = self.api.get(path)["data"]
            files = {name: text.encode() for name, text in data.items()}
        elif "secret" in volume:
            files = self._secret(volume["secret"]["secretName"])
        elif "emptyDir" not in volume:
            raise ProbeError(f"no test knows how to play the volume {volume}")
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return directory

    def _secret(self, name: str) -> dict[str, bytes]:
        data = self.api.get(f"{self._namespace}/secrets/{name}")["data"]
        return {key: base64.b64decode(value) for key, value in data.items()}

    @property
    def _namespace(self) -> str:
        return f"/api/v1/namespaces/{self.item['metadata']['namespace']}"


def said(pods: "dict[str, PodRun]") -> str:
    """The end of every container's log, for a test that failed."""
    return "\n".join(
        f"---- {shlex.quote(run.name)}/{name}\n{container.tail()}"
        for run in pods.values()
        for name, container in run.containers.items()
    )

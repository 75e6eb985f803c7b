"""etcd, kube-apiserver and kube-controller-manager: a real control plane for the tests."""

import contextlib
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.baton.certificates import Authority
from tests.debian import SetUpError
from tests.kubernetes.api import Api, ApiError
from tests.kubernetes.build import Programs
from tests.kubernetes.network import API_PORT, DIE_WITH_PARENT, HOST

ETCD = "http://127.0.0.1:2379"
START_LIMIT_S = 240.0
CONTROLLERS = (
    "deployment", "disruption", "endpoint", "endpointslice", "garbagecollector", "namespace",
    "replicaset", "root-ca-cert-publisher", "serviceaccount", "serviceaccount-token",
)  # fmt: skip
"""Those that the chart's objects need. Nodes are looked after by the tests."""


@dataclass
class ControlPlane:
    """The three processes and how to reach them."""

    programs: Programs
    directory: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    """Of an administrator."""

    def __post_init__(self) -> None:
        self.url = f"https://{HOST}:{API_PORT}"
        authority = Authority(self.directory, "cluster-ca")
        self.authority = authority.certificate
        self._server = authority.sign("apiserver", addresses=(HOST, "10.96.0.1"))
        self._accounts = authority.sign("accounts")
        self._manager_token = secrets.token_hex(16)
        tokens = self.directory / "tokens.csv"
        tokens.write_text(
            f"{self.token},admin,admin,system:masters\n"
            f"{self._manager_token},system:kube-controller-manager,manager\n"
        )
        self.kubeconfig = self._kubeconfig("admin", self.token)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._start(
            "etcd", self.programs.etcd,
            f"--data-dir={self.directory / 'etcd'}", f"--listen-client-urls={ETCD}",
            f"--advertise-client-urls={ETCD}", "--listen-peer-urls=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
        )  # fmt: skip
        self.start_api()
        self._start(
            "manager", self.programs.controller_manager,
            f"--kubeconfig={self._kubeconfig('manager', self._manager_token)}",
            f"--service-account-private-key-file={self._accounts.key}",
            f"--root-ca-file={self.authority}", f"--controllers={','.join(CONTROLLERS)}",
            "--leader-elect=false", "--port=0", "--secure-port=0",
            "--use-service-account-credentials",
        )  # fmt: skip

    def start_api(self) -> None:
        """Returns when it is ready. Raises SetUpError."""
        self._start(
            "apiserver", self.programs.apiserver,
            f"--etcd-servers={ETCD}", f"--bind-address={HOST}", f"--secure-port={API_PORT}",
            f"--advertise-address={HOST}", "--insecure-port=0",
            f"--tls-cert-file={self._server.certificate}",
            f"--tls-private-key-file={self._server.key}",
            f"--cert-dir={self.directory}", f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._accounts.certificate}",
            f"--service-account-signing-key-file={self._accounts.key}",
            "--profiling=false",
        )  # fmt: skip
        with contextlib.closing(self.api()) as api:
            self._wait_until_ready(api)

    def _wait_until_ready(self, api: Api) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(httpx.TransportError, ApiError):
                api.get("/readyz")
                return
            ended = [name for name, process in self._processes.items() if process.poll()]
            if ended or time.monotonic() > deadline:
                raise SetUpError(f"no API server ({ended} ended):\n{self._tail('apiserver')}")
            time.sleep(0.1)

    def kill_api(self) -> None:
        """Every watch breaks off; what it knew is in etcd."""
        process = self._processes.pop("apiserver")
        process.kill()
        process.wait(timeout=30)

    def api(self) -> Api:
        return Api(self.url, self.authority, self.token)

    def stop(self) -> None:
        for name in ("manager", "apiserver", "etcd"):
            process = self._processes.pop(name, None)
            if process is not None:
                process.kill()
                process.wait(timeout=30)

    def _start(self, name: str, program: Path, *arguments: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*DIE_WITH_PARENT, str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _tail(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()[-3000:]

    def _kubeconfig(self, name: str, token: str) -> Path:
        file = self.directory / f"{name}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.authority)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        }
        file.write_text(json.dumps(content))
        return file


@contextlib.contextmanager
def control_plane(programs: Programs, directory: Path) -> Iterator[ControlPlane]:
    """Started, and ended whatever happens."""
    plane = ControlPlane(programs, directory)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()

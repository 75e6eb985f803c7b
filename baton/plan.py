"""What `baton up` will start: ports, devices, threads and one configuration for each process."""

import dataclasses
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from baton.client_access import as_a_part
from baton.config import Scalar, SettingsError, fill
from baton.connection import ConnectionConfig
from baton.model_store import ModelSource, find_model
from router.config import RouterConfig
from worker.config import Role, WorkerConfig

DECIDED = frozenset({"router", "port", "device_index", "host", "tokenizer"})
"""Settings of routers and workers that `baton up` decides itself; not among its flags."""

SECURITY = frozenset(
    "tls_cert tls_key tls_ca tls_server_name tls_client_ca workers_host workers_port "
    "api_keys_file".split()
)
"""Settings of who may connect; the demo, which calls its own router, has no use for them."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpConfig:
    """Settings of `baton up` itself; the router's and the workers' come on top."""

    model: str = ""
    """Directory of a Hugging Face model, or its id on the hub. Empty: the model that ships with
    Baton, or a small random one where that is missing."""

    prefill: int = 1
    """Number of prefill workers."""

    decode: int = 1
    """Number of decode workers."""

    unified: int = 0
    """Number of unified workers, which do both phases; with --prefill 0 --decode 0 one of them is
    all that a machine with one GPU needs."""

    restart: bool = False
    """Start a worker anew when it dies."""

    start_timeout_s: float = 900.0
    """Longest the deployment may take to become ready. Seconds."""

    stop_timeout_s: float = 15.0
    """Longest a worker may take to end once the router has drained; then it is killed. Seconds."""

    def __post_init__(self) -> None:
        for role in ("prefill", "decode", "unified"):
            if getattr(self, role) < 0:
                raise ValueError(f"{role} must not be negative, not {getattr(self, role)}")
        if (self.prefill == 0) != (self.decode == 0):
            raise ValueError(
                f"prefill and decode serve together: {self.prefill} of the one and {self.decode} "
                "of the other cannot; give both, or neither and --unified 1"
            )
        if self.prefill + self.unified == 0:
            raise ValueError("prefill, decode and unified are all 0: there must be some worker")
        for name in ("start_timeout_s", "stop_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWorker:
    """A worker to start."""

    name: str
    """As log lines show it: prefill-0, decode-1, unified-0."""

    role: Role
    config: WorkerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to start."""

    up: UpConfig
    model: ModelSource
    router: RouterConfig
    workers: tuple[PlannedWorker, ...]

    @property
    def grpc_address(self) -> str:
        """host:port at which this machine reaches the router's gRPC door."""
        return f"{reachable_host(self.router.grpc_host)}:{self.router.grpc_port}"

    @property
    def workers_address(self) -> str:
        """host:port where workers register: the gRPC door, or their own."""
        return _registry_address(self.router)

    def workers_connection(self) -> ConnectionConfig:
        """How this process asks there: it shows the certificate that all parts show. A router
        that is not there yet must not hold up the look at a child that has died.
        """
        return replace(as_a_part(self.router).connection(), reconnect_wait_s=0.0)

    @property
    def http_address(self) -> str:
        """host:port at which this machine reaches the router's HTTP door."""
        return f"{reachable_host(self.router.http_host)}:{self.router.http_port}"


def make_plan(
    given: Mapping[str, Scalar], *, gpus: int | None = None, cores: int | None = None
) -> Plan:
    """Resolves the model, picks ports, and shares devices and cores among the workers.

    Args:
        given: what the user set, by name (`baton.config.given_settings`).
        gpus: number of CUDA devices; None: ask the machine.
        cores: number of CPU cores to share; None: ask the machine.

    Raises:
        SettingsError: a setting is out of range, a port is taken, or the model is not there.
    """
    up = fill(UpConfig, given)
    model = find_model(up.model)
    router = _with_ports(
        fill(RouterConfig, {"served_model_name": model.name, **given}, tokenizer=str(model.path))
    )
    # Without authorities to know each other by, TLS is for clients alone.
    ours = {k: v for k, v in given.items() if router.mutual or k not in ("tls_cert", "tls_key")}
    base = fill(
        WorkerConfig,
        {"served_model_name": model.name, **ours, "model": str(model.path)},
        router=_registry_address(router),
    )
    counts: dict[Role, int] = {"prefill": up.prefill, "decode": up.decode, "unified": up.unified}
    names = [(f"{role}-{index}", role) for role, n in counts.items() for index in range(n)]
    if gpus is None:
        gpus = 0 if base.device == "cpu" else count_gpus()
    if base.device == "cuda" and gpus == 0:
        raise SettingsError("device: cuda was asked for, but this machine shows no CUDA device")
    if gpus and not 1 <= base.tensor_parallel_size <= gpus:
        raise SettingsError(
            f"tensor_parallel_size: {base.tensor_parallel_size} of {gpus} CUDA devices"
        )
    workers = [
        PlannedWorker(
            name=name,
            role=role,
            config=_placed(base, index, len(names), gpus=gpus, cores=cores, given=given),
        )
        for index, (name, role) in enumerate(names)
    ]
    return Plan(up=up, model=model, router=router, workers=tuple(workers))


def _placed(
    base: WorkerConfig,
    index: int,
    workers: int,
    *,
    gpus: int,
    cores: int | None,
    given: Mapping[str, Scalar],
) -> WorkerConfig:
    changes: dict[str, Scalar] = {}
    if gpus > 0:
        # A worker of several ranks takes neighbouring GPUs; those beyond a whole set stay idle.
        places = gpus // base.tensor_parallel_size
        changes["device_index"] = index % places * base.tensor_parallel_size
        sharers = len(range(index % places, workers, places))
        if "mem_fraction" not in given:
            changes["mem_fraction"] = round(base.mem_fraction / sharers, 4)
    if base.threads == 0:
        changes["threads"] = max(1, (cores or count_cores()) // workers)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def _registry_address(router: RouterConfig) -> str:
    if not router.workers_apart:
        return f"{reachable_host(router.grpc_host)}:{router.grpc_port}"
    return f"{reachable_host(router.workers_host)}:{router.workers_port}"


def _with_ports(router: RouterConfig) -> RouterConfig:
    grpc_port = claim_port(router.grpc_host, router.grpc_port, name="grpc_port")
    http_port = claim_port(router.http_host, router.http_port, name="http_port", taken=grpc_port)
    ports = {"grpc_port": grpc_port, "http_port": http_port}
    if router.workers_apart:
        ports["workers_port"] = claim_port(
            router.workers_host, router.workers_port, name="workers_port", taken=grpc_port
        )
    return dataclasses.replace(router, **ports)  # type: ignore[arg-type]


def claim_port(host: str, port: int, *, name: str, taken: int = 0) -> int:
    """A port on which nothing listens; of 0, one that the system picks.

    Args:
        host: address to listen on.
        port: the one asked for, or 0.
        name: the setting, for the error.
        taken: a port that is spoken for though nobody listens on it yet.

    Raises:
        SettingsError: the port is in use, or the host is not this machine's.
    """
    flag = "--" + name.replace("_", "-")
    if port != 0 and port == taken:
        raise SettingsError(f"{name}: {port} is the other door's port; choose another with {flag}")
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise SettingsError(
                    f"{name}: cannot listen on {host}:{port} ({error.strerror}); "
                    f"choose another with {flag} (0 picks a free one)"
                ) from error
            bound: int = probe.getsockname()[1]
        if bound != taken:
            return bound


def reachable_host(host: str) -> str:
    """Where to call a server that listens on `host`."""
    return LOOPBACK if host in ("", "0.0.0.0", "::") else host


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """CUDA devices that a worker will see, without loading torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

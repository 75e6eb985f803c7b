"""`baton doctor`: measures the way of KV between the workers of a router, and says what is wrong.

The classic of disaggregated serving is a transport that quietly falls back to TCP: all works, ten
times slower. So each pair's speed stands beside a plain copy over the same link (or, between
two hosts, beside the network device's rate), and far below that is a warning.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from baton.client import Client
from baton.client_access import ClientAccess
from baton.config import Scalar, fill
from baton.connection import ConnectionConfig, config_for
from baton.errors import error_from_call
from baton.tables import doctor_table, show
from protos.baton.v1 import worker_pb2, worker_pb2_grpc

FAR_BELOW = 0.3
"""A transport that reaches less than this share of its link deserves a look."""

TELLING_BYTES = 8 << 20
"""A smaller probe (of a small or busy window) is mostly handshakes: it says nothing of speed."""

SICK = 1
"""Exit status where something was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """What is measured, and how long it may take."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server; where workers have a door of their own
    (workers_port), of that one, which alone takes such orders."""

    probe_bytes: int = 256 << 20
    """About as much a round; less where a landing window has no more room to spare. Bytes."""

    probe_rounds: int = 5
    """Rounds for each pair of workers; the fastest counts."""

    timeout_s: float = 60.0
    """Longest that one pair may take. Seconds."""

    def __post_init__(self) -> None:
        for name in ("probe_bytes", "probe_rounds", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


def run_doctor(given: dict[str, Scalar]) -> int:
    """Prints one line a pair and what is wrong; the exit status is 0 where nothing is.

    Raises:
        RequestError: the router is out of reach.
    """
    config, access = fill(DoctorConfig, given), fill(ClientAccess, given)
    connection = config_for(config.router, access.connection(config.router))
    with Client(config.router, config=connection) as client:
        workers = client.server_info(timeout=config.timeout_s).workers
    ready = [w for w in workers if w.state == "ready"]
    pairs = [
        (prefill.id, decode.id)
        for prefill in ready
        if prefill.role == "prefill"
        for decode in ready
        if decode.role == "decode"
    ]
    if not pairs:
        print("baton: there is no pair of workers that hand KV over", file=sys.stderr)
        return SICK
    reports = [_probe(config, connection, prefill, decode) for prefill, decode in pairs]
    show(doctor_table(reports))
    for worker, facts in _facts(reports).items():
        print(f"  {worker}:")
        for fact in facts:
            print(f"    {fact}")
    found = [line for report in reports for line in findings(report)]
    for line in found:
        print(f"warning: {line}", flush=True)
    return SICK if found else 0


def _probe(
    config: DoctorConfig, connection: ConnectionConfig, prefill: str, decode: str
) -> worker_pb2.ProbeReport:
    request = worker_pb2.ProbeLinkRequest(
        prefill=prefill,
        decode=decode,
        probe=worker_pb2.ProbeRequest(bytes=config.probe_bytes, rounds=config.probe_rounds),
    )
    with connection.open(config.router) as channel:
        try:
            report: worker_pb2.ProbeReport = worker_pb2_grpc.RegistryStub(channel).ProbeLink(
                request, timeout=config.timeout_s
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from None
    return report


def _facts(reports: Sequence[worker_pb2.ProbeReport]) -> dict[str, list[str]]:
    """Where each worker's devices sit, by worker."""
    facts: dict[str, list[str]] = {}
    for report in reports:
        facts.setdefault(report.prefill_instance, list(report.facts))
        facts.setdefault(report.decode_instance, list(report.decode_facts))
    return {worker: lines for worker, lines in facts.items() if lines}


def findings(report: worker_pb2.ProbeReport) -> list[str]:
    """What deserves a look, one line each."""
    pair = f"{report.prefill_instance} → {report.decode_instance}"
    if report.error:
        return [f"{pair}: not measured: {report.error}"]
    # A network device carries nothing between two workers of one host.
    lines = [
        f"{worker}: {fact}"
        for worker, facts in _facts([report]).items()
        for fact in facts
        if fact.startswith("none of ") and not (report.same_host and "network" in fact)
    ]
    link = report.copy_gigabytes_per_s or report.network_gigabytes_per_s
    telling = report.bytes >= TELLING_BYTES
    if telling and link and report.gigabytes_per_s < FAR_BELOW * link:
        what = "a plain copy" if report.copy_gigabytes_per_s else "the fastest network device"
        lines.append(
            f"{pair}: {report.transport} moves {report.gigabytes_per_s:.2f} GB/s, "
            f"{100 * report.gigabytes_per_s / link:.0f} % of {what} ({link:.2f}): "
            f"{_advice(report)}"
        )
    return lines


def _advice(report: worker_pb2.ProbeReport) -> str:
    gpus = "cpu" not in (report.prefill_device, report.decode_device)
    if report.transport == "grpc":
        return "gRPC is the transport that works anywhere; see why NIXL is not taken (--transport)"
    if report.same_host and gpus and report.transport == "nixl":
        return (
            "two GPUs of one host: cuda_ipc needs one PID namespace for both workers; NIXL needs "
            "UCX's cuda_ipc (UCX_TLS), else it goes through TCP"
        )
    return "UCX may have fallen back to TCP; UCX_LOG_LEVEL=info shows what it chose"

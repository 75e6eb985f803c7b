"""What `baton doctor` asks of an engine: how fast KV reaches a peer, what a plain copy does over
the same link, and where accelerator and network devices sit.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.cuda_memory import device_name
from kvtransfer.host import pid_namespace
from kvtransfer.probe import ProbeResult
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.engine_parts import EngineParts

COPIES = 3
"""Plain copies that are timed; the fastest counts."""

Send = Callable[[channel_pb2.EngineToFront], None]


def measure_link(parts: EngineParts, send: Send, order: channel_pb2.ProbeOrder) -> None:
    """Returns at once; the answer is sent when it is there. What takes long happens on a thread of
    its own, so that neither steps nor transfers wait."""
    agent: TransferAgent = parts.agent
    request = order.request
    pool = parts.kv_pool.as_bytes()

    def finish(result: ProbeResult) -> None:
        report = _report(result, pool)
        answer = channel_pb2.ProbeAnswer(nonce=order.nonce, report=report)
        send(channel_pb2.EngineToFront(probed=answer))

    def done(result: ProbeResult) -> None:
        threading.Thread(target=finish, args=(result,), name="link-probe", daemon=True).start()

    agent.probe(request.decode_instance, request.bytes, request.rounds, done)


def _report(result: ProbeResult, pool: torch.Tensor) -> worker_pb2.ProbeReport:
    here = pid_namespace()
    same_host = bool(here) and _boot(here) == _boot(result.peer_host)
    report = worker_pb2.ProbeReport(
        decode_instance=result.peer,
        transport=result.transport,
        bytes=result.num_bytes,
        connect_ms=result.connect_s * 1e3,
        round_trip_ms=result.round_trip_s * 1e3,
        same_host=same_host,
        prefill_device=device_name(pool.device),
        decode_device=result.peer_device,
        facts=affinity(pool.device),
        error=result.error,
    )
    if result.error or not result.best_s:
        return report
    report.gigabytes_per_s = result.num_bytes / result.best_s / 1e9
    if same_host:
        report.copy_gigabytes_per_s = plain_copy(pool, result)
    else:
        report.network_gigabytes_per_s = max(network_devices().values(), default=0.0)
    return report


def _boot(host: str) -> str:
    return host.partition("/")[0]


def plain_copy(pool: torch.Tensor, result: ProbeResult) -> float:
    """GB/s of a copy of as many bytes to memory like the peer's; 0 where this process does not see
    the peer's device, or has no memory there to spare."""
    target = next((d for d in _devices() if device_name(d) == result.peer_device), None)
    if target is None:
        return 0.0
    source = pool.view(-1)[: result.num_bytes]
    try:
        landing = torch.zeros(result.num_bytes, dtype=torch.uint8, device=target)
    except RuntimeError:
        return 0.0
    best = float("inf")
    for _ in range(COPIES):
        begin = time.perf_counter()
        if source.device.type == "cuda":
            stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
            with torch.cuda.device(source.device), torch.cuda.stream(stream):
                landing.copy_(source, non_blocking=True)
            stream.synchronize()
        else:
            landing.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return result.num_bytes / best / 1e9


def _devices() -> list[torch.device]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(gpus))]


def affinity(device: torch.device, *, sysfs: Path = Path("/sys")) -> list[str]:
    """Lines about where things sit: the accelerator's NUMA node and this process's cores, and each
    network device with its rate and node."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    lines = [f"{len(cores)} cores for this engine"] if cores else []
    node = None
    if device.type == "cuda":
        place = sysfs / "bus/pci/devices" / device_name(device)
        node = _number(place / "numa_node")
        lines.append(f"{torch.cuda.get_device_name(device)} at {device_name(device)}{_at(node)}")
        near = _read(sysfs / f"devices/system/node/node{node}/cpulist")
        if cores and near and not set(cores) & set(_cpu_list(near)):
            lines.append(f"none of the engine's cores is near its GPU, whose cores are {near}")
    for name, rate in network_devices(sysfs=sysfs).items():
        place = sysfs / "class/infiniband" / name / "device/numa_node"
        if not place.exists():
            place = sysfs / "class/net" / name / "device/numa_node"
        lines.append(f"{name}: {rate:g} GB/s{_at(_number(place))}")
    return lines


def network_devices(*, sysfs: Path = Path("/sys")) -> dict[str, float]:
    """Network devices that are up and tell their rate, RDMA's included: nominal GB/s."""
    rates: dict[str, float] = {}
    for port in sorted(sysfs.glob("class/infiniband/*/ports/*")):
        words = _read(port / "rate").split()
        if words and "ACTIVE" in _read(port / "state"):
            rates[port.parent.parent.name] = float(words[0]) / 8
    for net in sorted(sysfs.glob("class/net/*")):
        megabits = _number(net / "speed")
        if megabits is not None and megabits > 0 and _read(net / "operstate") == "up":
            rates[net.name] = megabits / 8e3
    return rates


def _at(node: int | None) -> str:
    return f", NUMA node {node}" if node is not None and node >= 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _cpu_list(text: str) -> list[int]:
    """`0-3,8` as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

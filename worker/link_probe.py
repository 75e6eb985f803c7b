"""What `baton doctor` asks of an engine: how fast KV reaches a peer, what a plain copy does over
the same link, and where accelerators and network devices sit.
"""

import threading
import time
from collections.abc import Callable

import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.cuda_memory import device_name
from kvtransfer.host import pid_namespace
from kvtransfer.probe import ProbeResult
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.affinity import affinity, network_devices
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
        decode_facts=result.peer_facts,
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

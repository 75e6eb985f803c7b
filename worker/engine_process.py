"""The engine process: one thread schedules and computes, others only listen, move pages or write.

Started by the front as `python -m prefill_service.engine` (or another role's) with three inherited
file descriptors: the channel, the landing window's file and the outbox's.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from kvtransfer.errors import TransferError
from observability import logs
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.channel import EngineChannel
from worker.config import WorkerConfig
from worker.ending import close_in_time
from worker.engine_parts import EngineParts, EngineProcess, build_parts
from worker.engine_role import EngineRole
from worker.kv_traffic import KvTraffic

IDLE_WAIT_S = 0.1
"""Longest sleep of an idle engine. Work of any source wakes it at once; this only bounds how late
a queue's deadline is noticed."""

COPY_WAIT_S = 0.001
"""The same while KV is copied between device and host memory, whose end wakes nobody."""

_LEAST_HOLD_S = 0.0003
"""Less time than this is not worth a wait."""

_LONGEST_HOLD_S = 0.002
"""After which it is asked again: a step may end before it was expected to."""

_SWITCH_INTERVAL_S = 10e-6
"""Longest that one thread of the engine computes in Python while another waits to. Each call into
torch gives the others a chance, and the transfer thread makes a dozen of them for a write: with
500 us they took 7 ms on an idle pair of GPUs, with 50 us 3.7, for bytes that need 0.8
(bench/README.md)."""

_TIMER_SLACK_NS = 1_000
"""Linux lets a sleep last 50 us longer than asked, to wake several threads at once; those of an
engine are shorter than that."""

_PR_SET_TIMERSLACK = 29
"""Of prctl(2): for the calling thread, and those that it starts."""

_QUIET_S = 0.02
"""How long nothing must have happened before an idle engine counts its pages: the milliseconds that
this takes must not fall on a handover whose last pages are just leaving."""

_EXPECTING_S = 0.5
"""The same while requests are here that others work on: what they wait for (a prompt's KV, 20 ms
after its ticket) must not meet the count either."""

EXIT_FRONT_GONE = 3

RoleFactory = Callable[[EngineParts], EngineRole]


def run_engine(arguments: list[str], make_role: RoleFactory, *, traffic: KvTraffic) -> int:
    """The engine process's main function; returns its exit status."""
    # Ctrl-C reaches the whole process group: the front drains, then tells the engine to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    let_threads_alternate()
    _give_streams_queues()
    channel_fd, window_fd, outbox_fd = map(int, arguments)
    channel = EngineChannel(
        socket.socket(fileno=channel_fd), on_closed=lambda: os._exit(EXIT_FRONT_GONE)
    )
    channel.start()
    start = _first_message(channel)
    process = EngineProcess(
        instance_id=start.pop("instance_id"),
        channel=channel,
        window_fd=window_fd,
        outbox_fd=outbox_fd,
    )
    config = WorkerConfig(**start)
    worker = process.instance_id
    facts = {"role": worker.split("-")[0], "worker": worker, "process": "engine"}
    logs.configure(level=config.log_level, format=config.log_format, facts=facts)
    try:
        parts = build_parts(config, process, traffic=traffic)
        role = make_role(parts)
        parts.make_scheduler(role)
        ready = parts.ready()
    except EngineError as error:
        return _report_failure(channel, error.code, str(error))
    except TransferError as error:
        return _report_failure(channel, error.code.value, error.message)
    parts.agent.start()
    channel.send(channel_pb2.EngineToFront(ready=ready))
    run_loop(parts, role)
    close_in_time(parts.grammars.close, parts.agent.close, parts.ranks.close, channel.close)
    return 0


def let_threads_alternate() -> None:
    """Of this process: an engine computes on one thread and listens, moves pages and writes on
    others, for which a tenth of a millisecond is long."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


def _give_streams_queues() -> None:
    """Before CUDA is first used. Streams beyond as many share queues of the device, and what leaves
    behind one step would wait for the next one's kernels; there are a dozen here."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _first_message(channel: EngineChannel) -> dict[str, Any]:
    while True:
        channel.wait(60.0)
        for message, _ in channel.drain():
            if message.WhichOneof("kind") == "start":
                start: dict[str, Any] = json.loads(message.start)
                return start


def _report_failure(channel: EngineChannel, code: str, message: str) -> int:
    error = worker_pb2.Error(code=f"ERROR_CODE_{code}", message=message)
    failed = channel_pb2.EngineFailed(error=error)
    channel.send(channel_pb2.EngineToFront(failed=failed))
    channel.close()
    return 1


def _handle_messages(channel: EngineChannel, role: EngineRole) -> bool:
    """False: the front says stop."""
    for message, at in channel.drain():
        if message.WhichOneof("kind") == "stop":
            return False
        role.handle(message, at=at)
    return True


def _listen(channel: EngineChannel, role: EngineRole) -> bool:
    """While the device is busy for longer than the next launch takes to prepare: answers who asks
    for memory, and checks KV that lands, at once. False: the front says stop."""
    while (hold_s := role.scheduler.hold_s()) > _LEAST_HOLD_S:
        channel.wait(min(hold_s, _LONGEST_HOLD_S))
        if not _handle_messages(channel, role):
            return False
        role.poll()
    return True


def _quiet_s(role: EngineRole) -> float:
    return _QUIET_S if role.is_idle() else _EXPECTING_S


def run_loop(parts: EngineParts, role: EngineRole) -> None:
    """Messages, then one scheduler pass, then answers; sleeps when there is nothing to do.

    Returns when the front says stop. An unexpected error passes through and ends the process:
    state that may be wrong must not go on answering.
    """
    channel, scheduler = parts.channel, role.scheduler
    counted = False
    quiet_since = time.monotonic()
    while True:
        if not _handle_messages(channel, role) or not _listen(channel, role):
            return
        channel.begin_step(parts.config.hang_timeout_s)
        began = time.monotonic()
        result = scheduler.step()
        channel.end_step()
        if result.ran:
            role.pass_seconds.observe(time.monotonic() - began)
        role.publish(result)
        busy = result.ran or scheduler.has_work()
        if busy:
            counted = False
            quiet_since = time.monotonic()
            role.send_status_if_due()
        elif not counted and time.monotonic() - quiet_since >= _quiet_s(role):
            # A page or row that is not accounted for ends the process here, not a request later.
            scheduler.check_invariant()
            role.send_status()
            counted = True
        if role.draining and role.is_idle():
            role.draining = False
            channel.send(channel_pb2.EngineToFront(drained=True))
        if not result.ran:
            idle_s = IDLE_WAIT_S if counted else _QUIET_S
            channel.wait(COPY_WAIT_S if parts.memory.has_pending_copies() else idle_s)

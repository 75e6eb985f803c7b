"""Where the milliseconds of a handover go, event by event, across both engines of one host.

A request's report names durations, each taken inside one process. What lies between two processes
(the end of prefill's last step until the start of decode's first) needs one clock for both: the
host's monotonic one. So the engines write a line an event to one file, and whoever measures puts
the lines together (bench/end_to_end.py). Off unless a file is named.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from kvtransfer.trace import HEARD, STARTED, WRITTEN

COMPUTED, SEALED, PUSHED = "computed", "sealed", "pushed"
"""Prefill: the last step's results are here; its pages are sealed; all was handed to the
transfer."""
# Between the two, of the transfer thread: kvtransfer/trace.py.
ARRIVED, CHECKED, JOINED, LAUNCHED, DECODED = "arrived", "checked", "joined", "launched", "decoded"
"""Decode: landed pages are looked at; they were copied out and are good; the request waits for the
next launch, and some of its pages for their check; its first step is prepared; that step's token is
here. The first two happen more than once a request."""
QUEUED = "queued"
"""Decode: the first step is on its way to the device: with nothing before it there, its first
kernel starts."""


class HandoverTrace:
    """One engine's pen. A line is written by one system call, so that lines stay whole."""

    def __init__(self, path: str) -> None:
        """`path`: file to append to; empty: nothing is written."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o644) if path else -1

    def mark(self, rid: str, event: str, at: float | None = None) -> None:
        """`at`: time.monotonic() seconds; None: now."""
        if self._fd >= 0:
            moment = time.monotonic() if at is None else at
            os.write(self._fd, f"{rid} {event} {moment:.7f}\n".encode())


def read_trace(path: Path) -> dict[str, dict[str, list[float]]]:
    """Request -> event -> its moments in order. Seconds of the host's monotonic clock."""
    requests: dict[str, dict[str, list[float]]] = {}
    for line in path.read_text().splitlines():
        rid, event, moment = line.rsplit(" ", 2)
        requests.setdefault(rid, {}).setdefault(event, []).append(float(moment))
    return requests


def phases_ms(events: dict[str, list[float]]) -> dict[str, float]:
    """What one handover spent where; empty for one that did not happen in full."""
    wanted = {COMPUTED, SEALED, PUSHED, STARTED, WRITTEN, HEARD, ARRIVED, CHECKED, JOINED, LAUNCHED}
    if not wanted | {QUEUED, DECODED} <= events.keys():
        return {}
    ends = {name: moments[-1] for name, moments in events.items()}
    ready = max(ends[LAUNCHED], ends[CHECKED])
    steps: Iterable[tuple[str, float, float]] = (
        ("seal", ends[COMPUTED], ends[SEALED]),
        ("push", ends[SEALED], ends[PUSHED]),
        ("start", ends[PUSHED], ends[STARTED]),
        ("wire", ends[STARTED], ends[WRITTEN]),
        ("announce", ends[WRITTEN], ends[HEARD]),
        ("look", ends[HEARD], ends[ARRIVED]),
        ("check", ends[ARRIVED], ends[JOINED]),
        ("join", ends[JOINED], ends[LAUNCHED]),
        ("verdict", ends[LAUNCHED], ready),
        ("gap", ends[COMPUTED], ready),
        ("launch", ready, ends[QUEUED]),
        ("step", ready, ends[DECODED]),
    )
    return {name: 1e3 * (end - begin) for name, begin, end in steps}

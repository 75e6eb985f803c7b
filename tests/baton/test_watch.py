"""`baton ps --watch`: live, also while the router is away, and left with Ctrl-C."""

import io
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from baton.messages import ServerInfo, Worker
from baton.tables import fitting, narrower_workers_tables, workers_table
from baton.watch import BAR_CELLS, live_tables, page_bar

ROOT = Path(__file__).resolve().parents[2]


def worker(**pages: int) -> Worker:
    return Worker(
        id="w",
        role="decode",
        address="",
        pid=1,
        engine_pids=(2,),
        state="ready",
        transports=("grpc",),
        pages={"free": 0, "cached": 0, "held": 0, "in_use": 0} | pages,
        running=0,
        waiting=0,
    )


def test_the_bar_shows_each_state_that_has_a_page() -> None:
    bar = page_bar(worker(in_use=1, held=1, cached=500, free=498, total=1000))
    assert len(bar) == BAR_CELLS
    assert [span.end - span.start for span in bar.spans] == [1, 1, 12, 10]


def test_the_bar_of_a_full_worker_has_no_free_cell() -> None:
    bar = page_bar(worker(in_use=999, held=1, total=1000))
    assert len(bar) == BAR_CELLS


def test_a_worker_without_pages_has_no_bar() -> None:
    assert not page_bar(worker(total=0))


def in_a_fleet(name: str, reason: str = "") -> Worker:
    return replace(
        worker(free=1000, cached=20, held=3, in_use=1, total=1024),
        id=f"{name}-0123456789ab",
        role=name,
        address="10.128.114.203:50061",
        transports=("cuda_ipc", "nixl", "grpc"),
        reason=reason,
    )


@pytest.mark.parametrize("width", [80, 100, 132, 200])
@pytest.mark.parametrize("reason", ["", "its pages differ: " + 9 * "something long "])
@pytest.mark.parametrize("live", [False, True], ids=["once", "live"])
def test_no_cell_is_cut_on_a_narrow_terminal(width: int, reason: str, live: bool) -> None:
    info = ServerInfo(
        version="0.1.0",
        protocol_version=3,
        router_id="router-0123456789ab",
        workers=(in_a_fleet("prefill"), in_a_fleet("decode", reason)),
    )
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    tables = [workers_table(info), *narrower_workers_tables(info)]
    if live:
        tables = live_tables(info, now="12:00:00")
    console.print(fitting(console, *tables))
    shown = written.getvalue()
    assert "…" not in shown
    for told in ("prefill-0123456789ab", "decode-0123456789ab", "ready", "running", "waiting"):
        assert told in shown
    assert ("something" in shown) == bool(reason)
    if width == 200 and not live and not reason:
        assert "10.128.114.203:50061" in shown


def test_watch_prints_again_and_again_until_interrupted(address: str) -> None:
    command = [sys.executable, "-m", "baton", "ps", "--watch", "--interval-s", "0.05"]
    with subprocess.Popen(
        [*command, "--router", address], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += "decode-b" in line
            if seen == 2:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=10) == 0
    assert seen == 2


def test_watch_says_that_the_router_is_away_and_goes_on() -> None:
    command = [sys.executable, "-m", "baton", "ps", "--watch", "--interval-s", "0.05"]
    with subprocess.Popen(
        [*command, "--router", "127.0.0.1:1", "--timeout-s", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=10) == 0
    assert all("127.0.0.1:1" in line or "deadline" in line.lower() for line in lines), lines

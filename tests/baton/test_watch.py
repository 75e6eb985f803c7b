"""`baton ps --watch`: live, also while the router is away, and left with Ctrl-C."""

import signal
import subprocess
import sys
from pathlib import Path

from baton.messages import Worker
from baton.watch import BAR_CELLS, page_bar

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

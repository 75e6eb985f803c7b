"""`baton up` with scripted children: its one line, its order of stopping, and what it leaves."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import baton
from baton.messages import ServerInfo, Worker
from baton.up import common_transport

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., "Up"]


class Up:
    """A running `baton up` and what it wrote on standard error."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log

    def ready_line(self) -> str:
        return self.process.stdout.readline() if self.process.stdout else ""

    def rest_of_output(self) -> str:
        return self.process.stdout.read() if self.process.stdout else ""

    def log(self) -> str:
        return self._log.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        return next(child for child in self.children() if word in child.cmdline())

    def wait_for(self, text: str, *, limit_s: float = 20.0) -> None:
        deadline = time.monotonic() + limit_s
        while text not in self.log():
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.log()}"
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `baton up` on free ports with an empty directory as its model."""
    started: list[subprocess.Popen[str]] = []
    model = tmp_path / "some-model"
    model.mkdir()

    def run(*flags: str, command: str = "up", worker: str = "live") -> Up:
        log = tmp_path / f"up-{len(started)}.log"
        environment = {**os.environ, "FAKE_WORKER": worker, "PYTHONPATH": str(ROOT)}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [
                    *(sys.executable, str(Path(__file__).parent / "fake_up.py"), command),
                    *("--model", str(model), "--device", "cpu"),
                    *("--http-port", "0", "--grpc-port", "0"),
                    *flags,
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        started.append(process)
        return Up(process, log)

    yield run
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_one_line_says_ready_and_sigterm_stops_router_first(start: Start) -> None:
    up = start()
    line = up.ready_line()
    assert line.startswith("ready: http://127.0.0.1:")
    assert "/v1  grpc://127.0.0.1:" in line
    assert line.endswith("model echo  prefill 1  decode 1  transport grpc\n")
    address = line.split("grpc://")[1].split()[0]
    with baton.Client(address) as client:
        assert client.complete("Hi").text == "Hi"
    family = up.children()
    assert len(family) == 3
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=20) == 0, up.log()
    assert up.rest_of_output() == ""
    assert not psutil.wait_procs(family, timeout=5)[1]
    log = up.log()
    assert "[prefill-0] loading weights of prefill" in log
    assert log.index("router got SIGTERM") < log.index("[decode-0] decode got SIGTERM")


def test_unified_workers_are_started_and_counted(start: Start) -> None:
    up = start("--prefill", "0", "--decode", "0", "--unified", "2")
    assert "model echo  unified 2  transport " in up.ready_line()
    assert len(up.children()) == 3
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=20) == 0, up.log()
    assert "starting router, 2 unified" in up.log()
    assert "[unified-1] unified got SIGTERM" in up.log()


def _info(*workers: Worker) -> ServerInfo:
    return ServerInfo(version="", protocol_version=1, workers=workers)


def test_the_transport_is_that_of_the_workers_that_have_peers() -> None:
    def worker(role: str, *transports: str) -> Worker:
        return Worker(
            id=role,
            role=role,
            address="",
            pid=1,
            engine_pids=(2,),
            state="ready",
            transports=transports,
            pages={},
            running=0,
            waiting=0,
        )

    pair = worker("prefill", "nixl", "grpc"), worker("decode", "grpc")
    assert common_transport(_info(*pair)) == "grpc"
    assert common_transport(_info(*pair, worker("unified"))) == "grpc"
    assert common_transport(_info(worker("unified"))) == "none"


def test_a_child_that_dies_during_start_is_quoted(start: Start) -> None:
    up = start(worker="die")
    assert up.process.wait(timeout=30) == 1
    assert up.rest_of_output() == ""
    assert "exited with status 3 during start" in up.log()
    assert "error: config.json is missing" in up.log()


def test_a_worker_that_dies_later_is_announced(start: Start) -> None:
    up = start()
    up.ready_line()
    worker = up.child("prefill")
    worker.kill()
    up.wait_for(f"prefill-0 (pid {worker.pid}) was killed by SIGKILL: going on without it")
    assert up.process.poll() is None
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=20) == 0


def test_a_worker_is_started_anew_where_asked(start: Start) -> None:
    up = start("--restart")
    up.ready_line()
    before = up.child("decode")
    before.kill()
    up.wait_for("starting it anew")
    deadline = time.monotonic() + 20
    while not {child.pid for child in up.children() if "decode" in child.cmdline()} - {before.pid}:
        assert time.monotonic() < deadline, up.log()
        time.sleep(0.05)
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=20) == 0


def test_a_dead_router_ends_everything(start: Start) -> None:
    up = start()
    up.ready_line()
    family = up.children()
    up.child("router").kill()
    assert up.process.wait(timeout=30) == 1
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert "the router was killed by SIGKILL: stopping" in up.log()


def test_a_worker_that_will_not_stop_is_killed_with_its_own_children(start: Start) -> None:
    up = start("--stop-timeout-s", "0.5", worker="ignore")
    up.ready_line()
    up.wait_for("loading weights of decode")
    family = up.children()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(timeout=20) == 0
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert "did not end within" in up.log()


def test_nothing_outlives_a_killed_up(start: Start) -> None:
    up = start()
    up.ready_line()
    family = up.children()
    up.process.kill()
    up.process.wait()
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_ctrl_c_during_start_leaves_nothing(start: Start) -> None:
    up = start("--decode", "9")
    up.wait_for("loading weights of decode")
    family = up.children()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=30) == 0
    assert up.rest_of_output() == ""
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_a_deployment_that_never_gets_ready_is_given_up(start: Start) -> None:
    # The scripted router knows two workers, so three never get ready.
    up = start("--decode", "2", "--start-timeout-s", "3")
    assert up.process.wait(timeout=30) == 1
    assert "not ready after 3 s" in up.log()


def test_the_demo_streams_text_and_shows_the_journey(start: Start) -> None:
    demo = start("--prompt", "Hi", command="demo")
    output = demo.rest_of_output()
    assert demo.process.wait(timeout=30) == 0, demo.log()
    assert "HiHi" in output
    for shown in ("ttft (ms)", "4.0 KiB (4,096 bytes)", "grpc", "prefill-a", "decode-b"):
        assert shown in output
    assert "stopped; nothing is left running" in demo.log()


def test_a_demo_that_cannot_start_fails(start: Start) -> None:
    demo = start(command="demo", worker="die")
    assert demo.process.wait(timeout=30) == 1
    assert demo.rest_of_output() == ""
    assert "error: config.json is missing" in demo.log()

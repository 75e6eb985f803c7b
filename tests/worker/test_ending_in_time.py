"""A process that is to end does so, or says where it stands."""

import subprocess
import sys

from worker.ending import LIMIT_S
from worker.engine_handle import STOP_GRACE_S


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = "import signal\nfrom worker.ending import close_in_time, end_process\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_what_does_not_end_says_where_every_thread_stands() -> None:
    ended = run(
        "import threading\n"
        "def library(): threading.Event().wait()\n"
        "def held_up(): signal.pause()\n"
        "threading.Thread(target=library).start()\n"
        "close_in_time(lambda: print('closed', flush=True), held_up, limit_s=0.3)\n"
    )
    assert ended.returncode == 1
    assert ended.stdout == "closed\n"
    assert "in held_up" in ended.stderr
    assert "in library" in ended.stderr


def test_the_limit_holds_until_the_process_is_gone() -> None:
    ended = run("close_in_time(limit_s=0.3)\ndef after(): signal.pause()\nafter()\n")
    assert ended.returncode == 1
    assert "in after" in ended.stderr


def test_what_ends_in_time_says_nothing() -> None:
    ended = run("close_in_time(lambda: print('closed'), limit_s=30.0)\nend_process(0)\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


def test_the_front_waits_longer() -> None:
    assert LIMIT_S < STOP_GRACE_S

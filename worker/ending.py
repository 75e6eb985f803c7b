"""The end of a process that has nothing left to do.

Python's own ending takes the interpreter apart object by object, and then the libraries: up to a
second of CPU for a process that has loaded torch, for each process of a worker, while whoever
stops it waits. Extensions that end in another order than they began crash there, and a reader's
thread may take a closed link for a death. All that this process owes anybody is done by then.
"""

import atexit
import faulthandler
import os
import sys
from collections.abc import Callable
from typing import NoReturn

LIMIT_S = 8.0
"""What an engine may take to end after it was told to stop. Seconds; less than the front waits
before it kills (`STOP_GRACE_S` of worker/engine_handle.py), which tells nobody why."""


def close_in_time(*parts: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Closes one part after the other. A process that still runs when the time is over, here or
    later, writes the stacks of its threads to standard error and ends with status 1: a thread of
    C's own does that, whatever call of a library the others are held up in."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    for close in parts:
        close()


def end_process(status: int) -> NoReturn:
    """Runs what is registered for the end, writes what is buffered, and ends at once."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 1  # nobody reads it any more
    os._exit(status)

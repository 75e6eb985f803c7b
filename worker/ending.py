"""The end of a process that has nothing left to do.

Python's own ending takes the interpreter apart object by object, and then the libraries: up to a
second of CPU for a process that has loaded torch, for each process of a worker, while whoever
stops it waits. Extensions that end in another order than they began crash there, and a reader's
thread may take a closed link for a death. All that this process owes anybody is done by then.
"""

import atexit
import os
import sys
from typing import NoReturn


def end_process(status: int) -> NoReturn:
    """Runs what is registered for the end, writes what is buffered, and ends at once."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 1  # nobody reads it any more
    os._exit(status)

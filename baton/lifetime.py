"""A child process that does not outlive the one that started it.

`baton up` promises that nothing is left behind, also when it is killed in a way that no handler
sees. Its children therefore ask the kernel to end them with it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import MutableMapping

PARENT_VARIABLE = "BATON_PARENT_PID"
"""Set by a parent for its children: the process id that they live and die with."""

POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


def live_with_parent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ties this process to its parent where the parent asked for it; otherwise does nothing.

    Must run on the main thread, early. The variable is taken out of the environment, so that this
    process's own children are not tied to its parent.
    """
    value = environment.pop(PARENT_VARIABLE, "")
    if not value.isdigit():
        return
    parent = int(value)
    if sys.platform == "linux":
        # SIGKILL, since the parent can no longer wait for a drain or see it fail.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent:
        # It was gone before the line above could tie us to it.
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)

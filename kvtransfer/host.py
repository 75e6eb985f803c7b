"""Which host, boot and PID namespace a process lives in: what two processes must share before one
may open the other's memory, or believe its process id.
"""

import os
from pathlib import Path


def pid_namespace() -> str:
    """Names this process's PID namespace on this boot of this host; empty where that is unknown.

    The namespace's own number is no name: the initial one is the same on every host.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

"""A network of the tests' own, where pods have addresses: nobody else's ports or rules matter.

The test's thread enters a network name space, and so does all that it starts from then on. It is
gone, bridge and all, with the last process in it, however that ends.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: it is killed when the thread that started it ends."""
API_PORT = 6443
BRIDGE = "pods"
HOST = "10.66.0.1"
"""Where the API server listens, as the pods see it."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Between enter and exit, this thread sees the private network alone. Needs root."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        ip("link", "set", "lo", "up")
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{HOST}/16", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        _check(_libc.setns(before, CLONE_NEWNET))
        os.close(before)


def connect(pid: int, address: str) -> None:
    """Gives the network name space of that process an interface with this address."""
    name = f"v{pid}"
    ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    ip("link", "set", name, "master", BRIDGE, "up")
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "addr", "add", f"{address}/16", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "route", "add", "default", "via", HOST)


def silence(address: str, *, begin: bool) -> None:
    """Nothing passes between a pod and the API server any more, or does again."""
    for chain, end, port in (
        ("INPUT", "--source", "--dport"),
        ("OUTPUT", "--destination", "--sport"),
    ):
        rule = (chain, end, address, "--protocol", "tcp", port, str(API_PORT), "--jump", "DROP")
        run("iptables", "-A" if begin else "-D", *rule)


def ip(*arguments: str) -> None:
    run("ip", *arguments)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

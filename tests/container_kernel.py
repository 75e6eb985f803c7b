"""What containers need of the kernel, tried out: on some machines not even root may have it.

Continuous integration asks before the suites that start containers or pods, so that a machine that
forbids them leaves these out by name, and one that allows them must pass.

Usage: python -m tests.container_kernel (prints what is missing; status 1)
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.debian import SetUpError, install

PACKAGES = {"ip": "iproute2", "iptables": "iptables", "unshare": "util-linux"}

TRIALS = {
    "name spaces of their own (mount, network, process, IPC, host name)": "true",
    "overlay file systems over the root (which may be one itself)": (
        "mount -t tmpfs tmpfs /mnt && cd /mnt && mkdir above work seen && "
        "mount -t overlay overlay -o lowerdir=/,upperdir=above,workdir=work seen && "
        "test -d seen/etc && touch seen/etc/trial"
    ),
    "bridges and virtual network interfaces": (
        "ip link add trial type bridge && ip link add one type veth peer name two && "
        "ip link set one master trial"
    ),
    "address translation and packet filters (iptables)": (
        "iptables -t nat -A POSTROUTING -j MASQUERADE && iptables -A INPUT -j DROP"
    ),
}
"""What is needed -> a command that has it, inside name spaces that end with it."""


def missing() -> list[str]:
    """What root may not have on this machine, or a kernel lacks. Raises SetUpError where a program
    for the trials is not to be had."""
    if os.geteuid() != 0:
        return ["root"]
    install(PACKAGES)
    inside = ("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "sh", "-c")
    found = [
        what
        for what, command in TRIALS.items()
        if subprocess.run([*inside, command], capture_output=True, timeout=60).returncode != 0
    ]
    control = Path("/sys/fs/cgroup")
    if not (control / "cgroup.controllers").exists() and not (control / "devices").is_dir():
        found.append("control groups")
    return found


def main() -> int:
    try:
        found = missing()
    except SetUpError as error:
        found = [str(error)]
    if found:
        print(f"this machine does not let us have: {'; '.join(found)}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""A pod's container without images: a process that sees this machine's files, and its pod's alone.

Its root is an overlay over the machine's, read-only and gone with it; volumes, /etc/hosts and the
embedded model are mounted where the pod's description says; network and process ids are its own.
It runs as root, since nobody else might read this checkout: that images do not is shown elsewhere
(tests/deploy).
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.kubernetes.network import DIE_WITH_PARENT, connect

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "baton-tiny"
ENTRYPOINT = (sys.executable, "-m", "baton")
SCRIPT = """\
set -e
mount -t tmpfs tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work {root}
mount -t overlay overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work {root}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount --rbind /sys {root}/sys
{volumes}
mount -o remount,ro {root}
cd {root}
exec chroot {root} env -i {environment} {command}
"""


@dataclass(frozen=True)
class Mount:
    """What a container sees at a path."""

    source: Path
    path: str
    read_only: bool = False

    def script(self, root: Path) -> str:
        # A link of the machine's, such as /var/run, must lead to a place below the new root.
        target = shlex.quote(f"{root}{os.path.realpath(self.path)}")
        source = shlex.quote(str(self.source))
        make = f"mkdir -p {target}"
        if self.source.is_file():
            make = f"mkdir -p $(dirname {target}) && rm -f {target} && touch {target}"
        lock = f" && mount -o remount,bind,ro {target}" if self.read_only else ""
        return f"{make} && mount --bind {source} {target}{lock}"


@dataclass
class Sandbox:
    """A pod's network: a process that does nothing but hold it."""

    address: str
    holder: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.holder = subprocess.Popen(
            [*DIE_WITH_PARENT, "unshare", "--net", "sh", "-c", "echo; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        if self.holder.stdout is not None:
            self.holder.stdout.readline()
            self.holder.stdout.close()
        connect(self.holder.pid, self.address)

    def end(self) -> None:
        self.holder.kill()
        self.holder.wait(timeout=10)


@dataclass
class Container:
    """One run of one container; ends with the thread that started it."""

    name: str
    sandbox: Sandbox
    directory: Path
    command: list[str]
    environment: dict[str, str]
    mounts: list[Mount]
    restarts: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory / f"{self.name}.log"
        scratch = self.directory / f"{self.name}.root"
        scratch.mkdir(exist_ok=True)
        root = scratch / "root"
        mounts = [Mount(MODEL, "/models/baton-tiny", read_only=True), *self.mounts]
        mounts += [Mount(path, str(path)) for path in _hidden(mounts)]
        script = SCRIPT.format(
            scratch=shlex.quote(str(scratch)),
            root=shlex.quote(str(root)),
            volumes="\n".join(mount.script(root) for mount in mounts),
            environment=" ".join(shlex.quote(f"{k}={v}") for k, v in self.environment.items()),
            command=shlex.join(self.command),
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *DIE_WITH_PARENT,
                    *("nsenter", f"--net=/proc/{self.sandbox.holder.pid}/ns/net"),
                    *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
                    *("sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def ended(self) -> int | None:
        """Its exit status; None while it runs."""
        return self.process.poll()

    @property
    def pid(self) -> int | None:
        """Of its first process, as this machine counts."""
        own = self.process.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
            if children:
                return int(children[0])
        return None

    def signal(self, number: signal.Signals) -> None:
        if self.ended is None and (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def execute(self, *command: str, limit_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """Runs a command inside, as `kubectl exec` does."""
        inside = ("nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--root")
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        return subprocess.run(
            [*inside, "--wd=/", "env", "-i", *environment, *command],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _hidden(mounts: list[Mount]) -> list[Path]:
    """Of this checkout and its interpreter, what lies on another file system than the root, or
    where a volume is mounted."""
    own = os.stat("/").st_dev
    return [
        path
        for path in dict.fromkeys((ROOT, Path(sys.prefix), Path(sys.base_prefix)))
        if path.stat().st_dev != own or any(path.is_relative_to(m.path) for m in mounts)
    ]


def image_environment() -> dict[str, str]:
    """What deploy/Dockerfile sets, and what keeps a test machine's processes small."""
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return {
        "HOME": "/var/lib/baton",
        "XDG_CACHE_HOME": "/var/cache",
        "TMPDIR": "/tmp",
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "UCX_MODULES": "^ib",
        "HF_HUB_OFFLINE": "1",
        **kept,
    }

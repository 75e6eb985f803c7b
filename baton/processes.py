"""A child process of `baton up`: its log lines, its last words, its end."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from baton.config import flags_for, settings_of
from baton.lifetime import PARENT_VARIABLE

LINES_KEPT = 20
LINE_LIMIT_BYTES = 1 << 20
ROOT = Path(__file__).resolve().parent.parent

OnLine = Callable[[str, str], None]
"""Called with a child's name and one line of its output."""


SECRET = frozenset({"redis_url"})
"""Settings that may hold a password: a command line is for every user of the machine to read."""


def child_command(command: str, config: object) -> list[str]:
    """The command line that runs `baton COMMAND` with this configuration, all but its secrets."""
    return [sys.executable, "-P", "-m", "baton", command, *flags_for(config, omit=SECRET)]


def child_secrets(config: object) -> dict[str, str]:
    """The environment that gives a child what its command line leaves out."""
    known = settings_of(type(config))
    return {known[name].variable: str(getattr(config, name)) for name in SECRET & known.keys()}


def child_environment(environment: Mapping[str, str], *, settings: Sequence[str]) -> dict[str, str]:
    """The environment of children.

    Settings in BATON_* variables are left out: they are in the flags already, and one for this
    command (a port) would mean something else to a child.
    """
    inherited = {name: value for name, value in environment.items() if name not in settings}
    # -P keeps the current directory off the path: a folder there named `router` must not count.
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    return {
        **inherited,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }


class Child:
    """One running process, in a process group of its own.

    A Ctrl-C in the terminal so reaches only `baton up`, which stops its children in order.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        self.name = name
        self.process = process
        self.last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        """What it said last, for the error where it dies."""
        self._reader = asyncio.create_task(self._read(on_line), name=f"read {name}")

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], *, environment: Mapping[str, str], on_line: OnLine
    ) -> "Child":
        """Starts it; must be awaited on the main thread, with whose end the child ends."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            # One pipe for both, since standard output belongs to the one line that says `ready`.
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            limit=LINE_LIMIT_BYTES,
        )
        return cls(name, process, on_line)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    async def wait(self) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        return await self.process.wait()

    def describe_end(self) -> str:
        """How it ended, for people."""
        status = self.process.returncode
        if status is None:
            return "is running"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-status).name}"
        return f"exited with status {status}"

    def terminate(self) -> None:
        """Asks it to drain and end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    async def end(self, *, within_s: float) -> bool:
        """Waits for its end, then kills what is left of its group; False where it was late."""
        punctual = True
        try:
            await asyncio.wait_for(self.process.wait(), within_s)
        except TimeoutError:
            punctual = False
        self.kill()
        await self.process.wait()
        await self.drain_output()
        return punctual

    def kill(self) -> None:
        """Ends its whole process group at once, also after the process itself is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def drain_output(self) -> None:
        """Reads what it left in the pipe, unless a grandchild keeps that open."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reader, 2.0)

    async def _read(self, on_line: OnLine) -> None:
        stream = self.process.stdout
        while stream is not None:
            try:
                line = await stream.readline()
            except ValueError:
                # A line beyond the limit: its beginning is lost, the next one is not.
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            on_line(self.name, text)

"""Baton's processes for tests, forked from one that has imported everything already.

A worker spends four seconds of CPU on imports, most of them torch's, and a run of the tests starts
some hundred workers. Here `python -m baton ...` and what it starts become forks instead: processes
as real as any, with their own pid, memory, session, files and command line, and children of
whoever started them. Only the interpreter's start and the imports are not repeated.

A spawner is a process of one thread that has imported all of it and waits. It forks twice, and what
is in between ends at once, so that the kernel gives the new process to the one who asked: that one
is, for this moment, the reaper of orphans. A process that starts others has a spawner of its own,
which ends with it.

Anything else is executed as ever: other programs, another interpreter's settings (`PYTHON*`,
`LD_*`), systems other than Linux. `executed()` does so for all, where the start itself is tested.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
NAME = "test-spawner"

ENGINES = ("prefill_service.engine", "decode_service.engine", "unified_service.engine")
STARTERS = frozenset({"baton", *ENGINES})
"""Modules whose processes start others."""
MODULES = STARTERS | {"worker.rank_process"}
IMPORTED = (
    "baton.cli", "baton.up", "router.main", "router.registry_redis", "worker.front",
    "prefill_service.main", "decode_service.main", "unified_service.main",
    *ENGINES, "worker.rank_process", "llguidance", "uvloop",
)  # fmt: skip
OPTIONAL = ("nixl_cu13",)

INTERPRETER = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "UCX_", "NIXL_", "TORCH_", "CUDA_")
"""Beginnings of variables that an interpreter or a library reads once, when it starts."""
FREE = frozenset({"PYTHONPATH", "PYTHONUNBUFFERED"})
"""Those of them that need not be equal: the path is compared by itself, output is unbuffered."""

_MESSAGE_LIMIT_BYTES = 1 << 17
_MOST_FILES = 64
_FIRST_SPARE_FILE = 500
_COMMAND_LINE_BYTES = 12_000
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36


@dataclass(frozen=True)
class _Start:
    """A process to be."""

    argv: list[str]
    cwd: str
    environment: dict[str, str]
    files: list[int]
    """Numbers that the files sent with this get there."""
    new_session: bool
    group: int
    parent: int

    @property
    def module(self) -> tuple[str, list[str]]:
        at = self.argv.index("-m") + 1
        return self.argv[at], self.argv[at + 1 :]


# ---- who starts processes ------------------------------------------------------------------------


class _Starter:
    """Stands in for what `subprocess` makes processes with, for commands that can be forked."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._execute: Any = subprocess._fork_exec  # type: ignore[attr-defined]
        self._interpreter = _of_interpreter(os.environ)
        self.is_active = True

    def __call__(self, *arguments: Any) -> int:
        start, files = self._read(*arguments)
        if not self.is_active or not self._can_be_forked(start):
            return int(self._execute(*arguments))
        with self._lock:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._end, [json.dumps(start.__dict__).encode()], files)
                return int(self._end.recv(64))
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def _read(
        self, args: Sequence[Any], _: Any, close_fds: bool, keep: Sequence[int], cwd: Any,
        environment: Sequence[bytes] | None, p2cread: int, p2cwrite: int, c2pread: int,
        c2pwrite: int, errread: int, errwrite: int, errpipe_read: int, errpipe_write: int,
        restore_signals: bool, new_session: bool, group: int, *more: Any,
    ) -> tuple[_Start, list[int]]:  # fmt: skip
        standard = [
            given if given != -1 else number
            for number, given in enumerate((p2cread, c2pwrite, errwrite))
        ]
        kept = [fd for fd in keep if fd != errpipe_write]
        if environment is None:
            variables = dict(os.environ)
        else:
            pairs = (os.fsdecode(entry).partition("=") for entry in environment)
            variables = {name: value for name, _, value in pairs}
        start = _Start(
            argv=[os.fsdecode(argument) for argument in args],
            cwd=os.getcwd() if cwd is None else os.fsdecode(cwd),
            environment=variables,
            files=[0, 1, 2, *kept],
            new_session=bool(new_session),
            group=group,
            parent=os.getpid(),
        )
        return start, standard + kept

    def _can_be_forked(self, start: _Start) -> bool:
        match start.argv:
            case [sys.executable, "-P", "-m", module, *_] | [sys.executable, "-m", module, *_]:
                pass
            case _:
                return False
        path = start.environment.get("PYTHONPATH", "").split(os.pathsep)
        return (
            module in MODULES
            and len(start.files) <= _MOST_FILES
            and sum(len(argument) + 1 for argument in start.argv) < _COMMAND_LINE_BYTES
            and _of_interpreter(start.environment) == self._interpreter
            and set(filter(None, path)) <= {*sys.path, str(ROOT)}
        )


def _of_interpreter(environment: Any) -> dict[str, str]:
    names = (n for n in environment if n.startswith(INTERPRETER) and n not in FREE)
    return {name: environment[name] for name in names}


_starter: _Starter | None = None


def _install(end: socket.socket) -> _Starter:
    global _starter
    _starter = _Starter(end)
    subprocess._fork_exec = _starter  # type: ignore[attr-defined]
    return _starter


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Starts the first spawner; what this process starts until the end is forked."""
    if sys.platform != "linux":
        yield
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    spawner = subprocess.Popen(
        [sys.executable, "-m", "tests.forked", str(theirs.fileno()), "." * _COMMAND_LINE_BYTES],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
    )
    theirs.close()
    starter = _install(ours)
    try:
        yield
    finally:
        subprocess._fork_exec = starter._execute  # type: ignore[attr-defined]
        ours.close()
        spawner.wait(10)


@contextlib.contextmanager
def executed() -> Iterator[None]:
    """All processes that this one starts in between, and theirs, are executed, not forked."""
    starter = _starter
    if starter is None:
        yield
        return
    starter.is_active = False
    try:
        yield
    finally:
        starter.is_active = True


def is_spawner(process: psutil.Process) -> bool:
    """Whether it is none of Baton's processes, only what they are forked from; so is what has ended
    since it was listed, as the one in between does when a worker starts anew."""
    try:
        return bool(process.name() == NAME)
    except psutil.NoSuchProcess:
        return True


def executed_nevertheless(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of Baton's processes that could not be forked, which costs seconds of CPU each: they
    were given variables of the interpreter that the spawner does not have."""
    if _starter is None or not _starter.is_active:
        return []
    return [p for p in processes if not MODULES.isdisjoint(p.cmdline()) and not _is_forked(p.pid)]


def _is_forked(pid: int) -> bool:
    begin, end = _command_line_of(pid)
    return end - begin >= _COMMAND_LINE_BYTES


# ---- the spawner ---------------------------------------------------------------------------------


def _serve(end: socket.socket) -> tuple[_Start, list[int]]:
    """Forks what is asked for; returns in each process that is to become something, and ends with
    the one who asks."""
    _prctl(_PR_SET_NAME, NAME.encode())
    _show_command_line([NAME])
    while True:
        message, files, _, _ = socket.recv_fds(end, _MESSAGE_LIMIT_BYTES, _MOST_FILES)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            start = _Start(**json.loads(message))
            while os.getppid() == between:
                os.sched_yield()
            if os.getppid() != start.parent:
                os._exit(1)
            _prctl(_PR_SET_NAME, b"python")
            end.send(str(os.getpid()).encode())
            end.close()
            return start, files
        for file in files:
            os.close(file)
        os.waitpid(between, 0)


def _become(start: _Start, files: list[int]) -> tuple[_Start, list[int]]:
    """Gives this process what a program of that command line would start with; returns again in
    what its own spawner forks."""
    while True:
        if start.new_session:
            os.setsid()
        elif start.group >= 0:
            os.setpgid(0, start.group)
        end: socket.socket | None = None
        if start.module[0] in STARTERS:
            end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if os.fork() == 0:
                end.close()
                for file in files:
                    os.close(file)
                start, files = _serve(theirs)
                continue
            theirs.close()
            _install(_with_high_number(end))
        _take_files(start, files)
        os.chdir(start.cwd)
        os.environ.clear()
        os.environ.update(start.environment)
        _show_command_line(start.argv)
        torch.seed()  # as each interpreter begins with a state of its own
        return start, files


def _with_high_number(end: socket.socket) -> socket.socket:
    """The same, out of the way of the numbers that files are wanted under."""
    high = socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE_FILE))
    end.close()
    return high


def _take_files(start: _Start, files: list[int]) -> None:
    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE_FILE) for file in files]
    for file in files:
        os.close(file)
    for file, wanted in zip(high, start.files, strict=True):
        os.dup2(file, wanted)
        os.close(file)


def _show_command_line(argv: list[str]) -> None:
    """What `ps` shows of this process."""
    begin, end = _command_line_of(os.getpid())
    shown = b"\0".join(map(os.fsencode, argv))
    if len(shown) < end - begin:
        ctypes.memmove(begin, shown.ljust(end - begin, b"\0"), end - begin)


def _command_line_of(pid: int) -> tuple[int, int]:
    """Where it lies in that process's memory. The spawner's is long, and its forks keep that."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[45]), int(fields[46])


def _prctl(option: int, value: Any) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(f"prctl {option} failed")


def main() -> None:
    end = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(name)
    for name in OPTIONAL:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("an import started a thread; forks of this process would lack it")
    gc.collect()
    gc.freeze()
    start, _ = _become(*_serve(end))
    module, arguments = start.module
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

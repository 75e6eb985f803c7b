"""Makes the virtual environment: Baton in editable form, its dependencies and the test tools.

Runs on the system's Python with the standard library alone. A machine without a GPU gets the CPU
build of torch: a plain `torch` would pull gigabytes of CUDA libraries there. A stamp in the
environment, keyed by pyproject.toml and this file, makes a second run a matter of milliseconds.

Usage: python3 tools/setup.py [--venv .venv]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
STEPS = 4
TAIL_LINES = 25

PIP_ENVIRONMENT = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PIP_PROGRESS_BAR": "off",
}


class SetupError(Exception):
    """Says what is missing and what to do about it."""


def main() -> int:
    arguments = argparse.ArgumentParser(description="Makes Baton's virtual environment.")
    arguments.add_argument("--venv", default=".venv", help="directory of the environment")
    venv = ROOT / arguments.parse_args().venv
    try:
        check_python()
        set_up(venv)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    if sys.version_info < (3, 11):
        raise SetupError(
            f"Python 3.11 or later is needed, {sys.executable} is {platform.python_version()}; "
            "name another one: make setup PYTHON=python3.12"
        )


def set_up(venv: Path) -> None:
    started = time.monotonic()
    gpu = has_gpu()
    stamp = venv / ".baton-setup"
    wanted = fingerprint(gpu)
    if stamp.exists() and stamp.read_text() == wanted and venv_works(venv):
        return
    stamp.unlink(missing_ok=True)
    make_venv(venv)
    install_torch(venv, gpu=gpu)
    extras = "dev,cuda" if gpu else "dev"
    say(3, f"installing baton-serve[{extras}] (a minute or two the first time)")
    pip(venv, "install", "--editable", f"{ROOT}[{extras}]")
    say(4, "checking that it starts")
    check_install(venv)
    stamp.write_text(wanted)
    if shutil.which("redis-server") is None:
        print(
            "setup: redis-server is not installed, so the tests of the shared registry will be "
            "skipped; on Debian or Ubuntu: apt-get install redis-server",
            flush=True,
        )
    print(f"setup: done in {time.monotonic() - started:.0f} s", flush=True)


def fingerprint(gpu: bool) -> str:
    digest = hashlib.sha256()
    digest.update((ROOT / "pyproject.toml").read_bytes())
    digest.update(Path(__file__).read_bytes())
    # The place counts: scripts of an environment name it, and the editable install points to it.
    digest.update(f"{sys.version_info[:2]} gpu={gpu} {ROOT}".encode())
    return digest.hexdigest()


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers and shows at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_works(venv: Path) -> bool:
    # The interpreter may be a link to a Python that is gone.
    return venv_python(venv).exists() and (venv_python(venv).parent / "baton").exists()


def same_python(venv: Path) -> bool:
    """Whether a working environment of this very Python lies there."""
    if not venv_works(venv):
        return False
    asked = subprocess.run(
        [str(venv_python(venv)), "-c", "import sys; print(sys.version_info[:3])"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() == str(sys.version_info[:3])


def make_venv(venv: Path) -> None:
    say(1, f"making {venv.name} with Python {platform.python_version()}")
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        raise SetupError(
            "this Python cannot make virtual environments; on Debian or Ubuntu: "
            f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-venv "
            "(or python3-venv)"
        ) from None
    made = subprocess.run(
        # --clear: a half-made environment, or one of another Python, must not linger. A sound one
        # stays, so that a change of dependencies does not fetch torch again.
        [sys.executable, "-m", "venv", *([] if same_python(venv) else ["--clear"]), str(venv)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise SetupError(f"python -m venv failed:\n{made.stdout}{made.stderr}")


def install_torch(venv: Path, *, gpu: bool) -> None:
    if gpu:
        say(2, "installing torch with CUDA (several GB)")
        pip(venv, "install", "torch>=2.11")
        return
    if platform.system() != "Linux":
        say(2, "installing torch")
        pip(venv, "install", "torch>=2.11")
        return
    # An exact local version fails at once where it is not at hand, so no probing is needed.
    say(2, "installing torch, CPU build, as pip is configured")
    if pip_try(venv, "install", CPU_TORCH):
        return
    say(2, "not there; installing it from PyTorch's own index")
    if pip_try(
        venv,
        *("install", CPU_TORCH, "--extra-index-url", CPU_TORCH_INDEX),
        *("--timeout", "10", "--retries", "1"),
    ):
        return
    say(2, "no CPU build within reach; installing the plain torch, which pulls several GB of CUDA")
    pip(venv, "install", "torch>=2.11")


def check_install(venv: Path) -> None:
    checked = subprocess.run(
        [str(venv_python(venv)), "-m", "baton", "version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if checked.returncode != 0:
        raise SetupError(f"baton does not start:\n{checked.stdout}{checked.stderr}")


def pip(venv: Path, *arguments: str) -> None:
    """Runs pip with one short line for each package.

    Raises:
        SetupError: it failed; the message ends with pip's last lines.
    """
    status, tail = run_pip(venv, arguments)
    if status != 0:
        raise SetupError("pip {} failed:\n{}".format(" ".join(arguments), "\n".join(tail)))


def pip_try(venv: Path, *arguments: str) -> bool:
    status, _ = run_pip(venv, arguments)
    return status == 0


def run_pip(venv: Path, arguments: tuple[str, ...]) -> tuple[int, list[str]]:
    process = subprocess.Popen(
        [str(venv_python(venv)), "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **PIP_ENVIRONMENT},
        cwd=ROOT,
    )
    tail: list[str] = []
    progress = Progress()
    if process.stdout is None:
        raise SetupError("pip's output cannot be read")
    with process.stdout:
        for line in process.stdout:
            tail = [*tail, line.rstrip()][-TAIL_LINES:]
            progress.show(line.strip())
    progress.end()
    return process.wait(), tail


class Progress:
    """Shows what pip is at: names in one running line, so that a log stays short."""

    WIDTH = 96

    def __init__(self) -> None:
        self.column = 0

    def show(self, line: str) -> None:
        words = line.split()
        if line.startswith("Collecting ") and len(words) > 1:
            name = words[1]
            for mark in "<>=!~;[(":
                name = name.split(mark)[0]
            self.write(name)
        elif line.startswith("Installing collected packages"):
            self.end()
            self.write("unpacking ...")

    def write(self, word: str) -> None:
        if self.column + len(word) + 1 > self.WIDTH:
            self.end()
        text = f" {word}" if self.column else f"      {word}"
        print(text, end="", flush=True)
        self.column += len(text)

    def end(self) -> None:
        if self.column:
            print(flush=True)
        self.column = 0


def say(step: int, text: str) -> None:
    print(f"[{step}/{STEPS}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

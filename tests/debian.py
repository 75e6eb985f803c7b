"""What a test's set-up asks of a Debian machine: packages, and where its archive is."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

PATIENT = ("-qq", "-o", "Acquire::Retries=5", "-o", "DPkg::Lock::Timeout=300")
"""apt-get's options: a mirror may be slow for a moment, and another apt-get at work."""

NOT_TO_BE_HAD = os.EX_TEMPFAIL
"""Exit status of a set-up that ends with a SetUpError: its last line says why, and continuous
integration leaves out by name what needs it. Any other end is a failure."""


class SetUpError(Exception):
    """What tests need is not here and cannot be had; says what was tried and what is missing."""


def set_up(get: Callable[[], str]) -> int:
    """Of a module that gets what tests need, before they run: prints what it got, or in one line
    why it did not. Returns the exit status."""
    # In the background of a shell Ctrl-C is ignored, and what it has begun would outlive it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        got = get()
    except SetUpError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(error, file=sys.stderr)
        print(f"{lines[0][:200]}: {lines[-1][:300]}" if len(lines) > 1 else lines[0])
        return NOT_TO_BE_HAD
    print(f"{got} ({time.monotonic() - began:.0f} s)")
    return 0


def install(packages: Mapping[str, str]) -> None:
    """Installs those whose program is missing. Raises SetUpError.

    Args:
        packages: program (or file) -> the package that holds it.
    """
    missing = sorted(
        {
            package
            for program, package in packages.items()
            if not (shutil.which(program) or (program[0] == "/" and Path(program).exists()))
        }
    )
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise SetUpError(f"not installed here: {' '.join(missing)} (root on Debian installs them)")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", *PATIENT, "update", environment=quiet)
    run(
        "apt-get", *PATIENT, "install", "-y", "--no-install-recommends", *missing, environment=quiet
    )


def cache_folder(*names: str) -> Path:
    """Where what tests download and build stays for the next run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home.joinpath("baton", *names)


def mirror() -> str:
    """Where this machine has its own Debian packages from, which serves other releases, too; on
    another distribution DEBIAN_MIRROR must say. Raises SetUpError."""
    named = os.environ.get("DEBIAN_MIRROR")
    if named:
        return named
    if "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        raise SetUpError("this is no Debian: set DEBIAN_MIRROR to a mirror of its archive")
    listed = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    mirrors = [uri for uri in listed.split() if not uri.rstrip("/").endswith("security")]
    if not mirrors:
        raise SetUpError("apt knows no archive here: set DEBIAN_MIRROR to a mirror of Debian's")
    return mirrors[0].rstrip("/")


def apart(directory: Path, line: str) -> list[str]:
    """apt-get's options to read one source alone, with all its state in `directory`: the machine's
    own lists stay as they are. Args: line: of sources.list, `{}` for the archive's address."""
    install({KEYRING: "debian-archive-keyring"})
    for folder in ("lists/partial", "archives/partial"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    sources = directory / "sources.list"
    sources.write_text(line.format(f"[signed-by={KEYRING}] {mirror()}") + "\n")
    return [
        *("-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"),
        *("-o", f"Dir::State::lists={directory / 'lists'}", "-o", f"Dir::Cache={directory}"),
        *("-o", "APT::Sandbox::User=root"),
    ]


def run(
    *command: str,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_s: float = 600.0,
) -> str:
    """What the command printed. Raises SetUpError with both outputs where it failed, or took
    longer."""
    with subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, said = process.communicate(timeout=limit_s)
        except BaseException as error:
            # What it started goes with it: a build that nobody waits for takes the whole machine.
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise SetUpError(f"{' '.join(command)}\nnot done after {limit_s:.0f} s") from error
            raise
    if process.returncode != 0:
        raise SetUpError(f"{' '.join(command)}\n{out[-4000:]}{said[-4000:]}")
    return out

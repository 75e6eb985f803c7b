"""What a test's set-up asks of a Debian machine: packages, and where its archive is."""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class SetUpError(Exception):
    """What tests need is not here and cannot be had; says what was tried and what is missing."""


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
    run("apt-get", "update", "-qq", environment=quiet)
    run(
        *("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing),
        environment=quiet,
    )


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
    """What the command printed. Raises SetUpError with both outputs where it failed."""
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
        except BaseException:
            # What it started goes with it: a build that nobody waits for takes the whole machine.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        raise SetUpError(f"{' '.join(command)}\n{out[-4000:]}{said[-4000:]}")
    return out

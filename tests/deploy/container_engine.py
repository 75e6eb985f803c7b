"""A container engine for the tests, wherever they run: the machine's own, or one set up here.

Where `docker` answers, it is used as it is. Elsewhere (root on Debian or Ubuntu) the engine's
packages are installed, a daemon is started with a data root of its own and ended again; compose and
buildx come from the packages of Debian 13, whose programs run on Debian 12, too. Base images that
no registry within reach serves are made from Debian packages, under the public names that
deploy/Dockerfile and deploy/compose.yaml use.

Usage: python -m tests.deploy.container_engine (gets all that, and runs one container)
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.debian import PATIENT, SetUpError, apart, cache_folder, install, mirror, run, set_up

PYTHON_IMAGE = "python:3.11-slim-bookworm"
PLUGINS = ("docker-compose", "docker-buildx")
START_LIMIT_S = 60.0
PAUSE_S = 10.0
PULL_LIMIT_S = 180.0
"""After which a registry counts as out of reach."""
REACH_INDEX = "import socket; socket.create_connection(('pypi.org', 443), 20).close()"
SLIMMED = ("doc", "groff", "info", "lintian", "locale", "man")
"""Folders of /usr/share that slim images leave out."""


class EngineError(SetUpError):
    """No containers can run here; says what was tried and what is missing."""


@dataclass(frozen=True)
class Engine:
    """A daemon that answers, and how to reach it."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for `docker`: where the daemon and the plug-ins are."""

    def docker(
        self,
        *arguments: str,
        limit_s: float = 120.0,
        check: bool = True,
        more: Mapping[str, str] | None = None,
        given: str = "",
    ) -> str:
        """Runs `docker` with `given` as its input; what it printed. Raises EngineError with both
        outputs where it failed, or took longer."""
        try:
            done = subprocess.run(
                ["docker", *arguments],
                env={**os.environ, **self.environment, **(more or {})},
                input=given,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            what = f"docker {' '.join(arguments)}"
            raise EngineError(f"{what}\nnot done after {limit_s:.0f} s") from error
        if check and done.returncode != 0:
            raise EngineError(f"docker {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def answers(self) -> bool:
        if shutil.which("docker") is None:
            return False
        return bool(self.docker("version", "--format", "{{.Server.Version}}", check=False))

    def has_image(self, name: str) -> bool:
        return bool(self.docker("image", "ls", "--quiet", name))


@contextlib.contextmanager
def container_engine(cache: Path) -> Iterator[Engine]:
    """A running engine with compose, buildx and the base image; ended if it was started here.

    Args:
        cache: where what is downloaded and built stays for the next run. About 3 GB.
    """
    cache.mkdir(parents=True, exist_ok=True)
    own = Engine()
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((cache / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EngineError(f"another run of these tests is at work with {cache}") from None
        engine = own if own.answers() else stack.enter_context(_daemon(cache / "docker"))
        engine = _with_plugins(engine, cache / "plugins")
        _python_image(engine, cache / "rootfs")
        yield engine


@contextlib.contextmanager
def _daemon(directory: Path) -> Iterator[Engine]:
    """A daemon of our own: nothing of it lies outside `directory`, and it ends with the tests."""
    if os.geteuid() != 0:
        raise EngineError("no container engine answers here, and only root can start one")
    install({"docker": "docker.io", "dockerd": "docker.io", "iptables": "iptables"})
    directory.mkdir(parents=True, exist_ok=True)
    socket = directory / "docker.sock"
    engine = Engine({"DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "1"})
    pid_file = directory / "docker.pid"
    if engine.answers():
        # Of a run that was killed; it ends with this one.
        try:
            yield engine
        finally:
            os.kill(int(pid_file.read_text()), signal.SIGTERM)
        return
    pid_file.unlink(missing_ok=True)
    with (directory / "dockerd.log").open("w") as log:
        process = subprocess.Popen(
            [
                # Should this process be killed, the daemon ends its containers and itself.
                *("setpriv", "--pdeathsig", "TERM"),
                *("dockerd", "--host", f"unix://{socket}", "--mtu", str(_mtu())),
                *("--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")),
                *("--pidfile", str(pid_file)),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not engine.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (directory / "dockerd.log").read_text()[-3000:]
                raise EngineError(f"dockerd does not start:\n{tail}")
            time.sleep(0.2)
        yield engine
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def _mtu() -> int:
    """The smallest MTU of this machine's own links: a bridge with a larger one loses packets."""
    found = [
        int((link / "mtu").read_text())
        for link in Path("/sys/class/net").iterdir()
        if link.name.startswith(("e", "w"))
    ]
    return min(found, default=1500)


def _with_plugins(engine: Engine, directory: Path) -> Engine:
    """The engine with compose v2 and buildx: the machine's own, or Debian 13's."""
    if all(engine.docker(name[7:], "version", check=False) for name in PLUGINS):
        return engine
    plugins = directory / "cli-plugins"
    if not all((plugins / name).exists() for name in PLUGINS):
        _download_plugins(directory)
    added = Engine({**engine.environment, "DOCKER_CONFIG": str(directory)})
    for name in PLUGINS:
        added.docker(name[7:], "version")
    return added


def _download_plugins(directory: Path) -> None:
    """Signed packages of Debian 13, unpacked and not installed."""
    apt = directory / "apt"
    options = apart(apt, "deb {} trixie main")
    run("apt-get", *options, *PATIENT, "update")
    run("apt-get", *options, *PATIENT, "download", *PLUGINS, directory=apt)
    plugins = directory / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    for name in PLUGINS:
        (package,) = apt.glob(f"{name}_*.deb")
        run("dpkg-deb", "-x", str(package), str(apt / name))
        (program,) = (apt / name).glob(f"usr/*/docker/cli-plugins/{name}")
        shutil.copy2(program, plugins / name)
    shutil.rmtree(apt / "lists")


def _python_image(engine: Engine, directory: Path) -> None:
    """The base of all images: pulled, or made from Debian packages under the same name."""
    if engine.has_image(PYTHON_IMAGE):
        return
    with contextlib.suppress(EngineError):
        engine.docker("pull", "--quiet", PYTHON_IMAGE, limit_s=PULL_LIMIT_S)
        return
    install({"debootstrap": "debootstrap"})
    if directory.exists():
        shutil.rmtree(directory)
    packages = "python3,python3-venv,ca-certificates"
    command = ("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm")
    run(*command, str(directory), mirror())
    shared = [f"usr/share/{name}" for name in SLIMMED]
    for name in (*shared, "var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).mkdir()
    archive = directory.with_suffix(".tar")
    run("tar", "-C", str(directory), "-cf", str(archive), ".")
    engine.docker("import", str(archive), PYTHON_IMAGE, limit_s=300.0)
    archive.unlink()
    shutil.rmtree(directory)


def stand_in(engine: Engine, name: str, *packages: str) -> None:
    """An image of that name: pulled, or the base with Debian packages where no registry has it."""
    if engine.has_image(name):
        return
    with contextlib.suppress(EngineError):
        engine.docker("pull", "--quiet", name, limit_s=PULL_LIMIT_S)
        return
    recipe = (
        f"FROM {PYTHON_IMAGE}\nRUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive "
        f"apt-get install -y -qq --no-install-recommends {' '.join(packages)} >/dev/null\n"
    )

    def build() -> None:
        engine.docker("build", "--quiet", "--tag", name, "-", limit_s=600.0, given=recipe)

    twice(build)


def twice(build: Callable[[], object]) -> None:
    """A registry may fail for a moment, and all tests would miss what it gives."""
    try:
        build()
    except EngineError:
        time.sleep(PAUSE_S)
        build()


def _try_it() -> str:
    with container_engine(cache_folder("containers")) as engine:
        # What the images' builds do: over the engine's own bridge, to the package index.
        command = ("run", "--rm", PYTHON_IMAGE, "python3", "-c", REACH_INDEX)
        twice(lambda: engine.docker(*command))
        version = engine.docker("version", "--format", "{{.Server.Version}}")
    return f"docker {version} runs containers, which reach the package index"


if __name__ == "__main__":
    sys.exit(set_up(_try_it))

"""A real Redis for a test: its own process, port and directory, and ways to hurt it."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.baton.certificates import Pair

START_LIMIT_S = 10.0


class RedisServer:
    """One redis-server on a port that stays the same over restarts; it keeps nothing on disk."""

    def __init__(
        self, directory: Path, *, password: str = "", tls: tuple[Pair, Path] | None = None
    ) -> None:
        """`tls`: its certificate and the authority of its clients; it takes no plain text then."""
        self._directory = directory
        self._password = password
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis{'s' if self._tls else ''}://{secret}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Comes up empty, whatever was there before."""
        command = [
            "redis-server",
            *self._port_options(),
            *("--bind", "127.0.0.1", "--dir", str(self._directory)),
            *("--save", "", "--appendonly", "no", "--logfile", str(self._directory / "redis.log")),
            *(["--requirepass", self._password] if self._password else []),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, (self._directory / "redis.log").read_text()
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def _port_options(self) -> list[str]:
        if self._tls is None:
            return ["--port", str(self.port)]
        pair, authority = self._tls
        options = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "yes"]
        options += ["--tls-cert-file", str(pair.certificate), "--tls-key-file", str(pair.key)]
        return [*options, "--tls-ca-cert-file", str(authority)]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running_redis(
    directory: Path, *, password: str = "", tls: tuple[Pair, Path] | None = None
) -> Iterator[RedisServer]:
    """Skips the test, by name, where there is no redis-server."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (on Debian or Ubuntu: apt-get install it)")
    server = RedisServer(directory, password=password, tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.kill()

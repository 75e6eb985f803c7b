"""The engine process as its front sees it: spawned, watched, and never left behind."""

import asyncio
import contextlib
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

from kvtransfer.shared_memory import anonymous_file
from protos.baton.v1 import channel_pb2
from worker.channel import ChannelClosedError, FrontChannel

logger = logging.getLogger(__name__)

MessageHandler = Callable[[channel_pb2.EngineToFront], Awaitable[None]]

STOP_GRACE_S = 10.0
"""How long an engine may take to end after it was told to, before it is killed."""


_THREADS_THAT_WAIT_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
"""On a CPU: between two parallel parts of a step OpenMP's threads otherwise spin, on cores that
front, router and the other engine need. With two engines of two threads on two cores, 16 requests
at once took 22 % less CPU so, and tokens came 5 % faster (bench/README.md)."""


class EngineStartError(Exception):
    """The engine did not become ready; the message is for the operator."""


class EngineHandle:
    """Spawns `python -m <module>` with one end of the channel and two shared memory files.

    The files (landing window, outbox) are made here, empty, and sized by the engine once it knows
    the model; both processes map them, so KV bytes that come by gRPC are never copied through the
    channel.
    """

    def __init__(self, *, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: FrontChannel | None = None
        self.window_fd = anonymous_file()
        self.outbox_fd = anonymous_file()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def start(
        self, config_json: bytes, *, on_progress: Callable[[str], None]
    ) -> channel_pb2.EngineReady:
        """Waits until the model is loaded. Raises EngineStartError with the engine's reason."""
        front_end, engine_end = socket.socketpair()
        fds = (engine_end.fileno(), self.window_fd, self.outbox_fd)
        self._process = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-m", self._module, *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={**_THREADS_THAT_WAIT_SLEEP, **os.environ},
        )
        engine_end.close()
        self._channel = await FrontChannel.open(front_end)
        self.send(channel_pb2.FrontToEngine(start=config_json))
        while True:
            try:
                message = await self._channel.receive()
            except ChannelClosedError:
                code = await asyncio.to_thread(self._process.wait)
                raise EngineStartError(
                    f"the engine process ended while starting (exit status {code}); "
                    "its log above says why"
                ) from None
            kind = message.WhichOneof("kind")
            if kind == "ready":
                return message.ready
            if kind == "failed":
                raise EngineStartError(message.failed.error.message)
            if kind == "progress":
                on_progress(message.progress)

    def window_view(self, size: int) -> memoryview | None:
        """The landing window's bytes in this process; None where it lies in device memory."""
        return _map(self.window_fd, size)

    def outbox_view(self, size: int) -> memoryview | None:
        """The outbox's bytes in this process; None where pages never leave by gRPC."""
        return _map(self.outbox_fd, size)

    def send(self, message: channel_pb2.FrontToEngine) -> None:
        if self._channel is not None:
            self._channel.send(message)

    async def pump(self, handler: MessageHandler) -> None:
        """Hands every message of the engine to `handler`; returns when the engine is gone."""
        if self._channel is None:
            raise EngineStartError("the engine was not started")
        with contextlib.suppress(ChannelClosedError):
            while True:
                await handler(await self._channel.receive())

    async def stop(self) -> int:
        """Asks the engine to end, kills it after a grace period; returns its exit status."""
        if self._process is None:
            return 0
        self.send(channel_pb2.FrontToEngine(stop=True))
        try:
            await asyncio.wait_for(asyncio.to_thread(self._wait, STOP_GRACE_S), STOP_GRACE_S + 1)
        except (TimeoutError, subprocess.TimeoutExpired):
            logger.warning("engine %d did not stop within %.0f s: killed", self.pid, STOP_GRACE_S)
            self._process.kill()
        if self._channel is not None:
            self._channel.close()
        for fd in (self.window_fd, self.outbox_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        return self._process.wait()

    def _wait(self, timeout_s: float) -> int:
        if self._process is None:
            return 0
        return self._process.wait(timeout_s)


def _map(fd: int, size: int) -> memoryview | None:
    if size == 0 or os.fstat(fd).st_size < size:
        return None
    return memoryview(mmap.mmap(fd, size))

"""The typed channel between a worker's front and its engine.

A socket pair that carries length-prefixed `FrontToEngine` and `EngineToFront` messages. The
engine's end never blocks the scheduler: one thread reads into an inbox; whoever has something to
say writes as much as the socket takes at once, which is all of it as a rule, and one thread writes
the rest. End of file on either end means that the other process is gone.
"""

import asyncio
import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from protos.baton.v1 import channel_pb2

_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20
"""A longer frame is a programming error: KV bytes never travel here."""


class ChannelClosedError(Exception):
    """The process at the other end is gone."""


class FrontChannel:
    """The front's end, on asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "FrontChannel":
        """Takes over a connected socket."""
        end.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=end)
        return cls(reader, writer)

    def send(self, message: channel_pb2.FrontToEngine) -> None:
        """Queues a message; never waits. Messages to a dead engine are dropped: its death is
        reported once, by `receive`.
        """
        if self._writer.is_closing():
            return
        payload = message.SerializeToString()
        self._writer.write(_HEADER.pack(len(payload)) + payload)

    async def receive(self) -> channel_pb2.EngineToFront:
        """The next message. Raises ChannelClosedError when the engine is gone."""
        try:
            header = await self._reader.readexactly(_HEADER.size)
            payload = await self._reader.readexactly(_HEADER.unpack(header)[0])
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ChannelClosedError("the engine process closed its channel") from error
        return channel_pb2.EngineToFront.FromString(payload)

    def close(self) -> None:
        self._writer.close()


class Received(NamedTuple):
    """A message, and when it came: the scheduler may get to it a step later."""

    message: channel_pb2.FrontToEngine
    at: float
    """time.monotonic() seconds."""


class EngineChannel:
    """The engine's end: an inbox to drain once a pass, an outbox that never blocks."""

    def __init__(self, end: socket.socket, *, on_closed: Callable[[], None]) -> None:
        """`on_closed` runs on the reader's thread when the front is gone."""
        self._socket = end
        self._on_closed = on_closed
        self._inbox: deque[Received] = deque()
        self._outbox: deque[bytes | memoryview] = deque()
        """Frames that the socket did not take yet; the first may be the rest of one."""
        self._writing = False
        """Whether the writer's thread is at it, which nobody may come before."""
        self._work = threading.Event()
        self._out_ready = threading.Condition()
        self._closing = False
        self._hung_at = math.inf
        self._reader = threading.Thread(target=self._read, name="channel-in", daemon=True)
        self._writer = threading.Thread(target=self._write, name="channel-out", daemon=True)

    def start(self) -> None:
        self._reader.start()
        self._writer.start()

    def begin_step(self, limit_s: float) -> None:
        """The scheduler starts a pass: pings stay unanswered if it takes longer than `limit_s`."""
        self._hung_at = time.monotonic() + limit_s

    def end_step(self) -> None:
        self._hung_at = math.inf

    def _is_hung(self) -> bool:
        return time.monotonic() > self._hung_at

    def wake(self) -> None:
        """Ends `wait` early: some other source has work for the scheduler."""
        self._work.set()

    def wait(self, timeout_s: float) -> None:
        """Sleeps until a message is there, `wake` was called, or the time is over."""
        self._work.wait(timeout_s)

    def drain(self) -> list[Received]:
        """All messages that have arrived, in order; never waits."""
        self._work.clear()
        messages = []
        while self._inbox:
            messages.append(self._inbox.popleft())
        return messages

    def send(self, message: channel_pb2.EngineToFront) -> None:
        """Sends a message to the front, or queues what the socket does not take now; never waits.
        Safe from any thread. (To wake a thread for each, and to share the interpreter with it while
        it writes, would take a token's sender longer than the write.)"""
        payload = message.SerializeToString()
        frame: bytes | memoryview = _HEADER.pack(len(payload)) + payload
        with self._out_ready:
            if not self._outbox and not self._writing:
                try:
                    sent = self._socket.send(frame, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return  # the front is gone, as the reader's thread will see
                if sent == len(frame):
                    return
                frame = memoryview(frame)[sent:]
            self._outbox.append(frame)
            self._out_ready.notify()

    def close(self) -> None:
        """Writes what is queued, then closes."""
        with self._out_ready:
            self._closing = True
            self._out_ready.notify()
        self._writer.join(timeout=5.0)
        self._socket.close()

    def _read(self) -> None:
        stream = self._socket.makefile("rb")
        while True:
            try:
                header = stream.read(_HEADER.size)
                if len(header) < _HEADER.size:
                    break
                size = _HEADER.unpack(header)[0]
                payload = stream.read(size)
                if len(payload) < size:
                    break
            except OSError:
                break
            message = channel_pb2.FrontToEngine.FromString(payload)
            if message.WhichOneof("kind") == "ping":
                # Answered here, since the scheduler may be in the middle of a long step; but one
                # that takes for ever is a hang, and a hung engine must not look alive.
                if not self._is_hung():
                    self.send(channel_pb2.EngineToFront(pong=message.ping))
                continue
            self._inbox.append(Received(message, time.monotonic()))
            self._work.set()
        self._on_closed()

    def _write(self) -> None:
        while True:
            with self._out_ready:
                while not self._outbox and not self._closing:
                    self._out_ready.wait()
                if not self._outbox:
                    return
                frames = b"".join(self._outbox)
                self._outbox.clear()
                self._writing = True
            try:
                self._socket.sendall(frames)
            except OSError:
                return
            with self._out_ready:
                self._writing = False

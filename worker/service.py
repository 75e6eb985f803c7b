"""The worker's gRPC service: router sessions, status, drain."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

Write = Callable[[worker_pb2.WorkerMessage], Awaitable[None]]

MAX_SESSION_BACKLOG = 65_536
"""Messages that wait for a router that does not read. Past it the session is broken off, which
aborts its requests: memory stays bounded and no token is dropped quietly."""

ROUTER_SILENCE_S = 20.0
"""A router pings every half second. One that says nothing for so long has lost its host or stands
still; its requests end, or a machine that vanished without a word would keep their pages for ever.
"""


class RouterSession:
    """What the worker has to say to one router, in order."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.last_heard = time.monotonic()
        """When the router last said something. Seconds, monotonic."""
        self._queue: deque[worker_pb2.WorkerMessage] = deque()
        self._ready = asyncio.Event()
        self._broken = asyncio.Event()
        self._closing = False
        self._reason = ""

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """Queues a message; never waits. Dropped once the session is closing."""
        if self._closing:
            return
        if len(self._queue) >= MAX_SESSION_BACKLOG:
            self.break_off(f"{len(self._queue)} messages wait for a router that does not read")
            return
        self._queue.append(message)
        self._ready.set()

    def close(self) -> None:
        """Ends the stream after what is queued."""
        self._closing = True
        self._ready.set()

    def break_off(self, reason: str) -> None:
        """Ends the stream now, also where a write is stuck; what is queued is dropped."""
        self._reason = self._reason or reason
        self._queue.clear()
        self.close()
        self._broken.set()

    async def transmit(self, write: Write) -> str:
        """Writes what is queued until `close`; why it ended."""
        while True:
            while self._queue:
                await write(self._queue.popleft())
            if self._closing:
                return "it was closed"
            self._ready.clear()
            await self._ready.wait()

    async def until_broken(self) -> str:
        """Returns why, once `break_off` was called."""
        await self._broken.wait()
        return self._reason


class FrontHandler(Protocol):
    """What the service needs of the front."""

    instance_id: str

    def on_session_opened(self, session: RouterSession) -> worker_pb2.WorkerHello:
        """Called before the first message of a session is read."""
        ...

    def on_router_message(self, session: RouterSession, message: worker_pb2.RouterMessage) -> None:
        """Called for each message of a session, in order; must not wait."""
        ...

    def on_session_closed(self, session: RouterSession) -> None:
        """Called once, when the router is gone: its requests end with it."""
        ...

    async def status(self) -> worker_pb2.WorkerStatus: ...

    def drain(self, timeout_s: float | None = None) -> None:
        """Called at any time, also again: the earliest of all limits counts."""
        ...

    async def probe(self, request: worker_pb2.ProbeRequest) -> worker_pb2.ProbeReport:
        """Measures the way to a peer. Raises TimeoutError where the engine does not answer."""
        ...

    def describe(self) -> worker_pb2.RegisterRequest:
        """What it registers with."""
        ...


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Translates between gRPC and the front's handler; keeps no state of its own."""

    def __init__(
        self,
        front: FrontHandler,
        *,
        silence_s: float = ROUTER_SILENCE_S,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`silence_s`: a router that says nothing for so long is gone; `on_refused` is told why a
        session did not come about: malformed, protocol or instance."""
        self._front = front
        self._on_refused = on_refused
        self._silence_s = silence_s

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("kind") != "hello":
            self._on_refused("malformed")
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "a session begins with SessionHello"
            )
            return
        if first.hello.protocol_version != PROTOCOL_VERSION:
            self._on_refused("protocol")
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol version {first.hello.protocol_version} met {PROTOCOL_VERSION}: "
                "router and worker must be of the same release",
            )
        if first.hello.instance_id != self._front.instance_id:
            self._on_refused("instance")
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"instance {first.hello.instance_id} is gone; this is {self._front.instance_id}",
            )
        session = RouterSession(first.hello.router_id)
        hello = self._front.on_session_opened(session)
        # The session ends with the first of these, and its requests end with it, at once: that must
        # not wait for a write that is stuck, nor for the garbage collector to close a generator.
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._read(session, request_iterator),
                self._transmit(session, hello, context.write),
                self._watch(session),
                session.until_broken(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            logger.info("the session of router %s ends: %s", session.router_id, _reason(done))
        finally:
            for task in tasks:
                task.cancel()
            session.close()
            self._front.on_session_closed(session)

    async def _transmit(
        self, session: RouterSession, hello: worker_pb2.WorkerHello, write: Write
    ) -> str:
        await write(worker_pb2.WorkerMessage(hello=hello))
        return await session.transmit(write)

    async def _read(
        self,
        session: RouterSession,
        requests: AsyncIterator[worker_pb2.RouterMessage],
    ) -> str:
        async for message in requests:
            session.last_heard = time.monotonic()
            self._front.on_router_message(session, message)
        return "the router closed it"

    async def _watch(self, session: RouterSession) -> str:
        interval_s = self._silence_s / 4
        while True:
            before = time.monotonic()
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            # Time for which this process itself stood still is not the router's silence.
            session.last_heard += max(0.0, now - before - 2 * interval_s)
            if now - session.last_heard > self._silence_s:
                return f"nothing was heard for {now - session.last_heard:.1f} s"

    async def GetStatus(
        self,
        request: worker_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.WorkerStatus:
        try:
            return await self._front.status()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the engine does not answer")
            raise

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.DrainResponse:
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        if timeout_s is not None and not timeout_s >= 0:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"timeout_s is negative: {timeout_s}"
            )
        self._front.drain(timeout_s)
        return worker_pb2.DrainResponse()

    async def Probe(
        self,
        request: worker_pb2.ProbeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.ProbeReport:
        try:
            return await self._front.probe(request)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the engine does not answer")
            raise

    async def Describe(
        self,
        request: worker_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.RegisterRequest:
        return self._front.describe()


def _reason(done: set[asyncio.Task[str]]) -> str:
    task = next(iter(done))
    error = None if task.cancelled() else task.exception()
    return repr(error) if error is not None else task.result()

"""The worker's gRPC service: router sessions, status, drain."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

MAX_SESSION_BACKLOG = 65_536
"""Messages that wait for a router that does not read. Past it the session is closed, which aborts
its requests: memory stays bounded and no token is dropped quietly."""


class RouterSession:
    """What the worker has to say to one router, in order."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self._queue: asyncio.Queue[worker_pb2.WorkerMessage | None] = asyncio.Queue()

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """Queues a message; never waits."""
        if self._queue.qsize() >= MAX_SESSION_BACKLOG:
            logger.error("router %s does not read its session: closing it", self.router_id)
            self.close()
            return
        self._queue.put_nowait(message)

    def close(self) -> None:
        """Ends the stream after what is queued."""
        self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[worker_pb2.WorkerMessage]:
        while (message := await self._queue.get()) is not None:
            yield message


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

    def drain(self) -> None: ...


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Translates between gRPC and the front's handler; keeps no state of its own."""

    def __init__(self, front: FrontHandler) -> None:
        self._front = front

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("kind") != "hello":
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "a session begins with SessionHello"
            )
            return
        if first.hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol version {first.hello.protocol_version} met {PROTOCOL_VERSION}: "
                "router and worker must be of the same release",
            )
        if first.hello.instance_id != self._front.instance_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"instance {first.hello.instance_id} is gone; this is {self._front.instance_id}",
            )
        session = RouterSession(first.hello.router_id)
        yield worker_pb2.WorkerMessage(hello=self._front.on_session_opened(session))
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            async for message in session.messages():
                yield message
        finally:
            reader.cancel()
            self._front.on_session_closed(session)

    async def _read(
        self,
        session: RouterSession,
        requests: AsyncIterator[worker_pb2.RouterMessage],
    ) -> None:
        try:
            async for message in requests:
                self._front.on_router_message(session, message)
        except grpc.RpcError as error:
            logger.info("session of router %s broke: %s", session.router_id, error)
        finally:
            session.close()

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
        self._front.drain()
        return worker_pb2.DrainResponse()

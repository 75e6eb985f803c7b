"""The asyncio client: the same calls as `baton.Client`, awaited.

    async with AsyncClient("127.0.0.1:50051") as client:
        async with client.generate("Hi", max_tokens=16) as stream:
            async for chunk in stream:
                print(chunk.text, end="")

Use the stream as a context manager wherever it may be left early: one that is merely abandoned is
cancelled when Python collects it, and until then the workers go on computing for it.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from baton.connection import ConnectionConfig, config_for
from baton.errors import Cancelled, Unavailable, error_from_call
from baton.messages import (
    Chunk,
    Collector,
    Completion,
    Model,
    ServerInfo,
    chunk_from,
    model_from,
    server_info_from,
)
from baton.options import RequestOptions, build_request
from protos.baton.v1 import inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class AsyncTokenStream:
    """The chunks of one request, in order; an async iterator and an async context manager."""

    def __init__(
        self, call: Any, request_id: str, wait: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._call = call
        self._responses = call.__aiter__()
        self._wait = wait
        self.request_id = request_id
        """The request's id; known from the first chunk on where the router chose it."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            RequestError: the router refused or lost the request.
        """
        if self._wait is not None:
            wait, self._wait = self._wait, None
            try:
                await wait()
            except BaseException:
                self._call.cancel()
                raise
        chunk = chunk_from(await _typed(anext(self._responses), self.request_id))
        self.request_id = chunk.request_id or self.request_id
        return chunk

    async def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # `async for chunk in client.generate(...): break` leaves no other trace than this.
        with contextlib.suppress(RuntimeError):  # the event loop has been closed
            self._call.cancel()


class AsyncClient:
    """A connection to a router, for one event loop."""

    def __init__(
        self, address: str = "127.0.0.1:50051", *, config: ConnectionConfig | None = None
    ) -> None:
        """Connects lazily: the first call meets a router that is away.

        Args:
            address: host:port of the router's gRPC server; grpcs://host:port speaks TLS.
            config: keep-alive, limits, TLS, API key.

        Raises:
            ValueError: the address asks for plain text where `config` asks for TLS.
        """
        self._config = config_for(address, config)
        self._address = address
        self._metadata = self._config.metadata()
        self._channel = self._config.open_async(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncTokenStream:
        """Streams the continuation of a prompt.

        Args:
            prompt: text, or token ids.
            timeout: seconds for the whole stream; then it ends with DeadlineExceeded.
            options: max_tokens, temperature, seed ... (`baton.RequestOptions` explains each).

        Raises:
            InvalidRequest: a value that cannot be sent. All else is raised by the stream.
            TypeError: an option that there is none of.
        """
        return self._generate(build_request(prompt, options), timeout)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer at once; arguments as for `generate`.

        Raises:
            RequestError: the router refused or lost the request.
        """
        collector = Collector()
        request = build_request(prompt, options, whole=True)
        async with self._generate(request, timeout) as stream:
            async for chunk in stream:
                collector.add(chunk)
        return collector.completion()

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a running request; False where none of that id was live.

        Raises:
            RequestError: the router is out of reach.
        """
        request = inference_pb2.AbortRequest(request_id=request_id)
        response = await self._call(self._stub.Abort, request, timeout, request_id)
        return bool(response.found)

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """The models served.

        Raises:
            RequestError: the router is out of reach.
        """
        request = inference_pb2.ListModelsRequest()
        response = await self._call(self._stub.ListModels, request, timeout)
        return [model_from(card) for card in response.models]

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """The router's version and its workers.

        Raises:
            RequestError: the router is out of reach.
        """
        request = inference_pb2.GetServerInfoRequest()
        response = await self._call(self._stub.GetServerInfo, request, timeout)
        return server_info_from(response)

    async def close(self) -> None:
        """Closes the connection; open streams end with Cancelled."""
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _generate(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncTokenStream:
        lost = self._is_lost()
        call = self._stub.Generate(
            request,
            timeout=self._timeout(timeout),
            wait_for_ready=lost or None,
            metadata=self._metadata,
        )
        wait = functools.partial(self._connected, timeout) if lost else None
        return AsyncTokenStream(call, request.request_id, wait)

    async def _call(
        self, method: Any, request: Any, timeout: float | None, request_id: str = ""
    ) -> Any:
        lost = self._is_lost()
        call = method(
            request,
            timeout=self._timeout(timeout),
            wait_for_ready=lost or None,
            metadata=self._metadata,
        )
        try:
            if lost:
                await self._connected(timeout)
            return await _typed(call, request_id)
        finally:
            call.cancel()

    def _is_lost(self) -> bool:
        """Whether a call would fail at once, in gRPC's pause between two attempts to connect."""
        return (
            self._config.reconnect_wait_s > 0
            and self._channel.get_state() == grpc.ChannelConnectivity.TRANSIENT_FAILURE
        )

    async def _connected(self, timeout: float | None) -> None:
        limit, wait = self._timeout(timeout), self._config.reconnect_wait_s
        try:
            async with asyncio.timeout(wait if limit is None else min(wait, limit)):
                await self._channel.channel_ready()
        except TimeoutError:
            # Where the deadline came first, the call ends by itself and says so.
            if limit is None or wait < limit:
                raise Unavailable(
                    f"no connection to {self._address} within {wait:g} s (reconnect_wait_s)"
                ) from None

    def _timeout(self, timeout: float | None) -> float | None:
        return self._config.default_timeout_s if timeout is None else timeout


async def _typed(response: Awaitable[T], request_id: str) -> T:
    try:
        return await response
    except grpc.RpcError as error:
        raise error_from_call(error, request_id=request_id) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # gRPC says it the same way when not the caller but the call was cancelled.
        raise Cancelled("the call was cancelled on this side", request_id=request_id) from None

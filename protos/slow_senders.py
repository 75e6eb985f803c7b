"""A client that sends its request a byte a second is cut off: gRPC would wait for ever.

gRPC calls a method when its one message is whole, and bounds how large that is but not how long it
takes; a call whose message never ends would hold its stream, and up to a window of memory, as long
as the client likes. So such methods are offered as methods of a stream of messages, which is the
same on the wire: they are called when a call's head is here, and wait for the message themselves.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc


class SlowSenders(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Interceptor of one server, next to its methods."""

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: longest from a call's head to the end of its message. Seconds."""
        self._limit_s = limit_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            method = self._waiting(handler.unary_stream)
            return grpc.stream_stream_rpc_method_handler(method, *serializers)
        return grpc.stream_unary_rpc_method_handler(
            self._waiting(handler.unary_unary), *serializers
        )

    def _waiting(self, inner: Any) -> Any:
        """The same method of a stream that should hold one message."""
        if inspect.isasyncgenfunction(inner):

            async def generating(requests: AsyncIterator[Any], context: Any) -> Any:
                answers = inner(await self._message(requests, context), context)
                async for answer in answers:
                    yield answer

            return generating

        async def awaiting(requests: AsyncIterator[Any], context: Any) -> Any:
            return await inner(await self._message(requests, context), context)

        return awaiting

    async def _message(self, requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            async with asyncio.timeout(self._limit_s):
                return await anext(aiter(requests))
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the request did not arrive within {self._limit_s:g} s of the call's beginning",
            )
        except StopAsyncIteration:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request"
            )

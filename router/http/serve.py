"""Serving one admitted request over HTTP: whole, or as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from protos.errors import BatonError, ErrorCode
from router.http.answer import Answer
from router.http.choices import Choices
from router.http.errors import dump, error_object, json_response
from router.http.sse import DONE, EventStream, event
from router.output import Delta

T = TypeVar("T")
Deltas = AsyncGenerator[tuple[int, Delta], None]


async def respond(
    request: Request, choices: Choices, answer: Answer, *, stream: bool, write_timeout_s: float
) -> Response:
    """Runs the choices to their end, or to the client's.

    Raises:
        BatonError: it failed before anything of the answer was sent.
    """
    try:
        deltas = choices.deltas()
        if not stream:
            async with aclosing(deltas):
                return json_response(await unless_gone(answer.collect(deltas), request))
        # Errors before the first token still get a status of their own.
        first = await unless_gone(_next(deltas), request)
    except BaseException:
        choices.close()
        raise
    return EventStream(
        _events(answer, first, deltas), write_timeout_s=write_timeout_s, on_end=choices.close
    )


async def _events(
    answer: Answer, first: tuple[int, Delta], deltas: Deltas
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            for data in answer.events(*first):
                yield data
            async for index, delta in deltas:
                for data in answer.events(index, delta):
                    yield data
        except BatonError as error:
            yield event(dump(error_object(error)))
            return
    yield DONE


async def unless_gone(work: Coroutine[Any, Any, T], request: Request) -> T:
    """Waits for `work`, and cancels it at once when the client leaves."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise BatonError(ErrorCode.ABORTED, "the client is gone")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(deltas: Deltas) -> tuple[int, Delta]:
    return await anext(deltas)

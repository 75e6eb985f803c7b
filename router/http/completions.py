"""POST /v1/completions: answers in OpenAI's shape, whole or as server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from protos.errors import BatonError, ErrorCode
from router.core import Router
from router.http.answer import Answer
from router.http.body import read_json
from router.http.errors import dump, error_object, json_response
from router.http.schema import parse
from router.http.sse import DONE, EventStream, event
from router.output import Delta

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def create_completion(router: Router, request: Request) -> Response:
    """Serves one request.

    Raises:
        BatonError, HttpDoorError: it failed before anything of the answer was sent.
    """
    config = router.config
    body = await read_json(
        request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s
    )
    completion = parse(body)
    admitted = await router.admit(completion.spec)
    journey = admitted.journey
    logger.debug(
        "request %s over HTTP, user %r",
        journey.request.request_id,
        completion.user,
        extra={"request_id": journey.request.request_id},
    )
    try:
        deltas = journey.deltas()
        answer = Answer(completion, admitted)
        if not completion.stream:
            return await _whole(answer, deltas, request)
        # Errors before the first token still get a status of their own.
        first = await _unless_gone(_next(deltas), request)
    except BaseException:
        journey.close()
        raise
    return EventStream(
        _events(answer, first, deltas),
        write_timeout_s=config.write_timeout_s,
        on_end=journey.close,
    )


async def _whole(answer: Answer, deltas: AsyncGenerator[Delta, None], request: Request) -> Response:
    async with aclosing(deltas):
        return json_response(await _unless_gone(answer.collect(deltas), request))


async def _events(
    answer: Answer, first: Delta, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            for chunk in answer.chunks(first):
                yield chunk
            async for delta in deltas:
                for chunk in answer.chunks(delta):
                    yield chunk
        except BatonError as error:
            yield event(dump(error_object(error)))
            return
    yield DONE


async def _unless_gone(work: Coroutine[Any, Any, T], request: Request) -> T:
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


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)

"""X-Request-Id: the client's own name of a request, honoured, logged and sent back.

It is no key: proxies repeat it when they try again, and pages send one with several requests. So a
second request of the same name runs beside the first, under the name with something appended.
"""

import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from observability import trace_context
from router.request import Arrival

HEADER = "x-request-id"
_TAKEN = re.compile(r"[!-~]{1,128}")
"""Printable, no blanks, bounded: anything else is not taken for a name."""


class RequestIds:
    """Middleware: every answer carries the id, errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = honoured(Request(scope).headers.get(HEADER, ""))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = state["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


def honoured(header: str) -> str:
    """The client's id, or a new one."""
    return header if _TAKEN.fullmatch(header) else uuid.uuid4().hex


def note_id(request: Request, request_id: str) -> None:
    """The answer carries this id: the one that the request runs under."""
    request.state.request_id = request_id


def arrival_of(request: Request, operation: str) -> Arrival:
    """What the door knows of a request whose body has just been read."""
    return Arrival(
        at=time.monotonic(),
        request_id=request.state.request_id,
        operation=operation,
        traceparent=trace_context.checked(request.headers.get(trace_context.HEADER, "")),
    )

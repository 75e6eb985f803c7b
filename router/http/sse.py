"""Server-sent events towards a client that may be slow, or gone."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Send

from router.stall import StallGuard

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events until they end, the client leaves, or one write blocks for too long.

    The generator is closed in each case, at once, since it holds a request on two workers; a
    response that never started to stream is closed too.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        write_timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events = events
        self._write_timeout_s = write_timeout_s
        self._on_end = on_end

    async def stream_response(self, send: Send) -> None:
        try:
            with StallGuard(self._write_timeout_s) as guard:
                async with aclosing(self._events):
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                    async for data in self._events:
                        guard.begin()
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                        guard.end()
                    await send({"type": "http.response.body", "body": b""})
        except TimeoutError as error:
            # Nothing more can be said to a reader that does not read: the server closes the
            # connection of a response that was left unfinished.
            logger.warning("a stream over HTTP ends: %s", error)
        finally:
            self._on_end()

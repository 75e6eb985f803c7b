"""GET /metrics of a worker, on a port of its own.

A hand-made server, and on purpose: what answers here must not be held up by whoever connects. Each
connection carries one request, has a few seconds in all, and there are so many at most; the HTTP
servers at hand leave a silent connection open for ever.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from observability.sheet import CONTENT_TYPE
from protos.door_watch import TlsDoorWatch
from protos.tls import ServerFiles

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 32
HEAD_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0

Render = Callable[[], Awaitable[bytes]]


class MetricsServer:
    """Serves what `render` makes; knows nothing of it."""

    def __init__(
        self,
        render: Render,
        *,
        tls: ServerFiles | None = None,
        watch: TlsDoorWatch | None = None,
        on_garbage: Callable[[], None] = lambda: None,
        head_timeout_s: float = HEAD_TIMEOUT_S,
    ) -> None:
        """`tls`: None: plain text; `watch`: counts the connections that TLS turned away;
        `on_garbage`: is told of each that said something which is no HTTP;
        `head_timeout_s`: longest a connection may take to ask, and before it, in the handshake."""
        self._render = render
        self._tls = tls
        self._watch = watch if watch is not None else TlsDoorWatch()
        self._on_garbage = on_garbage
        self._head_timeout_s = head_timeout_s
        self._open = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """The port; 0 picks a free one. Raises OSError where it cannot be listened on."""
        more: dict[str, Any] = {}
        if self._tls is not None:
            context = self._tls.context(on_connection=self._watch.on_connection)
            more = {"ssl": context, "ssl_handshake_timeout": self._head_timeout_s}
        self._server = await asyncio.start_server(
            self._serve, host or None, port, limit=MAX_HEAD_BYTES, **more
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > MAX_CONNECTIONS:
                return
            try:
                head = await self._head(reader)
            finally:
                # Whoever's handshake was good is not counted for it as well.
                self._watch.on_call(str(writer.get_extra_info("peername")))
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(await self._answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
            logger.debug("a connection to /metrics ended: %r", e)
        finally:
            self._open -= 1
            writer.transport.abort()

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._head_timeout_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self._on_garbage()
            raise
        except asyncio.LimitOverrunError:
            self._on_garbage()
            raise
        if not head.split(b"\r\n", 1)[0].rstrip().endswith((b" HTTP/1.1", b" HTTP/1.0")):
            self._on_garbage()
            raise ConnectionError("no HTTP")
        return head

    async def _answer(self, head: bytes) -> bytes:
        method, path = [*head.split(b"\r\n", 1)[0].split(b" "), b""][:2]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET is answered here\n")
        if path.split(b"?")[0] != b"/metrics":
            return _response(HTTPStatus.NOT_FOUND, b"there is only /metrics here\n")
        body = await self._render()
        return _response(HTTPStatus.OK, body, CONTENT_TYPE, head_only=method == b"HEAD")


def _response(
    status: HTTPStatus, body: bytes, content_type: str = "text/plain", *, head_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)

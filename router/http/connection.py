"""One HTTP connection, bounded in time and in number.

uvicorn bounds a kept-alive connection that is silent, and nothing else: a client that sends one
byte a second, that opens and says nothing, or that does not read the end of its answer, would keep
its connection for ever. Here every connection is in one of three states, and leaves each in time:

- *idle*: no request is being answered (none has come, its head is incomplete, or it was answered).
  Cut after `head_timeout_s`, however many bytes trickle in.
- *busy*: from the head's end to the answer's end. Bounded by the door: `body_timeout_s` for the
  body, `request_timeout_s` for the answer, `write_timeout_s` for each write of a stream.
- *closing*: what is left to send goes out. Cut after `write_timeout_s`.

The number of connections is bounded, too; where it is reached, the longest idle one makes room.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.http.errors import plain_error

logger = logging.getLogger(__name__)

LOOKS_PER_LIMIT = 4
"""How often a connection is looked at within its shortest limit."""

FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionBounds:
    """Limits of the HTTP door's connections."""

    head_timeout_s: float
    """Longest a connection may go without a complete head of a request. Seconds."""

    write_timeout_s: float
    """Longest a closing connection may take to send what is left. Seconds."""

    max_header_bytes: int
    """Longest head of a request, its request line included."""

    max_connections: int
    """Most open connections."""

    tls_handshake_s: float = 0.0
    """Longest a TLS handshake may take; 0: the door speaks plain text. Seconds."""

    on_refused: Callable[[str], None] = lambda reason: None
    """Told of connections that came to nothing: handshake, or garbage."""


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with the bounds above."""

    def __init__(self, *arguments: Any, bounds: ConnectionBounds, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._bounds = bounds
        self._idle_since = self.loop.time()
        self._closing_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if bounds.tls_handshake_s:
            # Nobody tells of a handshake that failed: the connection is just never made.
            self._timer = self.loop.call_later(bounds.tls_handshake_s, self._no_handshake)

    def _no_handshake(self) -> None:
        self._bounds.on_refused("handshake")

    @property
    def idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._timer is not None:
            self._timer.cancel()
        self._idle_since = self.loop.time()
        self._look_later()
        if len(self.connections) > self._bounds.max_connections:
            self._make_room()

    def _make_room(self) -> None:
        idle = [
            other
            for other in self.connections
            if isinstance(other, BoundedProtocol) and other is not self and other.idle
        ]
        if idle:
            oldest = min(idle, key=lambda other: other._idle_since)
            # It counts no more from now on, though its end comes with the loop's next turn.
            self.connections.discard(oldest)
            oldest.transport.abort()
        else:
            logger.warning(
                "%d HTTP connections are busy: one more is refused", len(self.connections)
            )
            self.transport.write(FULL)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP, or a head that is too long: an error object, then the end."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # amid an answer: nothing can be said any more
            return
        if len(self.conn.trailing_data[0]) > self._bounds.max_header_bytes:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            msg = f"the request's head exceeds {self._bounds.max_header_bytes} bytes"
        else:
            status = HTTPStatus.BAD_REQUEST
            self._bounds.on_refused("garbage")
        answer = plain_error(status, msg)
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _look_later(self) -> None:
        shortest = min(self._bounds.head_timeout_s, self._bounds.write_timeout_s)
        self._timer = self.loop.call_later(shortest / LOOKS_PER_LIMIT, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            late = now - self._closing_since >= self._bounds.write_timeout_s
        else:
            late = self.idle and now - self._idle_since >= self._bounds.head_timeout_s
        if late:
            self.transport.abort()
        else:
            self._look_later()

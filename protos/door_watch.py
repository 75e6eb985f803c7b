"""Counts connections that a TLS door of gRPC turned away: garbage, wrong certificates.

gRPC refuses them by itself, far below Python, and says why on standard error alone. What Python
sees is that a handshake begins and that a peer makes a call; a connection whose peer has made none
when the time for handshakes is over was refused, or wanted nothing (a port scan).
"""

import contextlib
import inspect
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

HANDSHAKE_TIMEOUT_S = 10.0
"""A connection has made its first call by then, or counts as refused."""

SAME_PEER_S = 60.0
"""A peer's address means the same connection while it calls this often: the system gives a port
that was used to no other connection for a minute."""

MOST_PEERS = 65_536
"""Peers and beginnings remembered; beyond them the oldest are forgotten."""


class DoorWatch(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Interceptor of one server, and the listener of its handshakes."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: deque[float] = deque(maxlen=MOST_PEERS)
        """Handshakes that no call has followed yet."""
        self._peers: OrderedDict[str, float] = OrderedDict()
        """Peers that called, and when last."""
        self._refused = 0

    def on_connection(self) -> None:
        """A handshake begins. Called on any thread."""
        self._begun.append(self._clock())

    @property
    def refused(self) -> int:
        """Connections that made no call, since the start."""
        limit = self._clock() - HANDSHAKE_TIMEOUT_S
        with contextlib.suppress(IndexError):
            while self._begun[0] < limit:
                self._begun.popleft()
                self._refused += 1
        return self._refused

    def on_call(self, peer: str) -> None:
        now = self._clock()
        last = self._peers.get(peer)
        if last is None or now - last > SAME_PEER_S:
            with contextlib.suppress(IndexError):
                self._begun.popleft()
        self._peers[peer] = now
        self._peers.move_to_end(peer)
        if len(self._peers) > MOST_PEERS:
            self._peers.popitem(last=False)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        asked = "stream" if handler.request_streaming else "unary"
        answered = "stream" if handler.response_streaming else "unary"
        name = f"{asked}_{answered}"
        return handler._replace(**{name: _telling(getattr(handler, name), self.on_call)})


def _telling(inner: Any, tell: Callable[[str], None]) -> Any:
    """The same method, which tells its caller's address first. gRPC looks at a method's kind."""
    if inspect.isasyncgenfunction(inner):

        async def generating(request: Any, context: Any) -> Any:
            tell(context.peer())
            async with contextlib.aclosing(inner(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return generating

    async def awaiting(request: Any, context: Any) -> Any:
        tell(context.peer())
        return await inner(request, context)

    return awaiting if inspect.iscoroutinefunction(inner) else inner

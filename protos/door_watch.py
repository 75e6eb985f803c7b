"""Counts connections of a gRPC door that came to nothing: garbage, wrong certificates.

gRPC refuses them by itself, far below Python, and says why on standard error alone. What Python
sees is that a peer makes a call. So a connection counts as refused that made none: at a TLS door,
by the time for handshakes after its own has begun; in plain text, where gRPC tells of no beginning,
when the kernel tells of its end. There, whoever connects and says nothing at all is let be: so do
probes of a port that ask no more than whether it is open.
"""

import contextlib
import inspect
import logging
import re
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from protos.ended_connections import EndedConnections

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
"""A connection has made its first call by then, or counts as refused."""

SAME_PEER_S = 60.0
"""A peer's address means the same connection while it calls this often: the system gives a port
that was used to no other connection for a minute."""

MOST_PEERS = 65_536
"""Peers and beginnings remembered; beyond them the oldest are forgotten."""

_SCOPE = re.compile(r"%25.*?(?=%5D)")
"""Of a link-local address, `fe80::1%eth0` in gRPC's spelling: the kernel's word has none."""

SAID_NOTHING_BYTES = 1
"""What the kernel counts of a peer that sends nothing and hangs up."""


class DoorWatch(grpc.aio.ServerInterceptor, ABC):  # type: ignore[type-arg]
    """Interceptor of one server."""

    reason: str
    """Why its connections were refused, as metrics say it."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refused = 0

    def begin(self, port: int) -> bool:
        """Called in the server's loop, once the door has its port. False: nothing can be counted
        here."""
        return True

    def close(self) -> None:
        """Called when the server has stopped. Safe to call twice."""

    @property
    @abstractmethod
    def refused(self) -> int:
        """Connections that made no call, since the start."""

    @abstractmethod
    def on_call(self, peer: str) -> None:
        """`peer`: as gRPC names it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            # As gRPC answers it; but a call it is.
            handler = grpc.stream_stream_rpc_method_handler(_unknown)
        asked = "stream" if handler.request_streaming else "unary"
        answered = "stream" if handler.response_streaming else "unary"
        name = f"{asked}_{answered}"
        return handler._replace(**{name: _telling(getattr(handler, name), self.on_call)})


class TlsDoorWatch(DoorWatch):
    """Hears of each handshake's beginning."""

    reason = "handshake"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock)
        self._begun: deque[float] = deque(maxlen=MOST_PEERS)
        """Handshakes that no call has followed yet."""
        self._peers: OrderedDict[str, float] = OrderedDict()
        """Peers that called, and when last."""

    def on_connection(self) -> None:
        """A handshake begins. Called on any thread."""
        self._begun.append(self._clock())

    @property
    def refused(self) -> int:
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


class PlainDoorWatch(DoorWatch):
    """Hears from the kernel of each connection's end."""

    reason = "no_call"

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock)
        self._called: OrderedDict[str, None] = OrderedDict()
        """Peers that made a call, until their connection ends."""
        self._ended: deque[tuple[float, str]] = deque(maxlen=MOST_PEERS)
        """Connections that ended without one. It may have overtaken their call on its way here."""
        self._kernel: EndedConnections | None = None

    def begin(self, port: int) -> bool:
        try:
            self._kernel = EndedConnections(port, self.on_end)
        except OSError as error:
            logger.info("connections that port %d refuses are not counted: %s", port, error)
        return self._kernel is not None

    def close(self) -> None:
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.close()

    def on_call(self, peer: str) -> None:
        self._called[_SCOPE.sub("", peer)] = None
        if len(self._called) > MOST_PEERS:
            self._called.popitem(last=False)

    def on_end(self, peer: str, received_bytes: int) -> None:
        """A connection has ended, after so much from its peer."""
        if self._forget(peer) or received_bytes <= SAID_NOTHING_BYTES:
            return
        self._ended.append((self._clock(), peer))

    @property
    def refused(self) -> int:
        limit = self._clock() - HANDSHAKE_TIMEOUT_S
        while self._ended and self._ended[0][0] < limit:
            _, peer = self._ended.popleft()
            self._refused += not self._forget(peer)
        return self._refused

    def _forget(self, peer: str) -> bool:
        """Whether it had called."""
        known = peer in self._called
        self._called.pop(peer, None)
        return known


async def _unknown(requests: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


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

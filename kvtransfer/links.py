"""Which transport joins this worker with which peer."""

from collections import Counter
from collections.abc import Callable

from kvtransfer.errors import TransportError, UnknownPeerError
from kvtransfer.geometry import WriterPages
from kvtransfer.transport import Transport
from protos.baton.v1 import kv_pb2

Clock = Callable[[], float]
"""Monotonic seconds."""


class PeerLinks:
    """Peers attached at the moment. Changed by the transfer thread alone; reads from other
    threads see a consistent entry."""

    def __init__(self) -> None:
        self._transports: dict[str, Transport] = {}
        self._pages: dict[str, WriterPages] = {}
        self.connect_s: dict[str, float] = {}
        """How long each peer's transport took to connect. Seconds."""
        self.dropped: Counter[str] = Counter()
        """Messages that were late, repeated, malformed or not allowed, by cause."""

    def attach(self, peer: str, transport: Transport, pages: WriterPages | None = None) -> None:
        """`pages`: how those that the peer writes lie in the window here; None: it writes none."""
        if pages is not None:
            self._pages[peer] = pages
        self._transports[peer] = transport

    def detach(self, peer: str) -> Transport | None:
        """The transport that joined the peer, or None."""
        transport = self._transports.pop(peer, None)
        self._pages.pop(peer, None)
        self.connect_s.pop(peer, None)
        return transport

    def get(self, peer: str) -> Transport | None:
        return self._transports.get(peer)

    def require(self, peer: str) -> Transport:
        """Raises UnknownPeerError where the peer is not attached."""
        transport = self._transports.get(peer)
        if transport is None:
            raise UnknownPeerError(
                f"instance {peer} is not connected for KV transfer; it may have restarted"
            )
        return transport

    def pages_of(self, peer: str) -> WriterPages:
        """Raises UnknownPeerError where the peer is not attached, or does not write here."""
        self.require(peer)
        pages = self._pages.get(peer)
        if pages is None:
            raise UnknownPeerError(f"instance {peer} does not write to this worker")
        return pages

    def peers(self) -> list[str]:
        return list(self._transports)

    @property
    def any_polled(self) -> bool:
        """Whether some peer's messages appear only by polling."""
        return any(transport.polled for transport in self._transports.values())

    def send(self, peer: str, message: kv_pb2.KvMessage) -> bool:
        """Sends if the peer is reachable. A failure is not an error here: the loss of the peer, or
        the lease, ends what depends on the message."""
        transport = self._transports.get(peer)
        if transport is None:
            return False
        try:
            transport.send(peer, message.SerializeToString())
        except TransportError:
            return False
        return True

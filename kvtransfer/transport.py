"""The interface that every transport fulfils: write pages into a peer's slots, carry messages.

A transport knows nothing of requests, tickets or states; it moves bytes and says what became of
them. Exactly one thread drives it (the transfer thread), so no method blocks for long; only
`bind`ed wake-ups may come from elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType

import torch

from kvtransfer.errors import TransportError

WriteId = NewType("WriteId", int)
"""Unique within one transport's life."""


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """A peer's message; if it came with a write, all bytes of that write are in place."""

    peer: str
    message: bytes


@dataclass(frozen=True, slots=True)
class WriteDone:
    """All bytes are in place at the peer, and the source pages are no longer read."""

    write_id: WriteId


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """The write ended without success; the source pages are no longer read, but some bytes may
    have landed."""

    write_id: WriteId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The transport cannot reach the peer any more. Writes to it still end one by one."""

    peer: str
    reason: str


TransportEvent = MessageArrived | WriteDone | WriteFailed | PeerLost


class Transport(ABC):
    """One way to move pages."""

    name: str
    """As in configuration, offers and answers: nixl, grpc, ..."""

    polled: bool
    """Whether events appear only by polling; False: `wake` is called when there is one."""

    loss_ends_writes: bool
    """Whether a lost session proves that nothing of the peer can land any more."""

    writes_polled: bool = False
    """Whether the end of a write appears only by polling, though messages wake."""

    any_thread: bool = False
    """Whether `write` and `send` may be called by any thread, one at a time."""

    writes_parts: bool = False
    """Whether `write` takes a part of each page, so that finished layers may leave early."""

    writes_behind: bool = False
    """Whether it has `write_behind`, so that pages may leave while they are computed."""

    landing: torch.Tensor | None = None
    """Memory that peers' writes land in, [slots, page_bytes] uint8; None on a side that exposes
    none. Further windows (`open_landing`) are not part of it."""

    @abstractmethod
    def bind(self, wake: Callable[[], None]) -> None:
        """Called once, by the agent, before anything else: `wake()` makes the transfer thread
        poll; it may be called from any thread."""

    @abstractmethod
    def local_offer(self) -> bytes:
        """What a peer needs in order to `connect` here; the front sends it at registration."""

    @abstractmethod
    def connect(self, peer: str, offer: bytes) -> None:
        """Called when a peer's front has chosen this transport, before any message to or from it.

        Makes the connection now, so that no handshake is on a request's path. Raises
        TransportError where the offer does not fit.
        """

    @abstractmethod
    def disconnect(self, peer: str) -> None:
        """Called when the peer is gone. Its unfinished writes still end as WriteDone or
        WriteFailed; until then their source pages are read. Unknown peers are ignored."""

    @abstractmethod
    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        """Starts copying (source page -> landing slot at the peer), then delivers `message`.
        `part`: bytes `first .. end - 1` of each page alone, to the same place of its slot, where
        the transport `writes_parts`. Writes may land in any order.

        Called only for slots that the peer has granted. Raises TransportError where it cannot
        start; nothing has been read then.
        """

    def write_behind(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        *,
        part: tuple[int, int],
        passed: torch.cuda.Event | None,
    ) -> WriteId:
        """As `write`, of that part and without a message, but begun by the device itself when it
        has passed the event (None: at once): the host has no part in it. Such writes begin in the
        order of their calls, and none waits for `write`'s."""
        raise TransportError(f"transport {self.name} cannot queue writes behind a step")

    @abstractmethod
    def send(self, peer: str, message: bytes) -> None:
        """Delivers a message without bytes. Raises TransportError where the peer is unreachable
        at once; a later loss appears as PeerLost."""

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        """Exposes further memory, [slots, page_bytes] uint8, as slots `first_slot ..`: what peers
        need for `connect_landing`; empty where they need nothing. What was exposed before stays,
        and so may writes to it. Raises TransportError where that cannot be."""
        raise TransportError(f"transport {self.name} has one landing window for life")

    def connect_landing(self, peer: str, first_slot: int, offer: bytes) -> None:
        """The peer has opened a further window: its slots may be written from now on, beside those
        known before. May be repeated. Raises TransportError where the offer does not fit."""
        raise TransportError(f"transport {self.name} has one landing window for life")

    def landing_of(self, first_slot: int) -> torch.Tensor | None:
        """Memory that the window which begins at `first_slot` lands in by this transport; None:
        the memory that `open_landing` was given."""
        return None if first_slot else self.landing

    @abstractmethod
    def poll(self) -> list[TransportEvent]:
        """Makes progress; what happened since the last call, in order for each peer."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether writes are under way."""

    def handles(self) -> int:
        """What it has open at its library: as many at rest as after its peers were connected."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Called once, at the end. Memory under unfinished writes must outlive the process's
        other uses of it; a transport that cannot stop them keeps it alive itself."""


class RankTransport(Transport):
    """One rank's: what it writes may be a piece of a page, behind other ranks' in the same slot."""

    @property
    @abstractmethod
    def sends(self) -> bool:
        """Whether it has pages to write."""

    @abstractmethod
    def connect(self, peer: str, offer: bytes, *, offset: int = 0) -> None:
        """As `Transport.connect`; pages from here begin `offset` bytes into their slots."""

    @abstractmethod
    def connect_landing(self, peer: str, first_slot: int, offer: bytes, *, offset: int = 0) -> None:
        """As `Transport.connect_landing`, likewise."""

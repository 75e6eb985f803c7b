"""Writes from rank to rank: the same pages leave every rank of the sender, for every rank of the
receiver that wants some of their heads.

To sender and receiver this is one transport. Its messages go between the two leading ranks; a
write's own message follows when the writes of all ranks have ended, so what it announces is there.
The following ranks' halves are `RankWriter`s, wherever they run. Each rank of a receiver has a
landing window, with as many slots, numbered alike: a slot is granted, kept and given back on all of
them at once, and where a window is replaced, those of all ranks are.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from kvtransfer.errors import TransportError
from kvtransfer.geometry import pieces_for, rank_heads
from kvtransfer.transport import (
    PeerLost,
    RankTransport,
    Transport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)

_MANY = b"ranks:"


class Target(NamedTuple):
    """A window that a rank here writes its piece of a page into."""

    peer: str
    """Its name here."""
    offer: bytes
    offset: int
    """Where the piece begins in a slot. Bytes."""


class RankWriter(Protocol):
    """A following rank, as the leading one sees it."""

    def offer(self) -> bytes:
        """What peers need to write into its window; empty where it has none."""
        ...

    def connect(self, targets: Sequence[Target]) -> None:
        """Raises TransportError where one of them cannot be reached."""
        ...

    def disconnect(self, peers: Sequence[str]) -> None: ...

    def open_landing(self, first_slot: int) -> bytes:
        """As `Transport.open_landing`, of memory of its own. Raises TransportError."""
        ...

    def connect_landing(self, first_slot: int, targets: Sequence[Target]) -> None:
        """As `Transport.connect_landing`. Raises TransportError."""
        ...

    def write(
        self,
        number: int,
        peers: Sequence[str],
        copies: Sequence[tuple[int, int]],
        part: tuple[int, int] | None,
    ) -> None:
        """Starts a write to each of `peers`; `ended` tells when the last of them is over."""
        ...

    def ended(self) -> list[tuple[int, str]]:
        """(number, why it failed or nothing) of writes that are over; never waits."""
        ...

    def lost(self) -> list[tuple[str, str]]:
        """(peer's rank, why) of those that it cannot reach any more; never waits."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Whose window it is, and where in its slots a rank's piece begins."""

    name: str
    index: int
    """The peer's rank."""
    offset: int

    def target(self, offers: Sequence[bytes]) -> Target:
        """Raises TransportError where the peer offers fewer windows than it had."""
        if self.index >= len(offers):
            raise TransportError(f"no window of {self.name} among {len(offers)}")
        return Target(self.name, offers[self.index], self.offset)


@dataclass(slots=True)
class _Write:
    peer: str
    message: bytes
    """Sent when all is over; empty where it went along with the only write."""
    waiting: set[tuple[int, int]] = field(default_factory=set)
    """(rank, number there) of what has not ended."""
    failure: str = ""


class GroupTransport(Transport):
    """The leading rank's transport, and the others'."""

    def __init__(
        self,
        local: RankTransport,
        followers: Sequence[RankWriter] = (),
        *,
        kv_heads: int,
        piece_bytes: int,
    ) -> None:
        """`kv_heads`: of the whole model; `piece_bytes`: one rank's part of a page."""
        self.name = local.name
        self.polled = local.polled
        self.loss_ends_writes = local.loss_ends_writes
        self.writes_polled = local.writes_polled
        self.writes_parts = local.writes_parts
        # Before a write the other ranks are asked for its seals: not by the scheduler's thread.
        self.any_thread = local.any_thread and not followers
        # An event of this rank's device cannot start a copy of another's.
        self.writes_behind = local.writes_behind and not followers
        self._local = local
        self._followers = followers
        self._kv_heads = kv_heads
        self._piece_bytes = piece_bytes
        self._places: dict[str, list[list[_Place]]] = {}
        """Peer -> for each rank here, the windows that it writes."""
        self._writes: dict[WriteId, _Write] = {}
        self._owners: dict[tuple[int, int], WriteId] = {}
        self._events: list[TransportEvent] = []
        self._next_write = 1

    @property
    def landing(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._local.landing

    def bind(self, wake: Callable[[], None]) -> None:
        self._local.bind(wake)

    # ---- peers and windows ----------------------------------------------------------------------

    def local_offer(self) -> bytes:
        return _packed([self._local.local_offer(), *(rank.offer() for rank in self._followers)])

    def connect(self, peer: str, offer: bytes) -> None:
        offers = _unpacked(peer, offer)
        places = [
            self._places_of(peer, len(offers), rank) for rank in range(1 + len(self._followers))
        ]
        self._places[peer] = places
        try:
            for place in places[0] or [_Place(peer, 0, 0)]:
                name, window, offset = place.target(offers)
                self._local.connect(name, window, offset=offset)
            for follower, theirs in zip(self._followers, places[1:], strict=True):
                if theirs:
                    follower.connect([place.target(offers) for place in theirs])
        except TransportError:
            self.disconnect(peer)
            raise

    def _places_of(self, peer: str, windows: int, rank: int) -> list[_Place]:
        """The windows in which the heads of `rank` are wanted. Of several windows each is for the
        heads of one rank of the peer."""
        if not self._local.sends:
            return []
        ranks, heads = 1 + len(self._followers), self._kv_heads
        found = []
        for index in range(windows):
            wanted = rank_heads(heads, rank=index, tp_size=windows)
            for piece in pieces_for(wanted, heads, ranks, piece_bytes=self._piece_bytes):
                if piece.rank == rank:
                    name = f"{peer}/{index}" if index else peer
                    found.append(_Place(name, index, piece.offset))
        return found

    def disconnect(self, peer: str) -> None:
        places = self._places.pop(peer, [])
        for name in {peer, *(place.name for place in (places[0] if places else ()))}:
            self._local.disconnect(name)
        for follower, theirs in zip(self._followers, places[1:], strict=False):
            if theirs:
                follower.disconnect([place.name for place in theirs])

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        offers = [self._local.open_landing(first_slot, memory)]
        return _packed(offers + [rank.open_landing(first_slot) for rank in self._followers])

    def connect_landing(self, peer: str, first_slot: int, offer: bytes) -> None:
        places = self._places.get(peer)
        if places is None:
            raise TransportError(f"{self.name} is not connected to peer {peer}")
        offers = _unpacked(peer, offer)
        for place in places[0]:
            name, window, offset = place.target(offers)
            self._local.connect_landing(name, first_slot, window, offset=offset)
        for follower, theirs in zip(self._followers, places[1:], strict=True):
            if theirs:
                follower.connect_landing(first_slot, [place.target(offers) for place in theirs])

    # ---- writes and messages --------------------------------------------------------------------

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        places = self._places_to(peer)
        alone = sum(map(len, places)) == 1 and bool(places[0])
        return self._begin(
            _Write(peer, b"" if alone else message),
            places,
            lambda name: self._local.write(name, copies, message if alone else b"", part=part),
            lambda follower, number, names: follower.write(number, names, copies, part),
        )

    def write_behind(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        *,
        part: tuple[int, int],
        passed: torch.cuda.Event | None,
    ) -> WriteId:
        if self._followers:
            raise TransportError("writes of several ranks are not queued behind a step")
        return self._begin(
            _Write(peer, b""),
            self._places_to(peer),
            lambda name: self._local.write_behind(name, copies, part=part, passed=passed),
        )

    def _places_to(self, peer: str) -> list[list[_Place]]:
        places = self._places.get(peer)
        if places is None:
            raise TransportError(f"{self.name} is not connected to peer {peer}")
        return places

    def _begin(
        self,
        write: _Write,
        places: list[list[_Place]],
        here: Callable[[str], WriteId],
        there: Callable[[RankWriter, int, list[str]], None] | None = None,
    ) -> WriteId:
        """Has every rank begin. Raises TransportError where none has; what begins in parts only
        fails when those have ended."""
        write_id = WriteId(self._next_write)
        for place in places[0]:
            try:
                number = here(place.name)
            except TransportError as error:
                if not write.waiting:
                    raise
                write.failure = error.message
                break
            self._wait_for(write_id, write, (0, number))
        self._next_write += 1
        self._writes[write_id] = write
        if there is not None and not write.failure:
            for rank, (follower, theirs) in enumerate(
                zip(self._followers, places[1:], strict=True), start=1
            ):
                if theirs:
                    there(follower, write_id, [place.name for place in theirs])
                    self._wait_for(write_id, write, (rank, write_id))
        return write_id

    def _wait_for(self, write_id: WriteId, write: _Write, which: tuple[int, int]) -> None:
        write.waiting.add(which)
        self._owners[which] = write_id

    def send(self, peer: str, message: bytes) -> None:
        self._local.send(peer, message)

    def poll(self) -> list[TransportEvent]:
        for event in self._local.poll():
            match event:
                case WriteDone(write_id):
                    self._end((0, write_id), "")
                case WriteFailed(write_id, reason):
                    self._end((0, write_id), reason)
                case PeerLost(peer, reason):
                    self._events.append(PeerLost(peer.partition("/")[0], reason))
                case _:
                    self._events.append(event)
        for rank, follower in enumerate(self._followers, start=1):
            for number, reason in follower.ended():
                self._end((rank, number), reason)
            for peer, reason in follower.lost():
                self._events.append(PeerLost(peer.partition("/")[0], reason))
        events, self._events = self._events, []
        return events

    def _end(self, which: tuple[int, int], failure: str) -> None:
        write_id = self._owners.pop(which, None)
        if write_id is None:
            return
        write = self._writes[write_id]
        write.waiting.discard(which)
        write.failure = write.failure or failure
        if write.waiting:
            return
        del self._writes[write_id]
        if write.message and not write.failure:
            try:
                self._local.send(write.peer, write.message)
            except TransportError as error:
                write.failure = error.message
        if write.failure:
            self._events.append(WriteFailed(write_id, write.failure))
        else:
            self._events.append(WriteDone(write_id))

    def busy(self) -> bool:
        return self._local.busy() or any(rank for rank, _ in self._owners)

    def handles(self) -> int:
        return self._local.handles()

    def close(self) -> None:
        self._local.close()


def _packed(offers: Sequence[bytes]) -> bytes:
    """The leading rank's alone where the others have none."""
    if not all(offers) or len(offers) == 1:
        return offers[0]
    return _MANY + json.dumps([base64.b64encode(offer).decode() for offer in offers]).encode()


def _unpacked(peer: str, offer: bytes) -> list[bytes]:
    if not offer.startswith(_MANY):
        return [offer]
    try:
        return [base64.b64decode(each) for each in json.loads(offer[len(_MANY) :])]
    except (ValueError, TypeError) as error:
        raise TransportError(f"the offer of peer {peer} cannot be read: {error}") from error

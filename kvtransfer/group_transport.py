"""Writes from rank to rank: the same pages leave every rank of the sender, for every rank of the
receiver that wants some of their heads.

To sender and receiver this is one transport. Its messages go between the two leading ranks; a
write's own message follows when the writes of all ranks have ended, so what it announces is there.
The following ranks' halves are `RankWriter`s, wherever they run.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from kvtransfer.errors import TransportError
from kvtransfer.geometry import pieces_for, rank_heads
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import (
    PeerLost,
    Transport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)

_MANY = b"ranks:"

Targets = Sequence[tuple[str, bytes, int]]
"""(peer's name here, offer of one of its windows, where this rank's piece begins in a slot)."""


class RankWriter(Protocol):
    """A following rank, as the leading one sees it."""

    def offer(self) -> bytes:
        """What peers need to write into its window; empty where it has none."""
        ...

    def connect(self, targets: Targets) -> None:
        """Raises TransportError where one of them cannot be reached."""
        ...

    def disconnect(self, peers: Sequence[str]) -> None: ...

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


@dataclass(slots=True)
class _Write:
    peer: str
    message: bytes
    """Sent when all is over; empty where it went along with the only write."""
    waiting: set[tuple[int, int]] = field(default_factory=set)
    """(rank, number there) of what has not ended."""
    failure: str = ""


class GroupTransport(Transport):
    """The leading rank's NIXL transport, and the others'."""

    name: ClassVar[str] = "nixl"
    polled: ClassVar[bool] = True
    loss_ends_writes: ClassVar[bool] = False
    writes_parts: ClassVar[bool] = True

    def __init__(
        self,
        local: NixlTransport,
        followers: Sequence[RankWriter] = (),
        *,
        kv_heads: int,
        piece_bytes: int,
    ) -> None:
        """`kv_heads`: of the whole model; `piece_bytes`: one rank's part of a page."""
        self._local = local
        self._followers = followers
        self._kv_heads = kv_heads
        self._piece_bytes = piece_bytes
        self._targets: dict[str, list[list[str]]] = {}
        """Peer -> for each rank here, the names of the windows that it writes."""
        self._writes: dict[WriteId, _Write] = {}
        self._owners: dict[tuple[int, int], WriteId] = {}
        self._events: list[TransportEvent] = []
        self._next_write = 1

    @property
    def landing(self) -> torch.Tensor | None:  # type: ignore[override]
        return self._local.landing

    def bind(self, wake: Callable[[], None]) -> None:
        self._local.bind(wake)

    def local_offer(self) -> bytes:
        offers = [self._local.local_offer(), *(rank.offer() for rank in self._followers)]
        if not all(offers) or len(offers) == 1:
            return offers[0]
        return _MANY + json.dumps([base64.b64encode(offer).decode() for offer in offers]).encode()

    def connect(self, peer: str, offer: bytes) -> None:
        offers = _windows_of(peer, offer)
        targets = [self._targets_of(peer, offers, rank) for rank in range(1 + len(self._followers))]
        try:
            for name, window, offset in targets[0] or [(peer, offers[0], 0)]:
                self._local.connect(name, window, offset=offset)
            for follower, theirs in zip(self._followers, targets[1:], strict=True):
                if theirs:
                    follower.connect(theirs)
        except TransportError:
            self._targets[peer] = [[name for name, _, _ in some] for some in targets]
            self.disconnect(peer)
            raise
        self._targets[peer] = [[name for name, _, _ in some] for some in targets]

    def _targets_of(
        self, peer: str, offers: list[bytes], rank: int
    ) -> list[tuple[str, bytes, int]]:
        """The windows in which the heads of `rank` are wanted. Of several windows each is for the
        heads of one rank of the peer."""
        if not self._local.sends:
            return []
        ranks, heads = 1 + len(self._followers), self._kv_heads
        found = []
        for index, offer in enumerate(offers):
            wanted = rank_heads(heads, rank=index, tp_size=len(offers))
            for piece in pieces_for(wanted, heads, ranks, piece_bytes=self._piece_bytes):
                if piece.rank == rank:
                    name = f"{peer}/{index}" if index else peer
                    found.append((name, offer, piece.offset))
        return found

    def disconnect(self, peer: str) -> None:
        targets = self._targets.pop(peer, [])
        for name in {peer, *(targets[0] if targets else ())}:
            self._local.disconnect(name)
        for follower, names in zip(self._followers, targets[1:], strict=False):
            if names:
                follower.disconnect(names)

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        if self._followers:
            raise TransportError("the ranks' landing windows are not replaced")
        return self._local.open_landing(first_slot, memory)

    def connect_landing(self, peer: str, first_slot: int, offer: bytes) -> None:
        if self._followers or len(self._targets.get(peer, [[]])[0]) > 1:
            raise TransportError("the ranks' landing windows are not replaced")
        self._local.connect_landing(peer, first_slot, offer)

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        targets = self._targets.get(peer)
        if targets is None:
            raise TransportError(f"NIXL is not connected to peer {peer}")
        write_id = WriteId(self._next_write)
        alone = sum(map(len, targets)) == 1 and bool(targets[0])
        write = _Write(peer, b"" if alone else message)
        for name in targets[0]:
            try:
                number = self._local.write(name, copies, message if alone else b"", part=part)
            except TransportError as error:
                if not write.waiting:
                    raise
                write.failure = error.message
                break
            self._wait_for(write_id, write, (0, number))
        self._next_write += 1
        self._writes[write_id] = write
        if not write.failure:
            for rank, (follower, names) in enumerate(
                zip(self._followers, targets[1:], strict=True), start=1
            ):
                if names:
                    follower.write(write_id, names, copies, part)
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
        return bool(self._writes)

    def close(self) -> None:
        self._local.close()


def _windows_of(peer: str, offer: bytes) -> list[bytes]:
    if not offer.startswith(_MANY):
        return [offer]
    try:
        return [base64.b64decode(each) for each in json.loads(offer[len(_MANY) :])]
    except (ValueError, TypeError) as error:
        raise TransportError(f"the offer of peer {peer} cannot be read: {error}") from error

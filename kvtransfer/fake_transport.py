"""A transport with scripted faults, for tests: an in-memory pair that is deterministic by seed.

Time is counted in polls: every `poll` of a side delivers what is due for it. Bytes are read from
the source when they are delivered, as a real remote write may do, so that a source page which is
reused too early shows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from kvtransfer.errors import TransportError
from kvtransfer.transport import (
    MessageArrived,
    PeerLost,
    Transport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)


class FaultKind(Enum):
    """What happens to one delivery (a write with its message, or a message alone)."""

    DROP = auto()
    """Neither bytes nor message arrive; a write is reported as done all the same."""
    STALL = auto()
    """Never arrives, and a write is never reported, until the peer is lost."""
    DUPLICATE = auto()
    """Bytes and message arrive twice, the second time later."""
    REORDER = auto()
    """Arrives after the delivery that follows it."""
    DELAY = auto()
    """Arrives `Fault.polls` polls later."""
    CORRUPT = auto()
    """One bit of the landed bytes is flipped."""
    TRUNCATE = auto()
    """Only the first half of each page's bytes arrives."""
    FAIL = auto()
    """The write is reported as failed after half of its bytes have landed."""
    LOSE_PEER = auto()
    """Both sides lose each other at this delivery; nothing under way arrives."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Strikes the `nth` delivery (from 0) that `sender` starts."""

    kind: FaultKind
    sender: str
    nth: int
    polls: int = 5


@dataclass(slots=True, eq=False)
class _Delivery:
    origin: "FakeTransport"
    target: str
    copies: Sequence[tuple[int, int]]
    part: tuple[int, int] | None
    message: bytes
    write_id: WriteId | None
    passed: torch.cuda.Event | None
    due: int
    fault: FaultKind | None = None

    @property
    def has_begun(self) -> bool:
        return self.passed is None or bool(self.passed.query())  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class FakeNetwork:
    """Joins `FakeTransport`s by their instance ids."""

    seed: int = 0
    faults: Sequence[Fault] = ()
    members: dict[str, "FakeTransport"] = field(default_factory=dict)
    started: dict[str, int] = field(default_factory=dict)
    struck: list[tuple[Fault, bytes]] = field(default_factory=list)
    """Faults that found their delivery, and its message."""

    def fault_for(self, sender: str, message: bytes) -> Fault | None:
        nth = self.started.get(sender, 0)
        self.started[sender] = nth + 1
        for fault in self.faults:
            if fault.sender == sender and fault.nth == nth:
                self.struck.append((fault, message))
                return fault
        return None


class FakeTransport(Transport):
    """One side of the pair."""

    name = "fake"
    polled = True
    loss_ends_writes = False
    writes_parts = True

    def __init__(
        self,
        *,
        instance_id: str,
        network: FakeNetwork,
        pool: torch.Tensor | None,
        landing: torch.Tensor | None,
        writes_behind: bool = True,
    ) -> None:
        """`pool`: source pages; `landing`: what peers may write; [count, page_bytes] uint8."""
        self.writes_behind = writes_behind
        self.instance_id = instance_id
        self.landing = landing
        self._network = network
        self._pool = pool
        self._peers: set[str] = set()
        self._inbox: list[_Delivery] = []
        self._events: list[TransportEvent] = []
        self._in_flight: dict[WriteId, str] = {}
        self._next_write = 1
        self._opened: dict[int, torch.Tensor] = {}
        self._reaches: set[tuple[str, int]] = set()
        """(peer, first slot) of further windows that peers have told of."""
        self._polls = 0
        self._random = random.Random(f"{network.seed}/{instance_id}")
        network.members[instance_id] = self

    def bind(self, wake: Callable[[], None]) -> None:
        """Nothing to wake for: events appear by polling."""

    def local_offer(self) -> bytes:
        return self.instance_id.encode()

    def connect(self, peer: str, offer: bytes) -> None:
        if offer.decode() != peer or peer not in self._network.members:
            raise TransportError(f"no fake peer {peer}")
        self._peers.add(peer)

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        self._opened[first_slot] = memory
        return str(first_slot).encode()

    def connect_landing(self, peer: str, first_slot: int, offer: bytes) -> None:
        if offer.decode() != str(first_slot):
            raise TransportError(f"no such window of {peer}")
        self._reaches.add((peer, first_slot))

    def _place(self, writer: "FakeTransport", slot: int, size: int) -> torch.Tensor:
        """The `size` bytes from that slot on: a page that is larger than a slot reaches into the
        slots behind it. A writer that was not told of a window cannot reach it."""
        windows = {} if self.landing is None else {0: self.landing}
        for first, memory in (windows | self._opened).items():
            known = first == 0 or (self.instance_id, first) in writer._reaches
            if known and first <= slot < first + memory.shape[0]:
                start = (slot - first) * int(memory.shape[1])
                return memory.view(-1)[start : start + size]
        raise TransportError(f"{writer.instance_id} cannot reach slot {slot}")

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        write_id = WriteId(self._next_write)
        self._start(peer, tuple(copies), message, write_id, part)
        self._next_write += 1
        self._in_flight[write_id] = peer
        return write_id

    def write_behind(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        *,
        part: tuple[int, int],
        passed: torch.cuda.Event | None,
    ) -> WriteId:
        write_id = WriteId(self._next_write)
        self._start(peer, tuple(copies), b"", write_id, part, passed)
        self._next_write += 1
        self._in_flight[write_id] = peer
        return write_id

    def send(self, peer: str, message: bytes) -> None:
        self._start(peer, (), message, None)

    def _start(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        write_id: WriteId | None,
        part: tuple[int, int] | None = None,
        passed: torch.cuda.Event | None = None,
    ) -> None:
        if peer not in self._peers:
            raise TransportError(f"peer {peer} is not connected")
        target = self._network.members[peer]
        due = target._polls + 1
        delivery = _Delivery(self, peer, copies, part, message, write_id, passed, due)
        fault = self._network.fault_for(self.instance_id, message)
        if fault is not None:
            delivery.fault = fault.kind
        if delivery.fault is FaultKind.LOSE_PEER:
            self._lose(target)
        elif delivery.fault is FaultKind.DELAY and fault is not None:
            delivery.due += fault.polls
        elif delivery.fault is FaultKind.REORDER:
            delivery.due += 2
        target._inbox.append(delivery)

    def _lose(self, other: "FakeTransport") -> None:
        for here, there in ((self, other), (other, self)):
            here._peers.discard(there.instance_id)
            here._events.append(PeerLost(there.instance_id, "scripted loss"))

    def poll(self) -> list[TransportEvent]:
        self._polls += 1
        due = [d for d in self._inbox if d.due <= self._polls and d.has_begun]
        self._inbox = [d for d in self._inbox if d not in due]
        for delivery in due:
            self._deliver(delivery)
        events, self._events = self._events, []
        return events

    def _deliver(self, delivery: _Delivery) -> None:
        if delivery.origin.instance_id not in self._peers or delivery.fault is FaultKind.LOSE_PEER:
            delivery.origin._end(delivery.write_id, "peer lost")
            return
        match delivery.fault:
            case FaultKind.STALL:
                self._inbox.append(delivery)
                delivery.due = self._polls + 1
                return
            case FaultKind.DROP:
                delivery.origin._end(delivery.write_id, None)
                return
            case FaultKind.DUPLICATE:
                again = _Delivery(
                    delivery.origin,
                    delivery.target,
                    delivery.copies,
                    delivery.part,
                    delivery.message,
                    None,
                    None,
                    self._polls + 3,
                )
                self._inbox.append(again)
        self._land(delivery)
        if delivery.fault is FaultKind.FAIL and delivery.write_id is not None:
            delivery.origin._end(delivery.write_id, "scripted failure")
            return
        if delivery.message:
            self._events.append(MessageArrived(delivery.origin.instance_id, delivery.message))
        delivery.origin._end(delivery.write_id, None)

    def _land(self, delivery: _Delivery) -> None:
        pool = delivery.origin._pool
        if not delivery.copies or pool is None:
            return
        first, end = delivery.part or (0, int(pool.shape[1]))
        if delivery.fault in (FaultKind.TRUNCATE, FaultKind.FAIL):
            end = first + (end - first) // 2
        for page, slot in delivery.copies:
            place = self._place(delivery.origin, slot, int(pool.shape[1]))
            place[first:end].copy_(pool[page, first:end])
        if delivery.fault is FaultKind.CORRUPT:
            _, slot = delivery.copies[self._random.randrange(len(delivery.copies))]
            byte = self._random.randrange(first, end)
            place = self._place(delivery.origin, slot, int(pool.shape[1]))
            place[byte] ^= 1 << self._random.randrange(8)

    def _end(self, write_id: WriteId | None, failure: str | None) -> None:
        if write_id is None or self._in_flight.pop(write_id, None) is None:
            return
        if failure is None:
            self._events.append(WriteDone(write_id))
        else:
            self._events.append(WriteFailed(write_id, failure))

    def busy(self) -> bool:
        return bool(self._in_flight)

    def close(self) -> None:
        self._network.members.pop(self.instance_id, None)

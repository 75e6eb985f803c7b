"""A following rank's part of transfers: writes of its own pages, its windows, its share of the
outbox. A thread of its own drives it, as the leading rank's transfer thread drives that rank's; the
two talk over a link that carries nothing else.
"""

import base64
import contextlib
import json
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtransfer.errors import TransferError, TransportError
from kvtransfer.group_transport import Target
from kvtransfer.transport import PeerLost, RankTransport, WriteDone, WriteFailed, WriteId
from worker.rank_kv import RankKv
from worker.rank_link import Kind, RankLink
from worker.rank_windows import RankWindows

logger = logging.getLogger(__name__)

BUSY_POLL_S = 100e-6
"""Pause while pages travel."""

LANDING_POLL_S = 1e-3
"""Pause of a rank with a window that NIXL writes: over TCP a write makes progress only while its
target polls."""

IDLE_POLL_S = 0.5


@dataclass(slots=True)
class _Write:
    transport: str
    number: int
    waiting: set[WriteId] = field(default_factory=set)
    failure: str = ""


class RankTransfers:
    """Answers the leading rank's `LinkedRank`."""

    def __init__(
        self,
        link: RankLink,
        kv: RankKv,
        *,
        transports: Mapping[str, RankTransport],
        windows: RankWindows,
        outbox: torch.Tensor | None,
        outbox_offset: int | None,
    ) -> None:
        """`outbox`: [slots, bytes of a whole page] uint8, in which this rank's part begins at
        `outbox_offset`; None where another rank holds the same heads."""
        self._link = link
        self._kv = kv
        self._transports = transports
        self._windows = windows
        self._outbox = outbox
        self._outbox_offset = outbox_offset
        self._writes: dict[tuple[str, WriteId], _Write] = {}
        self._answers: dict[Kind, Callable[[dict[str, Any]], str | None]] = {
            Kind.OFFER: self._offer,
            Kind.CONNECT: self._connect,
            Kind.OPEN_WINDOW: self._open_window,
            Kind.CONNECT_WINDOW: self._connect_window,
        }

    def start(self, on_error: Callable[[], None]) -> None:
        def run() -> None:
            try:
                if self._kv.pool.is_cuda:
                    # And on the model's stream: seals are made behind its steps, so that an answer
                    # says that what the leading rank's step ended with is written here as well.
                    torch.cuda.set_device(self._kv.pool.device)
                while True:
                    self.step()
            except Exception:
                logger.exception("a rank's transfer thread stopped")
                on_error()

        threading.Thread(target=run, name="kv-transfer", daemon=True).start()

    def step(self) -> None:
        """One frame, if there is one, and the transports' progress."""
        with contextlib.suppress(queue.Empty):
            self._handle(*self._link.receive(self._pause()))
        for name, transport in self._transports.items():
            for event in transport.poll():
                if isinstance(event, WriteDone):
                    self._end((name, event.write_id), "")
                elif isinstance(event, WriteFailed):
                    self._end((name, event.write_id), event.reason)
                elif isinstance(event, PeerLost):
                    lost = [name, event.peer, event.reason]
                    self._link.send(Kind.LOST, json.dumps(lost).encode())

    def _pause(self) -> float:
        if self._writes:
            return BUSY_POLL_S
        polled = (t for t in self._transports.values() if t.polled)
        return LANDING_POLL_S if any(t.landing is not None for t in polled) else IDLE_POLL_S

    def _handle(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.SEAL:
            self._link.send(Kind.ANSWER, self._kv.answer_seal(payload))
            return
        asked = json.loads(payload) if payload else {}
        if kind is Kind.TRANSPORTS:
            self._link.send(Kind.ANSWER, json.dumps(list(self._transports)).encode())
        elif kind is Kind.FILL:
            self._fill(asked["copies"], *asked["part"])
        elif kind is Kind.DISCONNECT:
            for peer in asked["peers"]:
                self._transports[asked["transport"]].disconnect(peer)
        elif kind is Kind.WRITE:
            self._write(asked)
        elif kind in self._answers:
            try:
                answer = {"found": self._answers[kind](asked), "problem": ""}
            except TransferError as error:
                answer = {"found": None, "problem": error.message}
            except RuntimeError as error:  # torch's out-of-memory
                answer = {"found": None, "problem": str(error)}
            self._link.send(Kind.ANSWER, json.dumps(answer).encode())

    def _fill(self, copies: list[list[int]], first: int, end: int) -> None:
        if self._outbox is not None and self._outbox_offset is not None:
            start = self._outbox_offset
            for page, slot in copies:
                place = self._outbox[slot, start + first : start + end]
                place.copy_(self._kv.pool[page, first:end])
        self._link.send(Kind.ANSWER)

    # ---- what is asked, and answered with text or a TransportError ------------------------------

    def _offer(self, asked: dict[str, Any]) -> str:
        transport = self._transports[asked["transport"]]
        return "" if transport.landing is None else _text(transport.local_offer())

    def _connect(self, asked: dict[str, Any]) -> None:
        transport = self._transports[asked["transport"]]
        for peer, offer, offset in asked["targets"]:
            transport.connect(peer, _bytes(offer), offset=offset)

    def _open_window(self, asked: dict[str, Any]) -> str:
        first_slot = asked["first_slot"]
        memory = self._windows.open(first_slot)
        return _text(self._transports[asked["transport"]].open_landing(first_slot, memory))

    def _connect_window(self, asked: dict[str, Any]) -> None:
        transport = self._transports[asked["transport"]]
        for peer, offer, offset in asked["targets"]:
            transport.connect_landing(peer, asked["first_slot"], _bytes(offer), offset=offset)

    # ---- writes ---------------------------------------------------------------------------------

    def _write(self, asked: dict[str, Any]) -> None:
        name = asked["transport"]
        write = _Write(name, asked["number"])
        copies = [(page, slot) for page, slot in asked["copies"]]
        part = None if asked["part"] is None else (asked["part"][0], asked["part"][1])
        for peer in asked["peers"]:
            try:
                write_id = self._transports[name].write(peer, copies, b"", part=part)
            except TransportError as error:
                write.failure = error.message
                break
            write.waiting.add(write_id)
            self._writes[name, write_id] = write
        if not write.waiting:
            self._tell(write)

    def _end(self, which: tuple[str, WriteId], failure: str) -> None:
        write = self._writes.pop(which, None)
        if write is None:
            return
        write.waiting.discard(which[1])
        write.failure = write.failure or failure
        if not write.waiting:
            self._tell(write)

    def _tell(self, write: _Write) -> None:
        ended = [write.transport, write.number, write.failure]
        self._link.send(Kind.ENDED, json.dumps(ended).encode())


class LinkedRank:
    """A following rank at the other end of a link; of the leading rank's transfer thread."""

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._ended: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
        self._lost: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)

    def transports(self) -> list[str]:
        """What it has, by name; waits until its model is loaded."""
        self._link.send(Kind.TRANSPORTS)
        return [str(name) for name in json.loads(self._link.answer())]

    def writer(self, transport: str) -> "LinkedWriter":
        return LinkedWriter(self, transport)

    def tell(self, kind: Kind, **asked: Any) -> None:
        self._link.send(kind, json.dumps(asked).encode())

    def ask(self, kind: Kind, **asked: Any) -> Any:
        """Raises TransportError: the rank cannot."""
        self.tell(kind, **asked)
        answer = json.loads(self._link.answer())
        if answer["problem"]:
            raise TransportError(answer["problem"])
        return answer["found"]

    def take_ended(self, transport: str) -> list[tuple[int, str]]:
        """(number, failure) of that transport's writes that are over."""
        for payload in self._link.take_ended():
            name, number, failure = json.loads(payload)
            self._ended[name].append((int(number), str(failure)))
        return self._ended.pop(transport, [])

    def take_lost(self, transport: str) -> list[tuple[str, str]]:
        """(peer's rank, why) of those that this rank cannot reach by that transport any more."""
        for payload in self._link.take_lost():
            name, peer, reason = json.loads(payload)
            self._lost[name].append((str(peer), str(reason)))
        return self._lost.pop(transport, [])


class LinkedWriter:
    """`RankWriter` of one of its transports."""

    def __init__(self, rank: LinkedRank, transport: str) -> None:
        self._rank = rank
        self._transport = transport

    def offer(self) -> bytes:
        return _bytes(self._rank.ask(Kind.OFFER, transport=self._transport))

    def connect(self, targets: Sequence[Target]) -> None:
        self._rank.ask(Kind.CONNECT, transport=self._transport, targets=_told(targets))

    def disconnect(self, peers: Sequence[str]) -> None:
        self._rank.tell(Kind.DISCONNECT, transport=self._transport, peers=list(peers))

    def open_landing(self, first_slot: int) -> bytes:
        asked = {"transport": self._transport, "first_slot": first_slot}
        return _bytes(self._rank.ask(Kind.OPEN_WINDOW, **asked))

    def connect_landing(self, first_slot: int, targets: Sequence[Target]) -> None:
        asked = {"transport": self._transport, "first_slot": first_slot}
        self._rank.ask(Kind.CONNECT_WINDOW, **asked, targets=_told(targets))

    def write(
        self,
        number: int,
        peers: Sequence[str],
        copies: Sequence[tuple[int, int]],
        part: tuple[int, int] | None,
    ) -> None:
        self._rank.tell(
            Kind.WRITE,
            transport=self._transport,
            number=number,
            peers=list(peers),
            copies=list(copies),
            part=part,
        )

    def ended(self) -> list[tuple[int, str]]:
        return self._rank.take_ended(self._transport)

    def lost(self) -> list[tuple[str, str]]:
        return self._rank.take_lost(self._transport)


def _told(targets: Sequence[Target]) -> list[tuple[str, str, int]]:
    return [(target.peer, _text(target.offer), target.offset) for target in targets]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)

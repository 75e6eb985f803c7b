"""A following rank's part of transfers: NIXL writes of its own pages, its window, its share of the
outbox. A thread of its own drives it, as the leading rank's transfer thread drives that rank's; the
two talk over a link that carries nothing else.
"""

import base64
import contextlib
import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtransfer.errors import TransportError
from kvtransfer.group_transport import Targets
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import WriteDone, WriteFailed, WriteId
from worker.rank_kv import RankKv
from worker.rank_link import Kind, RankLink

logger = logging.getLogger(__name__)

BUSY_POLL_S = 100e-6
"""Pause while pages travel."""

LANDING_POLL_S = 1e-3
"""Pause of a rank with a window: over TCP a write makes progress only while its target polls."""

IDLE_POLL_S = 0.5


@dataclass(slots=True)
class _Write:
    number: int
    waiting: set[WriteId] = field(default_factory=set)
    failure: str = ""


class RankTransfers:
    """Answers the leading rank's `LinkedWriter`."""

    def __init__(
        self,
        link: RankLink,
        kv: RankKv,
        *,
        nixl: NixlTransport | None,
        outbox: torch.Tensor | None,
        outbox_offset: int | None,
    ) -> None:
        """`outbox`: [slots, bytes of a whole page] uint8, in which this rank's part begins at
        `outbox_offset`; None where another rank holds the same heads."""
        self._link = link
        self._kv = kv
        self._nixl = nixl
        self._outbox = outbox
        self._outbox_offset = outbox_offset
        self._writes: dict[WriteId, _Write] = {}

    def start(self, on_error: Callable[[], None]) -> None:
        def run() -> None:
            try:
                if self._kv.pool.is_cuda:
                    torch.cuda.set_device(self._kv.pool.device)
                while True:
                    self.step()
            except Exception:
                logger.exception("a rank's transfer thread stopped")
                on_error()

        threading.Thread(target=run, name="kv-transfer", daemon=True).start()

    def step(self) -> None:
        """One frame, if there is one, and NIXL's progress."""
        with contextlib.suppress(queue.Empty):
            self._handle(*self._link.receive(self._pause()))
        if self._nixl is not None:
            for event in self._nixl.poll():
                if isinstance(event, WriteDone):
                    self._end(event.write_id, "")
                elif isinstance(event, WriteFailed):
                    self._end(event.write_id, event.reason)

    def _pause(self) -> float:
        if self._writes:
            return BUSY_POLL_S
        landing = self._nixl is not None and self._nixl.landing is not None
        return LANDING_POLL_S if landing else IDLE_POLL_S

    def _handle(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.SEAL:
            self._link.send(Kind.ANSWER, self._kv.answer_seal(payload))
        elif kind is Kind.OFFER:
            landing = self._nixl is not None and self._nixl.landing is not None
            offer = self._nixl.local_offer() if landing and self._nixl is not None else b""
            self._link.send(Kind.ANSWER, offer)
        elif kind is Kind.FILL:
            self._fill(json.loads(payload)["copies"])
        elif kind is Kind.CONNECT:
            self._link.send(Kind.ANSWER, self._connect(json.loads(payload)).encode())
        elif kind is Kind.DISCONNECT and self._nixl is not None:
            for peer in json.loads(payload):
                self._nixl.disconnect(peer)
        elif kind is Kind.WRITE:
            self._write(json.loads(payload))

    def _fill(self, copies: list[list[int]]) -> None:
        if self._outbox is not None and self._outbox_offset is not None:
            size = int(self._kv.pool.shape[1])
            for page, slot in copies:
                start = self._outbox_offset
                self._outbox[slot, start : start + size].copy_(self._kv.pool[page])
        self._link.send(Kind.ANSWER)

    def _connect(self, targets: list[list[Any]]) -> str:
        if self._nixl is None:
            return "this rank has no NIXL"
        try:
            for peer, offer, offset in targets:
                self._nixl.connect(peer, base64.b64decode(offer), offset=offset)
        except TransportError as error:
            return error.message
        return ""

    def _write(self, asked: dict[str, Any]) -> None:
        write = _Write(asked["number"])
        copies = [(page, slot) for page, slot in asked["copies"]]
        part = None if asked["part"] is None else (asked["part"][0], asked["part"][1])
        for peer in asked["peers"]:
            try:
                if self._nixl is None:
                    raise TransportError("this rank has no NIXL")
                write_id = self._nixl.write(peer, copies, b"", part=part)
            except TransportError as error:
                write.failure = error.message
                break
            write.waiting.add(write_id)
            self._writes[write_id] = write
        if not write.waiting:
            self._tell(write)

    def _end(self, write_id: WriteId, failure: str) -> None:
        write = self._writes.pop(write_id, None)
        if write is None:
            return
        write.waiting.discard(write_id)
        write.failure = write.failure or failure
        if not write.waiting:
            self._tell(write)

    def _tell(self, write: _Write) -> None:
        self._link.send(Kind.ENDED, json.dumps([write.number, write.failure]).encode())


class LinkedWriter:
    """`RankWriter` of a rank at the other end of a link; of the leading rank's transfer thread."""

    def __init__(self, link: RankLink) -> None:
        self._link = link

    def offer(self) -> bytes:
        self._link.send(Kind.OFFER)
        return self._link.answer()

    def connect(self, targets: Targets) -> None:
        told = [(peer, base64.b64encode(offer).decode(), offset) for peer, offer, offset in targets]
        self._link.send(Kind.CONNECT, json.dumps(told).encode())
        problem = self._link.answer().decode()
        if problem:
            raise TransportError(problem)

    def disconnect(self, peers: Sequence[str]) -> None:
        self._link.send(Kind.DISCONNECT, json.dumps(list(peers)).encode())

    def write(
        self,
        number: int,
        peers: Sequence[str],
        copies: Sequence[tuple[int, int]],
        part: tuple[int, int] | None,
    ) -> None:
        asked = {"number": number, "peers": list(peers), "copies": list(copies), "part": part}
        self._link.send(Kind.WRITE, json.dumps(asked).encode())

    def ended(self) -> list[tuple[int, str]]:
        ended = [json.loads(payload) for payload in self._link.take_ended()]
        return [(int(number), str(failure)) for number, failure in ended]

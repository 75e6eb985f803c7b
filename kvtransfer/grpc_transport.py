"""The gRPC transport's half inside the engine process.

KV bytes that go by gRPC never pass through the channel between a worker's two processes: source
pages are copied into an outbox of shared memory, the front streams them from there, and the peer's
front puts them into its landing window, shared memory too. This half hands out outbox slots, and
turns the front's answers into events. It works between any two machines that can talk at all, at
a tenth of a plain copy's speed or less (bench/README.md).

Since the fronts do the writing, the end of a session ends every write of it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvtransfer.errors import TransportError
from kvtransfer.orders import WriteOrder
from kvtransfer.transport import (
    MessageArrived,
    Transport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)

Fill = Callable[[Sequence[tuple[int, int]], tuple[int, int] | None], None]
"""Copies (page, outbox slot); a part alone: of each page's piece in each pool."""


@dataclass(slots=True)
class _Write:
    write_id: WriteId
    peer: str
    waiting: deque[tuple[int, int]]
    """(source page, landing slot) not yet copied to the outbox."""
    message: bytes
    part: tuple[int, int] | None
    orders: int = 0
    """Orders that the front has not answered."""
    failure: str = ""

    @property
    def copied(self) -> bool:
        return not self.waiting


class GrpcTransport(Transport):
    """Outbox and books of the gRPC transport."""

    name = "grpc"
    polled = False
    loss_ends_writes = True
    writes_parts = True

    def __init__(
        self,
        *,
        pool: torch.Tensor | None,
        outbox: torch.Tensor | None,
        landing: torch.Tensor | None,
        further_landing: torch.Tensor | None = None,
        submit: Callable[[WriteOrder], None],
        send: Callable[[str, bytes], None],
        fill: Fill | None = None,
        pieces: Sequence[int] = (0,),
    ) -> None:
        """`pool`: [pages, page_bytes] uint8, any device; `outbox` and `landing`: shared memory,
        [slots, page_bytes] uint8. `further_landing`: the slots of all windows that there may be,
        where the worker's own further windows are not shared memory. `submit` and `send` pass an
        order or a (peer, message) to the front; they are called on the transfer thread and must
        not block for long. `fill` copies pages into the outbox; None: those of this pool. `pieces`:
        where the parts of a page that lie in several pools begin in a slot. Bytes."""
        self.landing = landing
        self._further_landing = further_landing
        self._pool = pool
        self._outbox = outbox
        self._fill = fill or self._copy
        self._pieces = pieces
        self._submit = submit
        self._send = send
        self._wake: Callable[[], None] = _nothing
        self._peers: set[str] = set()
        self._inputs: deque[MessageArrived | tuple[int, str]] = deque()
        """What the front said: a message, or (order's id, error)."""
        self._free = deque(range(0 if outbox is None else outbox.shape[0]))
        self._queue: deque[_Write] = deque()
        """Writes with pages that still wait for outbox slots."""
        self._writes: dict[WriteId, _Write] = {}
        self._orders: dict[int, tuple[_Write, list[int]]] = {}
        self._events: list[TransportEvent] = []
        self._next_write = 1
        self._next_order = 1

    def bind(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    # ---- the front's inputs; any thread -------------------------------------------------------

    def on_message(self, peer: str, message: bytes) -> None:
        """A peer's message, in order."""
        self._inputs.append(MessageArrived(peer, message))
        self._wake()

    def on_write_done(self, write_id: int, error: str) -> None:
        """The answer to an order; empty `error`: all bytes are in place at the peer."""
        self._inputs.append((write_id, error))
        self._wake()

    # ---- the transfer thread ------------------------------------------------------------------

    def local_offer(self) -> bytes:
        return b""

    def connect(self, peer: str, offer: bytes) -> None:
        self._peers.add(peer)

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)
        for write in [w for w in self._writes.values() if w.peer == peer]:
            write.waiting.clear()
            write.failure = write.failure or f"session with peer {peer} has ended"
            self._settle(write)
        self._queue = deque(w for w in self._queue if w.waiting)

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        # The front maps the shared memory of all windows; slots are numbered through it.
        return b""

    def landing_of(self, first_slot: int) -> torch.Tensor | None:
        if self._further_landing is None or self.landing is None:
            return None if first_slot else self.landing
        return self._further_landing[first_slot : first_slot + len(self.landing)]

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        if peer not in self._peers:
            raise TransportError(f"no gRPC session with peer {peer}")
        if self._pool is None or self._outbox is None:
            raise TransportError("this worker has no outbox: it does not send KV")
        if not copies or not all(0 <= page < len(self._pool) for page, _ in copies):
            raise TransportError("source pages outside the pool")
        if part is not None and not 0 <= part[0] < part[1] <= int(self._pool.shape[1]):
            raise TransportError(f"bytes {part} of pages of {self._pool.shape[1]} bytes")
        write = _Write(WriteId(self._next_write), peer, deque(copies), message, part)
        self._next_write += 1
        self._writes[write.write_id] = write
        self._queue.append(write)
        self._fill_outbox()
        return write.write_id

    def send(self, peer: str, message: bytes) -> None:
        if peer not in self._peers:
            raise TransportError(f"no gRPC session with peer {peer}")
        self._send(peer, message)

    def poll(self) -> list[TransportEvent]:
        while self._inputs:
            item = self._inputs.popleft()
            if isinstance(item, MessageArrived):
                self._events.append(item)
            else:
                self._on_answer(*item)
        self._fill_outbox()
        events, self._events = self._events, []
        return events

    def _fill_outbox(self) -> None:
        while self._queue and self._free and self._pool is not None and self._outbox is not None:
            write = self._queue[0]
            copies: list[tuple[int, int]] = []
            filled: list[tuple[int, int]] = []
            while write.waiting and self._free:
                page, landing_slot = write.waiting.popleft()
                slot = self._free.popleft()
                copies.append((slot, landing_slot))
                filled.append((page, slot))
            self._fill(filled, write.part)
            first, end = write.part or (0, 0)
            order = self._next_order
            self._next_order += 1
            write.orders += 1
            self._orders[order] = (write, [slot for slot, _ in copies])
            if write.copied:
                self._queue.popleft()
            self._submit(
                WriteOrder(
                    write_id=order,
                    peer=write.peer,
                    copies=tuple(copies),
                    ranges=tuple((at + first, at + end) for at in self._pieces if write.part),
                    message=write.message if write.copied else b"",
                )
            )

    def _copy(self, copies: Sequence[tuple[int, int]], part: tuple[int, int] | None) -> None:
        if self._pool is not None and self._outbox is not None:
            first, end = part or (0, int(self._pool.shape[1]))
            for page, slot in copies:
                self._outbox[slot, first:end].copy_(self._pool[page, first:end])

    def _on_answer(self, order: int, error: str) -> None:
        entry = self._orders.pop(order, None)
        if entry is None:
            return
        write, slots = entry
        self._free.extend(slots)
        write.orders -= 1
        if error:
            write.failure = write.failure or error
            write.waiting.clear()
            self._queue = deque(w for w in self._queue if w.waiting)
        self._settle(write)

    def _settle(self, write: _Write) -> None:
        """Ends a write whose orders are all answered; a failed one at once, since its source
        pages are not read any more."""
        if write.write_id not in self._writes:
            return
        if write.failure:
            del self._writes[write.write_id]
            self._events.append(WriteFailed(write.write_id, write.failure))
        elif write.copied and not write.orders:
            del self._writes[write.write_id]
            self._events.append(WriteDone(write.write_id))

    def busy(self) -> bool:
        return bool(self._writes)

    def close(self) -> None:
        self._peers.clear()


def _nothing() -> None:
    """Before `bind`."""

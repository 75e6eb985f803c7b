"""One KV session between two fronts, after its handshake: the same on both ends.

Messages go ahead of page bytes, page bytes go in chunks that are read from the outbox only when
the wire takes them, and what is not acknowledged is bounded; so a slow peer costs neither memory
nor heartbeats. Either end that hears nothing for `silence_s` ends the session.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.kv_frames import ChunkFrame, Frame
from kvtransfer.orders import WriteOrder
from protos.baton.v1 import kv_pb2

CHUNK_BYTES = 256 << 10
"""Messages of 1 MiB cost the sender twice as much, since nothing of them is in a cache when it is
copied next (measured), and delay what waits behind them."""

MAX_UNACKED_BYTES = 64 << 20
"""Page bytes on their way to one peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTiming:
    """How fast a dead or hung peer is noticed."""

    heartbeat_s: float = 0.5
    """A frame at least this often. Seconds."""
    silence_s: float = 3.0
    """Without any frame for so long the peer is lost. Seconds; leaves time to answer the client
    within 5 s."""
    handshake_s: float = 5.0
    """Longest wait for the first frames. Seconds."""
    redial_s: float = 0.5
    """Pause before the next attempt to connect; doubles to 10 times as much. Seconds."""


class SessionHandler(Protocol):
    """What a worker's front does with sessions. Called on the event loop; must not block."""

    def peer_connected(self, info: kv_pb2.ConnectInfo, transport: str) -> None:
        """Handshake done: attach the peer in the engine, by `transport`."""

    def peer_lost(self, peer: str, reason: str) -> None:
        """The session has ended; nothing of the peer arrives through it any more."""

    def message(self, peer: str, data: bytes) -> None:
        """A KvMessage for the engine."""

    def write_done(self, write_id: int, peer: str, error: str) -> None:
        """The one answer to an order."""


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Shared memory in slots, as bytes."""

    view: memoryview
    slot_bytes: int

    @property
    def slots(self) -> int:
        return len(self.view) // self.slot_bytes

    def read(self, slot: int, offset: int, size: int) -> memoryview:
        """The memory itself, no copy."""
        start = slot * self.slot_bytes + offset
        return self.view[start : start + size]

    def problem(self, slot: int, offset: int, size: int) -> str:
        """Why these bytes may not be written; empty where they may."""
        # A page that was cut larger than a slot reaches into the slots behind it.
        if slot * self.slot_bytes + offset + size > self.slots * self.slot_bytes:
            return (
                f"bytes {offset}..{offset + size} of slot {slot} lie outside the landing window "
                f"({self.slots} slots of {self.slot_bytes} bytes)"
            )
        return ""

    def write(self, slot: int, offset: int, data: memoryview) -> None:
        start = slot * self.slot_bytes + offset
        self.view[start : start + len(data)] = data


class ProtocolError(Exception):
    """The peer sent what has no place here."""


class KvSession:
    """Pumps of one session. Orders and messages come in by plain calls on the event loop."""

    def __init__(
        self,
        *,
        peer: str,
        read: Callable[[], Awaitable[Frame | None]],
        write: Callable[[Frame], Awaitable[None]],
        handler: SessionHandler,
        outbox: SlotMemory | None,
        window: SlotMemory | None,
        timing: SessionTiming,
    ) -> None:
        """`read` returns None at the stream's end. `outbox`: what orders read from; `window`:
        what the peer's chunks may fill; either may be None."""
        self.peer = peer
        self._read = read
        self._write = write
        self._handler = handler
        self._outbox = outbox
        self._window = window
        self._timing = timing
        self._control: deque[kv_pb2.KvFrame] = deque()
        self._orders: deque[WriteOrder] = deque()
        self._unanswered: dict[int, int] = {}
        """Order -> its bytes, from submission to the answer."""
        self._unacked_bytes = 0
        self._refused_writes: dict[int, str] = {}
        self._ready = asyncio.Event()
        self._closing = asyncio.Event()
        self._close_reason = ""
        self._last_heard = time.monotonic()

    def send_message(self, data: bytes) -> None:
        """Queues a KvMessage, ahead of page bytes."""
        self._put(kv_pb2.KvFrame(message=data))

    def submit(self, order: WriteOrder) -> None:
        """Queues an order; `write_done` answers it, whatever happens."""
        self._unanswered[order.write_id] = 0
        self._orders.append(order)
        self._ready.set()

    def close(self, reason: str) -> None:
        """Ends the session; `run` returns soon."""
        self._close_reason = self._close_reason or reason
        self._closing.set()

    def _put(self, frame: kv_pb2.KvFrame) -> None:
        self._control.append(frame)
        self._ready.set()

    async def run(self) -> str:
        """Pumps until the session ends; why it did. All orders are answered by then."""
        self._last_heard = time.monotonic()
        tasks = [
            asyncio.create_task(pump())
            for pump in (self._reader, self._writer, self._watch, self._wait_closed)
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
            self._answer_all(self._close_reason or f"session with peer {self.peer} has ended")
        return self._close_reason or reason

    def _answer_all(self, error: str) -> None:
        unanswered, self._unanswered = list(self._unanswered), {}
        for write_id in unanswered:
            self._handler.write_done(write_id, self.peer, error)

    async def _wait_closed(self) -> str:
        await self._closing.wait()
        return self._close_reason

    async def _watch(self) -> str:
        while True:
            self._put(kv_pb2.KvFrame(heartbeat=kv_pb2.Heartbeat()))
            await asyncio.sleep(self._timing.heartbeat_s)
            silent_s = time.monotonic() - self._last_heard
            if silent_s > self._timing.silence_s:
                return f"nothing heard from peer {self.peer} for {silent_s:.1f} s"

    # ---- sending ------------------------------------------------------------------------------

    async def _writer(self) -> str:
        chunks: Iterator[Frame] = iter(())
        try:
            while True:
                while self._control:
                    await self._write(self._control.popleft())
                frame = next(chunks, None)
                if frame is None and self._orders and self._unacked_bytes < MAX_UNACKED_BYTES:
                    chunks = self._chunks(self._orders.popleft())
                    frame = next(chunks, None)
                if frame is not None:
                    await self._write(frame)
                elif not self._control:
                    self._ready.clear()
                    await self._ready.wait()
        except Exception as error:  # any failure of the stream ends the session, by its reason
            return _stream_failure(self.peer, error)

    def _chunks(self, order: WriteOrder) -> Iterator[Frame]:
        """The order's bytes; each chunk is read when it is written to the stream."""
        outbox = self._outbox
        if outbox is None:
            raise ProtocolError("an order to send, but no outbox")
        pieces = [
            (offset, min(CHUNK_BYTES, end - offset))
            for first, end in order.ranges or ((0, outbox.slot_bytes),)
            for offset in range(first, end, CHUNK_BYTES)
        ]
        total = sum(length for _, length in pieces) * len(order.copies)
        self._unanswered[order.write_id] = total
        self._unacked_bytes += total
        for index, (slot, landing_slot) in enumerate(order.copies):
            for offset, length in pieces:
                last = index == len(order.copies) - 1 and offset == pieces[-1][0]
                chunk = kv_pb2.PageChunk(
                    write_id=order.write_id,
                    slot=landing_slot,
                    offset=offset,
                    last=last,
                    message=order.message if last else b"",
                )
                yield ChunkFrame(chunk, outbox.read(slot, offset, length))

    # ---- receiving ----------------------------------------------------------------------------

    async def _reader(self) -> str:
        try:
            while True:
                frame = await self._read()
                if frame is None:
                    return f"peer {self.peer} closed the session"
                self._last_heard = time.monotonic()
                self._on_frame(frame)
        except Exception as error:  # as above
            return _stream_failure(self.peer, error)

    def _on_frame(self, frame: Frame) -> None:
        if self._closing.is_set():
            return  # its end is reported already: nothing of it may land any more
        if isinstance(frame, ChunkFrame):
            self._on_chunk(frame.chunk, frame.data)
            return
        kind = frame.WhichOneof("kind")
        if kind == "message":
            self._handler.message(self.peer, frame.message)
        elif kind == "write_ack":
            self._on_ack(frame.write_ack)
        elif kind != "heartbeat":
            raise ProtocolError(f"frame {kind} after the handshake")

    def _on_chunk(self, chunk: kv_pb2.PageChunk, data: memoryview) -> None:
        if self._window is None:
            raise ProtocolError("page bytes, but this worker has no landing window")
        problem = self._refused_writes.get(chunk.write_id) or self._window.problem(
            chunk.slot, chunk.offset, len(data)
        )
        if problem:
            self._refused_writes[chunk.write_id] = problem
        else:
            self._window.write(chunk.slot, chunk.offset, data)
        if chunk.last:
            self._refused_writes.pop(chunk.write_id, None)
            if not problem and chunk.message:
                self._handler.message(self.peer, chunk.message)
            ack = kv_pb2.WriteAck(write_id=chunk.write_id, error=problem)
            self._put(kv_pb2.KvFrame(write_ack=ack))

    def _on_ack(self, ack: kv_pb2.WriteAck) -> None:
        size = self._unanswered.pop(ack.write_id, None)
        if size is None:
            return
        self._unacked_bytes -= size
        self._ready.set()
        self._handler.write_done(ack.write_id, self.peer, ack.error)


def _stream_failure(peer: str, error: Exception) -> str:
    if isinstance(error, ProtocolError):
        return f"peer {peer} broke the protocol: {error}"
    return f"stream with peer {peer} broke: {type(error).__name__} {error}".strip()

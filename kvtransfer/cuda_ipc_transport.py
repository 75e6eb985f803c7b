"""cuda_ipc: two GPUs of one host, or two processes on one, and nothing between them but a copy.

The receiver's landing window is an allocation of its own, which the writer maps once, when the two
are joined. A write is a few copies by the GPU's copy engines (kvtransfer/peer_copy.py), started at
once or queued on the device behind the layers that compute the pages.

What keeps it honest:

- A copy that has ended is visible to the peer's device, and the message leaves only after that. A
  window's owner that has died leaves the memory to those who have it mapped, so a copy under way
  hits nothing else; the mapping is closed when the last one has ended.
- Writers cannot be called back: whoever was granted a slot may write it until it has said that it
  will not, or has exited. The window is never freed before the process ends.
- Only processes of one host and one PID namespace can be joined, and the kernel (Unix sockets'
  credentials) vouches for who is at the other end.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvtransfer.cuda_memory import close_window, export_window, open_window
from kvtransfer.errors import TransportError, TransportUnavailableError
from kvtransfer.host import pid_namespace
from kvtransfer.layout import PageLayout
from kvtransfer.local_link import LinkAddress, LocalLinks
from kvtransfer.peer_copy import PeerCopier, PendingCopy
from kvtransfer.transport import (
    MessageArrived,
    PeerLost,
    RankTransport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)

MAX_WINDOW_SLOTS = 1 << 20
"""A peer's claim beyond this is refused."""


@dataclass(frozen=True, slots=True)
class _Window:
    """A peer's landing window, mapped here."""

    address: int
    slots: int
    slot_bytes: int
    offset: int
    """Where pages from here begin in their slots. Bytes."""

    def place(self, slot: int, page_bytes: int) -> int | None:
        """Address of a page in that slot, counted from the window's first; None where it would
        reach beyond the window. A page larger than a slot takes the slots behind it."""
        start = slot * self.slot_bytes + self.offset
        end = self.slots * self.slot_bytes
        return self.address + start if slot >= 0 and start + page_bytes <= end else None


@dataclass(slots=True)
class _Peer:
    token: str
    """Of its link: fresh in each of its lives."""
    windows: dict[int, _Window] = field(default_factory=dict)
    """By their first slots."""
    writes: int = 0
    closing: bool = False

    def place(self, slot: int, page_bytes: int) -> int:
        """Address of a page in a slot. Raises TransportError where it would reach beyond the
        slot's window."""
        for first, window in self.windows.items():
            address = window.place(slot - first, page_bytes)
            if address is not None:
                return address
        raise TransportError(f"a page in slot {slot} would be outside the peer's windows")


@dataclass(slots=True)
class _Flight:
    write_id: WriteId
    peer: str
    copy: PendingCopy
    message: bytes
    """Empty: it has none."""
    passed: torch.cuda.Event | None
    """What the device passes before it begins; None: it has begun."""


@dataclass(slots=True)
class _Writer:
    copier: PeerCopier
    flights: deque[_Flight] = field(default_factory=deque)
    """On one stream, so they end in order."""

    @property
    def at_work(self) -> bool:
        if not self.flights:
            return False
        passed = self.flights[0].passed
        return passed is None or bool(passed.query())  # type: ignore[no-untyped-call]


def unavailable_reason(device: torch.device) -> str:
    """Why cuda_ipc cannot be used by an engine on `device`; empty where it can."""
    if device.type != "cuda":
        return f"it joins GPUs, and this worker computes on {device.type}"
    if not pid_namespace():
        return "this system does not tell its PID namespace"
    return ""


class CudaIpcTransport(RankTransport):
    """One engine's end."""

    name = "cuda_ipc"
    polled = False
    writes_polled = True
    loss_ends_writes = False
    any_thread = True
    writes_parts = True
    writes_behind = True

    def __init__(
        self,
        *,
        layout: PageLayout,
        pool: torch.Tensor | None,
        landing: torch.Tensor | None,
    ) -> None:
        """`pool`: [pages, page_bytes] uint8 on CUDA, source of writes; `landing`: [slots,
        slot_bytes] uint8 of `allocate_window`, what peers may write. Either may be None.

        Raises TransportUnavailableError where this device, system or layout cannot.
        """
        memory = pool if pool is not None else landing
        device = memory.device if memory is not None else torch.device("cpu")
        reason = unavailable_reason(device)
        if reason:
            raise TransportUnavailableError(f"transport cuda_ipc is not available: {reason}")
        self.landing = landing
        self._device = device
        self._layout = layout
        try:
            self._exported = None if landing is None else export_window(landing)
            self._writer = None if pool is None else _Writer(PeerCopier(pool))
            self._behind = None if pool is None else _Writer(PeerCopier(pool))
        except (TransportError, ValueError, RuntimeError) as error:
            raise TransportUnavailableError(
                f"transport cuda_ipc does not start: {error}"
            ) from error
        self._pages = 0 if pool is None else int(pool.shape[0])
        self._links = LocalLinks()
        self._peers: dict[str, _Peer] = {}
        self._events: deque[TransportEvent] = deque()
        self._next_write = 1

    def bind(self, wake: Callable[[], None]) -> None:
        self._links.bind(wake)

    # ---- peers ----------------------------------------------------------------------------------

    def local_offer(self) -> bytes:
        address = self._links.address
        offer: dict[str, object] = {
            "host": pid_namespace(),
            "socket": address.name,
            "token": address.token,
            "pid": address.pid,
        }
        if self.landing is not None and self._exported is not None:
            offer["window"] = [self._exported.hex(), *self.landing.shape]
        return json.dumps(offer).encode()

    @property
    def sends(self) -> bool:
        return self._writer is not None

    def connect(self, peer: str, offer: bytes, *, offset: int = 0) -> None:
        try:
            claims: dict[str, Any] = json.loads(offer)
            address = LinkAddress(str(claims["socket"]), str(claims["token"]), int(claims["pid"]))
            host, window = str(claims["host"]), claims.get("window")
        except (ValueError, KeyError, TypeError) as error:
            raise TransportError(f"peer {peer} makes no sense to cuda_ipc: {error!r}") from error
        if host != pid_namespace():
            raise TransportError(f"peer {peer} is on another host or in another PID namespace")
        if self._revive(peer, address):
            return
        if self._writer is None:
            self._links.expect(peer, address)
            self._peers[peer] = _Peer(address.token)
            return
        mapped = self._map(peer, window, offset)
        try:
            self._links.dial(peer, address)
        except TransportError:
            close_window(mapped.address, self._device)
            raise
        self._peers[peer] = _Peer(address.token, {0: mapped})

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        return json.dumps([export_window(memory).hex(), *memory.shape]).encode()

    def connect_landing(self, peer: str, first_slot: int, offer: bytes, *, offset: int = 0) -> None:
        entry = self._peers.get(peer)
        if entry is None or entry.closing:
            raise TransportError(f"cuda_ipc is not connected to peer {peer}")
        if first_slot in entry.windows:
            return
        try:
            window = json.loads(offer)
        except ValueError as error:
            raise TransportError(f"peer {peer} makes no sense to cuda_ipc: {error}") from error
        entry.windows[first_slot] = self._map(peer, window, offset)

    def _revive(self, peer: str, address: LinkAddress) -> bool:
        """A peer that is back in the same life while writes to it still go on keeps its mapping."""
        entry = self._peers.get(peer)
        if entry is None:
            return False
        if entry.token != address.token:
            raise TransportError(f"writes to {peer}'s former life have not ended yet")
        if self._writer is None:
            self._links.expect(peer, address)
        else:
            self._links.dial(peer, address)
        entry.closing = False
        return True

    def _map(self, peer: str, window: object, offset: int) -> _Window:
        match window:
            case [str(handle), int(slots), int(slot_bytes)] if 1 <= slots <= MAX_WINDOW_SLOTS:
                pass
            case _:
                raise TransportError(f"peer {peer} offers no landing window for cuda_ipc")
        if slot_bytes < 1:
            raise TransportError(f"peer {peer} has slots of {slot_bytes} bytes")
        try:
            address = open_window(bytes.fromhex(handle), self._device)
        except (TransportError, ValueError) as error:
            raise TransportError(f"the window of {peer} cannot be mapped: {error}") from error
        return _Window(address, slots, slot_bytes, offset)

    def disconnect(self, peer: str) -> None:
        entry = self._peers.get(peer)
        if entry is None:
            return
        entry.closing = True
        self._links.drop(peer)
        self._close_if_quiet(peer, entry)

    def _close_if_quiet(self, peer: str, entry: _Peer) -> None:
        if entry.closing and not entry.writes:
            del self._peers[peer]
            self._unmap(entry)

    def _unmap(self, entry: _Peer) -> None:
        for window in entry.windows.values():
            close_window(window.address, self._device)
        entry.windows.clear()

    # ---- writes and messages --------------------------------------------------------------------

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        return self._start(self._writer, peer, copies, message, part, None)

    def write_behind(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        *,
        part: tuple[int, int],
        passed: torch.cuda.Event | None,
    ) -> WriteId:
        return self._start(self._behind, peer, copies, b"", part, passed)

    def _start(
        self,
        writer: _Writer | None,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        part: tuple[int, int] | None,
        passed: torch.cuda.Event | None,
    ) -> WriteId:
        entry = self._peers.get(peer)
        if entry is None or entry.closing or not entry.windows or writer is None:
            raise TransportError(f"cuda_ipc has no landing window of peer {peer}")
        if not copies or not all(0 <= page < self._pages for page, _ in copies):
            raise TransportError("source pages outside the pool")
        page_bytes = self._layout.page_bytes
        if part is not None and not 0 <= part[0] < part[1] <= page_bytes:
            raise TransportError(f"bytes {part} of pages of {page_bytes} bytes")
        places = [(page, entry.place(slot, page_bytes)) for page, slot in copies]
        copy = writer.copier.start(places, part, passed)
        write_id = WriteId(self._next_write)
        self._next_write += 1
        entry.writes += 1
        writer.flights.append(_Flight(write_id, peer, copy, message, passed))
        return write_id

    def send(self, peer: str, message: bytes) -> None:
        if peer not in self._peers:
            raise TransportError(f"cuda_ipc is not connected to peer {peer}")
        self._links.send(peer, message)

    def poll(self) -> list[TransportEvent]:
        for peer, data in self._links.receive():
            if data is not None:
                self._events.append(MessageArrived(peer, data))
            elif peer in self._peers:
                self._events.append(PeerLost(peer, f"the engine of {peer} closed its socket"))
        for writer in self._writers:
            while writer.flights and writer.flights[0].copy.ended():
                self._end(writer.flights.popleft())
        events = list(self._events)
        self._events.clear()
        return events

    def _end(self, flight: _Flight) -> None:
        try:
            if flight.message:
                self.send(flight.peer, flight.message)
        except TransportError as error:
            self._events.append(WriteFailed(flight.write_id, error.message))
        else:
            self._events.append(WriteDone(flight.write_id))
        entry = self._peers[flight.peer]
        entry.writes -= 1
        self._close_if_quiet(flight.peer, entry)

    def busy(self) -> bool:
        return any(writer.at_work for writer in self._writers)

    def handles(self) -> int:
        windows = sum(len(peer.windows) for peer in list(self._peers.values()))
        return windows + sum(len(writer.flights) for writer in self._writers)

    @property
    def _writers(self) -> list[_Writer]:
        return [writer for writer in (self._writer, self._behind) if writer is not None]

    def close(self) -> None:
        """Waits for the copies under way: some milliseconds, and the step that they are behind."""
        for writer in self._writers:
            for flight in writer.flights:
                flight.copy.wait()
        self._links.close()
        for entry in self._peers.values():
            self._unmap(entry)
        self._peers.clear()

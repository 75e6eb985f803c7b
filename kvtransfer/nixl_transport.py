"""NIXL over UCX: RDMA, NVLink, shared memory and TCP under one API. The only door to `nixl`.

What was measured decides how it is used here:

- NIXL's progress thread spins a whole core, so it is off; progress happens in `poll`, on the
  transfer thread, which decides how often.
- Pool and window are registered once and whole, and descriptor lists are prepared once a peer;
  a transfer is then two lists of indices. Neighbouring pages in neighbouring slots leave as one
  descriptor, since NIXL merges them.
- A peer gets to know the landing window and nothing else: prefill's metadata carries connection
  data only, so nobody can read or write its pool. Descriptor lists of a peer's making are never
  unpickled; only the window's address and size travel, and NIXL checks them against the metadata.
- Releasing a handle in progress does not stop its write, and using one after its release crashes
  the process: handles stay wrapped here until DONE or an exception.
- Posting to a peer that died before makes a later clean-up abort the process unless notifications
  were read first, so `get_new_notifs` runs before every post.
- Over TCP a write to a stopped peer stays in progress for ever: the lease is the sender's.
- The receiver gets no event when a writer dies: sessions and `send` are its probes.

`UCX_TLS` is left alone: UCX's default leaves posix and sysv shared memory out, which hang for ever
when the peer is killed. On CUDA `UCX_TLS=cuda_ipc,cuda_copy,tcp,self` was fastest on one host.
"""

import contextlib
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.errors import TransportError, TransportUnavailableError
from kvtransfer.nixl_memory import claim, part_of, region, rows, within
from kvtransfer.transport import (
    MessageArrived,
    PeerLost,
    RankTransport,
    TransportEvent,
    WriteDone,
    WriteFailed,
    WriteId,
)

logger = logging.getLogger(__name__)

MODULES = ("nixl_cu13", "nixl_cu12", "nixl")
"""Distributions that carry NIXL, preferred first; each has `_api` and `_bindings`."""

MAX_WINDOW_SLOTS = 1 << 20
"""A peer's claim beyond this is refused before descriptors are made for it."""

_kept_alive: list[object] = []
"""Agents closed with writes in progress, and the memory under them: freeing either would let a
write read or hit memory of others."""


def prepare_environment() -> None:
    """Sets what UCX and NIXL read from the environment, where the operator has not. Call before
    the first `NixlTransport`; torch must be imported first on CUDA."""
    infiniband = Path("/sys/class/infiniband")
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        # with rdma-core's libnl beside another one, processes crash at exit
        os.environ.setdefault("UCX_MODULES", "^ib")
    # Bytes that one look at UCX moves between processes of a host. It has 512 KiB, and between two
    # looks the transfer thread sleeps, which took a fifth of a transfer's time.
    os.environ.setdefault("UCX_CMA_SEG_SIZE", "4m")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")


def _load() -> tuple[Any, Any, tuple[type[Exception], ...]]:
    """NIXL's API module, its bindings, and all that its calls raise (they share no base)."""
    prepare_environment()
    reasons = []
    for name in MODULES:
        try:
            api = import_module(f"{name}._api")
            bindings = import_module(f"{name}._bindings")
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
        else:
            logging.getLogger("nixl").setLevel(logging.WARNING)
            named = [getattr(bindings, n) for n in dir(bindings) if n.endswith("Error")]
            errors = tuple(c for c in named if isinstance(c, type) and issubclass(c, Exception))
            return api, bindings, (RuntimeError, *errors)
    raise TransportUnavailableError(
        "transport nixl is not available: " + "; ".join(reasons) + ". Install nixl-cu13."
    )


def unavailable_reason() -> str:
    """Why NIXL cannot be used in this process; empty where it can."""
    try:
        _load()
    except TransportUnavailableError as error:
        return error.message
    return ""


@dataclass(slots=True)
class _Window:
    """A landing window of a peer."""

    prepared: Any
    """Its descriptors."""
    memory: str
    rows: npt.NDArray[np.uint64]
    """What they were prepared from: memory type and one row a slot."""


@dataclass(slots=True)
class _Peer:
    agent: str
    """The peer's agent name: fresh in each of its lives."""
    windows: dict[int, _Window]
    """First slot -> window; none where the peer only sends."""
    closing: bool = False
    """Gone, but writes to it have not ended."""
    broken: bool = False
    """Its connection has failed; every write to it ends with an exception."""

    @property
    def usable(self) -> bool:
        return not self.closing and not self.broken

    def window_of(
        self, slots: npt.NDArray[np.int64]
    ) -> tuple[_Window, npt.NDArray[np.int32]] | None:
        """The window that holds all of these slots, and their places there."""
        for first, window in self.windows.items():
            places = slots - first
            if within(places, len(window.rows)):
                return window, places.astype(np.int32)
        return None


@dataclass(slots=True)
class _InFlight:
    peer: str
    handle: Any


class NixlTransport(RankTransport):
    """One NIXL agent and the memory that it may touch."""

    name = "nixl"
    polled = True
    loss_ends_writes = False
    writes_parts = True

    def __init__(
        self,
        *,
        instance_id: str,
        pool: torch.Tensor | None,
        landing: torch.Tensor | None,
    ) -> None:
        """`pool`: [pages, page_bytes] uint8, source of writes; `landing`: [slots, page_bytes]
        uint8, what peers may write. Each on one device, contiguous; either may be None.

        Raises TransportUnavailableError where NIXL or its UCX backend is missing, or refuses the
        memory.
        """
        api, bindings, self._errors = _load()
        malformed = (ValueError, KeyError, TypeError, OverflowError)
        self._setup_errors: tuple[type[Exception], ...] = (*malformed, *self._errors)
        self.landing = landing
        self._pool = pool
        self._agent_name = f"{instance_id}-{secrets.token_hex(4)}"
        try:
            config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent = api.nixl_agent(self._agent_name, config)
            self._agent.create_backend("UCX")
            self._registered = [
                self._agent.register_memory(t) for t in (pool, landing) if t is not None
            ]
            self._no_memory = bindings.nixlRegDList(bindings.DRAM_SEG)
            self._source = None
            if pool is not None:
                self._source_region = region(pool)
                self._source = self._prepare("NIXL_INIT_AGENT", *self._source_region)
        except self._setup_errors as error:
            raise TransportUnavailableError(f"transport nixl does not start: {error}") from error
        self._peers: dict[str, _Peer] = {}
        self._names: dict[str, str] = {}
        self._opened: list[torch.Tensor] = []
        """Landing windows after the first: registered, hence alive as long as the agent."""
        self._in_flight: dict[WriteId, _InFlight] = {}
        self._events: deque[TransportEvent] = deque()
        self._next_write = 1
        self.unknown_notifications = 0
        """Messages of agents that are not (or no longer) connected."""

    def _prepare(self, agent: str, memory: str, region: npt.NDArray[np.uint64]) -> Any:
        return self._agent.prep_xfer_dlist(agent, region, memory, backends=["UCX"])

    @property
    def sends(self) -> bool:
        """Whether it has pages to write."""
        return self._pool is not None

    def bind(self, wake: Callable[[], None]) -> None:
        """Nothing wakes: NIXL makes progress, and events, only while it is polled."""

    def local_offer(self) -> bytes:
        header: dict[str, object] = {"agent": self._agent_name}
        if self.landing is not None:
            header["window"] = claim(self.landing)
            descriptors = self._registered[-1]
        else:
            # an empty list: connection data only, so that nobody can reach the pool
            descriptors = self._no_memory
        metadata: bytes = self._agent.get_partial_agent_metadata(
            descriptors, inc_conn_info=True, backends=["UCX"]
        )
        return json.dumps(header).encode() + b"\0" + metadata

    def connect(self, peer: str, offer: bytes, *, offset: int = 0) -> None:
        header, _, metadata = offer.partition(b"\0")
        agent = ""
        try:
            claims = json.loads(header)
            claimed = str(claims["agent"])
            window = claims.get("window")
            found = None if window is None else self._window_region(window, offset)
            if self._revive(peer, claimed):
                return
            loaded = self._agent.add_remote_agent(metadata)
            agent = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
            if agent != claimed or agent in self._names:
                raise ValueError(f"it claims to be {claimed}, its metadata says {agent}")
            windows = {} if found is None else {0: self._window(agent, *found)}
            self._agent.make_connection(agent)
        except self._setup_errors as error:
            if agent and agent not in self._names:
                with contextlib.suppress(*self._errors):
                    self._agent.remove_remote_agent(agent)
            raise TransportError(f"NIXL cannot connect to peer {peer}: {error}") from error
        self._peers[peer] = _Peer(agent, windows)
        self._names[agent] = peer

    def _window(self, agent: str, memory: str, rows: npt.NDArray[np.uint64]) -> _Window:
        return _Window(self._prepare(agent, memory, rows), memory, rows)

    def open_landing(self, first_slot: int, memory: torch.Tensor) -> bytes:
        # The same agent: what would make a stray write harmless is that the old memory is given to
        # nobody, since over cma or tcp it lands there whatever becomes of the agent.
        try:
            registered = self._agent.register_memory(memory)
            metadata: bytes = self._agent.get_partial_agent_metadata(
                registered, inc_conn_info=False, backends=["UCX"]
            )
        except self._setup_errors as error:
            raise TransportError(f"NIXL does not register a landing window: {error}") from error
        self._registered.append(registered)
        self._opened.append(memory)
        header = {"agent": self._agent_name, "window": claim(memory)}
        return json.dumps(header).encode() + b"\0" + metadata

    def connect_landing(self, peer: str, first_slot: int, offer: bytes, *, offset: int = 0) -> None:
        entry = self._peers.get(peer)
        if entry is None or not entry.usable:
            raise TransportError(f"NIXL is not connected to peer {peer}")
        if first_slot in entry.windows:
            return
        header, _, metadata = offer.partition(b"\0")
        try:
            claims = json.loads(header)
            found = self._window_region(claims["window"], offset)
            loaded = self._agent.add_remote_agent(metadata)
            agent = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
            if agent != entry.agent:
                raise ValueError(f"it is of {agent}, not of {entry.agent}")
            entry.windows[first_slot] = self._window(agent, *found)
        except self._setup_errors as error:
            raise TransportError(f"NIXL cannot reach a window of peer {peer}: {error}") from error

    def _revive(self, peer: str, agent: str) -> bool:
        """A peer that is back in the same life, while writes to it still go on, keeps its
        connection: a stopped process that continues, say."""
        entry = self._peers.get(peer)
        if entry is None:
            return False
        if entry.agent != agent or entry.broken:
            raise ValueError("writes to its lost connection have not ended yet")
        entry.closing = False
        return True

    def _window_region(self, window: list[Any], offset: int) -> tuple[str, npt.NDArray[np.uint64]]:
        memory, address, size, device, count = window
        if memory not in ("DRAM", "VRAM") or not 1 <= count <= MAX_WINDOW_SLOTS:
            raise ValueError(f"a window of {count} slots in {memory}")
        address, size, device, count = int(address), int(size), int(device), int(count)
        page_bytes = size if self._pool is None else int(self._pool.shape[1])
        # A page that is larger than a slot reaches into the slots behind it.
        places = (count * size - offset - page_bytes) // size + 1
        if places < 1:
            raise ValueError(f"a page takes {page_bytes} bytes, its window {count * size}")
        return memory, rows(address + offset, size, device, places, length=page_bytes)

    def disconnect(self, peer: str) -> None:
        entry = self._peers.get(peer)
        if entry is None:
            return
        entry.closing = True
        if not any(flight.peer == peer for flight in self._in_flight.values()):
            self._remove(peer, entry)

    def _remove(self, peer: str, entry: _Peer) -> None:
        del self._peers[peer]
        self._names.pop(entry.agent, None)
        self._read_notifications()
        try:
            for window in entry.windows.values():
                window.prepared.release()
            self._agent.remove_remote_agent(entry.agent)
        except self._errors as error:
            logger.debug("removing NIXL peer %s: %s", peer, error)

    def write(
        self,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        entry = self._peers.get(peer)
        if entry is None or not entry.usable or not entry.windows or self._source is None:
            raise TransportError(f"NIXL has no landing window of peer {peer}")
        pages = np.array([page for page, _ in copies], dtype=np.int32)
        slots = np.array([slot for _, slot in copies], dtype=np.int64)
        if self._pool is None or not within(pages, len(self._pool)):
            raise TransportError(f"source pages outside the pool: {pages.tolist()}")
        found = entry.window_of(slots)
        if found is None:
            raise TransportError(f"slots outside the windows of peer {peer}: {slots.tolist()}")
        window, places = found
        if part is not None and not 0 <= part[0] < part[1] <= self._pool.shape[1]:
            raise TransportError(f"bytes {part} of pages of {self._pool.shape[1]} bytes")
        self._read_notifications()
        try:
            if part is None:
                handle = self._agent.make_prepped_xfer(
                    "WRITE", self._source, pages, window.prepared, places, message, backends=["UCX"]
                )
            else:
                handle = self._part_xfer(entry.agent, window, pages, places, part, message)
        except self._errors as error:
            raise TransportError(f"NIXL prepares no write to peer {peer}: {error}") from error
        write_id = WriteId(self._next_write)
        self._next_write += 1
        try:
            status = self._agent.transfer(handle)
        except self._errors as error:
            self._release(handle)
            self._lost(peer, error)
            raise TransportError(f"NIXL cannot write to peer {peer}: {error}") from error
        self._in_flight[write_id] = _InFlight(peer, handle)
        if status != "PROC":
            self._end(write_id, "" if status == "DONE" else f"NIXL reports {status}")
        return write_id

    def _part_xfer(
        self,
        agent: str,
        window: _Window,
        pages: npt.NDArray[np.int32],
        places: npt.NDArray[np.int32],
        part: tuple[int, int],
        message: bytes,
    ) -> Any:
        """Parts are not prepared: a descriptor for each layer of each page of the pool would be
        hundreds of thousands."""
        memory, rows = self._source_region
        local, remote = (
            self._agent.get_xfer_descs(part_of(blocks, part), kind)
            for kind, blocks in ((memory, rows[pages]), (window.memory, window.rows[places]))
        )
        return self._agent.initialize_xfer("WRITE", local, remote, agent, message, backends=["UCX"])

    def send(self, peer: str, message: bytes) -> None:
        entry = self._peers.get(peer)
        if entry is None or not entry.usable:
            raise TransportError(f"NIXL is not connected to peer {peer}")
        self._read_notifications()
        try:
            self._agent.send_notif(entry.agent, message)
        except self._errors as error:
            self._lost(peer, error)
            raise TransportError(f"NIXL cannot reach peer {peer}: {error}") from error

    def poll(self) -> list[TransportEvent]:
        self._read_notifications()
        for write_id, flight in list(self._in_flight.items()):
            try:
                status = self._agent.check_xfer_state(flight.handle)
            except self._errors as error:
                self._lost(flight.peer, error)
                self._end(write_id, f"NIXL: {error}")
            else:
                if status != "PROC":
                    self._end(write_id, "" if status == "DONE" else f"NIXL reports {status}")
        events = list(self._events)
        self._events.clear()
        return events

    def _lost(self, peer: str, error: Exception) -> None:
        entry = self._peers.get(peer)
        if entry is not None and not entry.broken:
            entry.broken = True
            self._events.append(PeerLost(peer, f"NIXL: {error}"))

    def _read_notifications(self) -> None:
        try:
            arrived: dict[str, list[bytes]] = self._agent.get_new_notifs(backends=["UCX"])
        except self._errors as error:
            logger.warning("reading NIXL notifications: %s", error)
            return
        for agent, messages in arrived.items():
            peer = self._names.get(agent)
            if peer is None:
                self.unknown_notifications += len(messages)
                continue
            self._events.extend(MessageArrived(peer, bytes(message)) for message in messages)

    def _end(self, write_id: WriteId, failure: str) -> None:
        """The write is over: DONE, or an exception. Only now may its handle be released."""
        flight = self._in_flight.pop(write_id)
        self._release(flight.handle)
        self._events.append(WriteFailed(write_id, failure) if failure else WriteDone(write_id))
        entry = self._peers.get(flight.peer)
        waiting = any(other.peer == flight.peer for other in self._in_flight.values())
        if entry is not None and entry.closing and not waiting:
            self._remove(flight.peer, entry)

    def _release(self, handle: Any) -> None:
        try:
            handle.release()
        except self._errors as error:
            _kept_alive.append(handle)
            logger.debug("releasing a NIXL handle: %s", error)

    def busy(self) -> bool:
        return bool(self._in_flight)

    def handles(self) -> int:
        windows = sum(len(peer.windows) for peer in list(self._peers.values()))
        return len(self._in_flight) + windows + len(_kept_alive)

    def close(self) -> None:
        self._read_notifications()
        if self._in_flight:
            memory = (self._pool, self.landing, self._opened)
            _kept_alive.append((self._agent, self._in_flight, memory))
            return
        for peer, entry in list(self._peers.items()):
            self._remove(peer, entry)
        try:
            if self._source is not None:
                self._source.release()
            for registered in self._registered:
                self._agent.deregister_memory(registered)
        except self._errors as error:
            logger.debug("closing NIXL: %s", error)

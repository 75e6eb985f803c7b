"""The one thread that drives every transport.

It sleeps until a command, a message or a deadline wakes it; while it sleeps, the thread that has a
command may run it itself (`do_now`). While pages travel it polls the
transports that must be polled, every 20 to 500 µs: a progress thread of NIXL's own
would spin a whole core.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import torch

from kvtransfer import messages
from kvtransfer.errors import TransportError
from kvtransfer.events import KvEvent, PeerAttached, PeerDetached, TransferThreadFailed
from kvtransfer.geometry import WriterPages
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.probe import Prober
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transport import (
    MessageArrived,
    PeerLost,
    Transport,
    TransportEvent,
    WriteDone,
    WriteFailed,
)
from protos.baton.v1 import kv_pb2

logger = logging.getLogger(__name__)

MIN_POLL_S = 20e-6
"""First pause while transfers are alive: a page's time on the wire between two GPUs."""

RECEIVING_POLL_S = 100e-6
"""Longest pause while pages of some transfer come in and only polling shows them."""

MAX_POLL_S = 0.5e-3
"""Longest pause while transfers are alive: what a first page may wait after a lull."""

IDLE_POLL_S = 20e-3
"""Pause while peers are connected and nothing is alive: late messages, the wire's own upkeep."""

ASLEEP_S = 1.0
"""Pause while nothing is alive and every transport wakes the thread itself. Quarantined slots
are asked for at this pace, too."""

STOP_LIMIT_S = 3.0
"""Longest that the end of the process waits for a call into a transport to return."""

TICK_S = 50e-3
"""How often leases are looked at."""


class TransferThread:
    """Commands in, transports and leases by turns, events out."""

    def __init__(
        self,
        *,
        transports: Mapping[str, Transport],
        links: PeerLinks,
        sender: Sender,
        receiver: Receiver,
        prober: Prober,
        emit: Callable[[KvEvent], None],
        clock: Clock,
        device: torch.device | None,
    ) -> None:
        """`device`: where pages lie; on CUDA the thread's own work gets a stream of its own."""
        self.links = links
        self.sender = sender
        self.receiver = receiver
        self.prober = prober
        self._transports = dict(transports)
        self._emit = emit
        self._clock = clock
        self._device = device
        self._commands: deque[Callable[[], object]] = deque()
        self._signal = threading.Event()
        self._turn = threading.Lock()
        """Held by whoever runs commands or looks at transports."""
        self._stopping = False
        self._resting_s = 0.0
        """How long the thread sleeps unless it is woken; known to who has the turn."""
        self._last_tick = clock()
        for transport in self._transports.values():
            here = partial(self._arrived, transport)
            transport.bind(here if transport.any_thread else self._signal.set)
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the thread's end, then closes the transports: for the end of the process, which
        follows at once. A library may be waiting for a peer that never answers (UCX over TCP takes
        leave of each connection, and an address that is gone refuses nothing): then the transports
        stay as they are, and the system takes them with the process."""
        self._stopping = True
        self._signal.set()
        if self._thread.is_alive():
            self._thread.join(STOP_LIMIT_S)
            if self._thread.is_alive():
                logger.warning(
                    "the KV transfer thread is held up in a transport: ending without it"
                )
                return
        for transport in self._transports.values():
            transport.close()

    def do(self, command: Callable[[], object]) -> None:
        """Any thread: runs `command` on this one, in order, soon."""
        self._commands.append(command)
        self._signal.set()

    def do_now(self, command: Callable[[], object]) -> None:
        """Any thread: runs `command` on the calling one where this one sleeps and owes nothing,
        else on this one, in order, soon.

        For what starts a write: waking a thread, and sharing the interpreter with it, takes longer
        than the work. Whatever the command touches it has for itself until it returns.
        """
        if not self._turn.acquire(blocking=False):
            self.do(command)
            return
        try:
            if self._commands or not self._thread.is_alive():
                self._commands.append(command)
            else:
                command()
            too_long = self._pause(self._resting_s) < self._resting_s
        finally:
            self._turn.release()
        if self._commands or too_long:
            self._signal.set()

    def _arrived(self, transport: Transport) -> None:
        """A thread of the transport's own: takes up what it has heard, rather than wake this one,
        which would wake the scheduler's in its turn."""
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self.do_now(partial(self._look_at, transport))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        logger.exception("the KV transfer thread stopped")
        self._emit(TransferThreadFailed(detail=f"{type(error).__name__}: {error}"))

    def wake(self) -> None:
        """Any thread: makes this one look around now."""
        self._signal.set()

    def _run(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            # a stream of its own: digests before sending neither wait for nor delay the model's
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        pause = MIN_POLL_S
        while not self._stopping:
            try:
                with self._turn:
                    worked = self.step()
                    pause = MIN_POLL_S if worked else min(pause * 2, MAX_POLL_S)
                    self._resting_s = self._pause(pause)
            except Exception as error:
                self._fail(error)
                return
            self._signal.wait(self._resting_s)
            self._signal.clear()

    def _pause(self, active_pause: float) -> float:
        alive = bool(self.sender.active or self.receiver.active)
        polled = (t for t in self._transports.values() if t.polled or t.writes_polled)
        if self.sender.checking or any(transport.busy() for transport in polled):
            return MIN_POLL_S
        if self.sender.early.awaiting:
            return active_pause
        if self.links.any_polled:
            if self.receiver.receiving:
                return min(active_pause, RECEIVING_POLL_S)
            return active_pause if alive else IDLE_POLL_S
        return TICK_S if alive else ASLEEP_S

    def step(self) -> bool:
        """One round of commands, transports and leases; whether anything happened."""
        worked = False
        while self._commands:
            self._commands.popleft()()
            worked = True
        for transport in self._transports.values():
            worked |= self._look_at(transport)
        worked |= self.sender.poll()
        if self._clock() - self._last_tick >= TICK_S:
            self._last_tick = self._clock()
            self.sender.tick()
            self.receiver.tick()
            self.prober.tick()
        return worked

    def look(self) -> None:
        """For commands: takes up what transports know that any thread may ask."""
        for transport in self._transports.values():
            if transport.writes_behind:
                self._look_at(transport)

    def _look_at(self, transport: Transport) -> bool:
        events = transport.poll()
        for event in events:
            self._dispatch(transport, event)
        return bool(events)

    def _dispatch(self, transport: Transport, event: TransportEvent) -> None:
        match event:
            case MessageArrived(peer, data):
                if self.links.get(peer) is transport:
                    self.on_message(peer, data)
                else:
                    self.links.dropped["unknown_peer"] += 1
            case WriteDone(write_id):
                self.sender.on_write_done(transport.name, write_id)
            case WriteFailed(write_id, reason):
                self.sender.on_write_failed(transport.name, write_id, reason)
            case PeerLost(peer, reason):
                if self.links.get(peer) is transport:
                    self.detach(peer, reason, proven_dead=False)
                    self._emit(PeerDetached(peer=peer, reason=reason))

    def on_message(self, peer: str, data: bytes) -> None:
        try:
            message = kv_pb2.KvMessage.FromString(data)
        except Exception:  # protobuf's DecodeError has no public base that is stable
            self.links.dropped["malformed"] += 1
            return
        kind = message.WhichOneof("kind")
        if kind == "window":
            self._connect_window(peer, message.window)
        elif kind == "window_ready":
            self.receiver.on_window_ready(peer, message.window_ready)
        elif kind in ("written", "complete") or (kind == "failed" and message.failed.from_writer):
            self.receiver.on_message(peer, message)
        elif kind in ("credit", "ack", "failed"):
            self.sender.on_message(peer, message)
        elif kind in ("probe", "probe_granted"):
            self.prober.on_message(peer, message)
        else:
            self.links.dropped["malformed"] += 1

    def _connect_window(self, peer: str, window: kv_pb2.WindowOpened) -> None:
        transport = self.links.get(peer)
        if transport is None:
            return
        try:
            transport.connect_landing(peer, window.first_slot, window.offer)
        except TransportError as error:
            logger.error("the new landing window of %s cannot be written: %s", peer, error.message)
            return
        self.links.send(peer, messages.window_ready(window.first_slot))

    def attach(self, peer: str, name: str, offer: bytes, pages: WriterPages | None = None) -> None:
        """`pages`: what the peer writes; None where it writes nothing here."""
        problem = "" if pages is None else self.receiver.unfit(pages)
        if problem:
            self._emit(PeerAttached(peer=peer, ok=False, reason=problem))
            return
        transport = self._transports.get(name)
        if transport is None:
            reason = f"transport {name} is not available here"
            self._emit(PeerAttached(peer=peer, ok=False, reason=reason))
            return
        if self.links.get(peer) is not None:
            self.detach(peer, "a new session of the same instance", proven_dead=False)
        try:
            began = time.monotonic()
            transport.connect(peer, offer)
            self.links.connect_s[peer] = time.monotonic() - began
        except TransportError as error:
            self._emit(PeerAttached(peer=peer, ok=False, reason=error.message))
            return
        self.links.attach(peer, transport, pages)
        self.receiver.on_attached(peer)
        self._emit(PeerAttached(peer=peer, ok=True, reason=""))

    def detach(self, peer: str, reason: str, *, proven_dead: bool) -> None:
        transport = self.links.detach(peer)
        writes_ended = proven_dead or (transport is not None and transport.loss_ends_writes)
        if transport is not None:
            transport.disconnect(peer)
        self.sender.on_peer_gone(peer, reason, proven_dead=proven_dead)
        self.receiver.on_peer_gone(peer, reason, writes_ended=writes_ended)

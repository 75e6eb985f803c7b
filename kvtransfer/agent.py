"""The transfer agent: what a role holds.

The scheduler's thread calls the methods below; each only appends to a queue (or, for `grant`,
touches the window's books) and returns. The transfer thread does the work, and its events go back
through a queue that the scheduler empties once a step: the scheduler never waits for I/O. A write
over a transport that any thread may use begins at once, while the transfer thread sleeps.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvtransfer.cuda_memory import device_name
from kvtransfer.errors import DuplicateTransferError
from kvtransfer.events import (
    KvEvent,
    PagesComing,
    PagesLanded,
    PeerAttached,
    SourceReleased,
    TransferCompleted,
    TransferFailedEvent,
    WriterFinished,
    joined_landings,
)
from kvtransfer.geometry import KvGeometry, RankPlace, WriterPages
from kvtransfer.host import pid_namespace
from kvtransfer.layout import PageLayout
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.pool_sealer import Sealer
from kvtransfer.probe import ProbeDone, Prober
from kvtransfer.quarantine import Quarantine
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.states import TransferFailure
from kvtransfer.tally import TransferTally, TransportTally
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.trace import Trace, no_trace
from kvtransfer.transfer_thread import TransferThread
from kvtransfer.transport import Transport
from kvtransfer.window import LandingWindow, SlotCounts
from kvtransfer.windows import LandingWindows, MakeMemory, QuarantinePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransferStats:
    """A moment's figures, for metrics and the workers' list."""

    sending: int
    receiving: int
    bytes_sent: int
    bytes_received: int
    early_layers_sent: int
    """Layers of pages that left before their page was whole."""
    failures: Mapping[str, int]
    """Failed transfers by cause."""
    dropped: Mapping[str, int]
    """Messages that were late, repeated or not allowed, by cause."""
    slots: SlotCounts
    window_replacements: int
    """Landing windows that took the place of one which silent writers kept."""
    held_source_pages: int
    peers: int
    handles: int
    """What the transports have open at their libraries."""
    by_transport: Mapping[str, TransportTally]
    """Bytes, durations and failures since the start."""


@dataclass(slots=True)
class _Held:
    """What a transfer that goes out owns."""

    at_once: bool
    """Whether any thread may start its writes."""
    behind: bool
    """Whether they may be queued behind a step."""
    early: bool
    """Whether layers may leave before their page is whole."""
    pages: list[int] = field(default_factory=list)

    def add(self, pages: Sequence[int]) -> None:
        known = set(self.pages)
        self.pages.extend(page for page in pages if page not in known)


class TransferAgent:
    """Everything that moves KV of one engine process. All methods but those marked otherwise are
    called by the scheduler's thread."""

    def __init__(
        self,
        *,
        instance_id: str,
        layout: PageLayout,
        transports: Mapping[str, Transport],
        pool: torch.Tensor | None,
        window: LandingWindow | None,
        verify: bool = True,
        lease_s: float = 4.0,
        wake: Callable[[], None] | None = None,
        clock: Clock = time.monotonic,
        more_windows: MakeMemory | None = None,
        policy: QuarantinePolicy | None = None,
        quarantine: type[Quarantine] = Quarantine,
        place: RankPlace | None = None,
        sealer: Sealer | None = None,
        trace: Trace = no_trace,
        facts: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """`pool`: [pages, page_bytes] uint8, the source of outgoing pages (None: only receives);
        `window`: where incoming ones land (None: only sends), `more_windows` what may replace it.
        `wake` is called from the transfer thread when events wait, so that an idle scheduler looks
        at them. `quarantine` is a seam: tests show what happens without one. `place` and `sealer`:
        None where this process is the only rank. `facts`: lines about where this side's devices
        sit, for whoever measures the way here."""
        self._place = place or RankPlace(layout=layout, kv_heads=layout.kv_heads)
        self._window = window
        self._links = links = PeerLinks()
        self._wake_scheduler = wake
        self._events: deque[KvEvent] = deque()
        sender = Sender(
            instance_id=instance_id,
            layout=layout,
            pool=pool,
            links=links,
            emit=self._emit,
            clock=clock,
            verify=verify,
            sealer=sealer,
            trace=trace,
        )
        policy = policy or QuarantinePolicy()
        self._windows: LandingWindows | None = None
        if window is not None:
            self._windows = LandingWindows(
                window,
                links=links,
                transports=transports,
                policy=policy,
                make_memory=more_windows,
            )
        self._receiver = Receiver(
            instance_id=instance_id,
            layout=layout,
            windows=self._windows,
            quarantine=quarantine(links=links, clock=clock, lease_s=lease_s, policy=policy),
            links=links,
            emit=self._emit,
            clock=clock,
            lease_s=lease_s,
            trace=trace,
        )
        self._transports = dict(transports)
        self._offers = {name: transport.local_offer() for name, transport in transports.items()}
        memory = pool if pool is not None or window is None else window.memory
        self._prober = Prober(
            layout=layout,
            num_pages=0 if pool is None else int(pool.shape[0]),
            device=device_name(memory.device if memory is not None else torch.device("cpu")),
            host=pid_namespace(),
            facts=facts,
            links=links,
            sender=sender,
            receiver=self._receiver,
            clock=clock,
        )
        self.thread = TransferThread(
            transports=transports,
            links=links,
            sender=sender,
            receiver=self._receiver,
            prober=self._prober,
            emit=self._emit,
            clock=clock,
            device=memory.device if memory is not None else None,
        )
        self._failures: Counter[str] = Counter()
        self._tally = TransferTally(page_bytes=layout.page_bytes, clock=clock)
        self._held: dict[str, _Held] = {}
        self._receiving: dict[str, int] = {}
        """Request -> ticket of incoming transfers, as the role knows them."""

    # ---- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the transfer thread."""
        self.thread.start()

    def close(self) -> None:
        """Stops the thread and closes the transports. Unfinished transfers get no events: settle
        them first (drain)."""
        self.thread.stop()

    def local_offers(self) -> dict[str, bytes]:
        """What peers need to connect here, by transport, in the given order."""
        return dict(self._offers)

    # ---- peers ----------------------------------------------------------------------------------

    def peer_connected(
        self, peer: str, transport: str, offer: bytes, geometry: KvGeometry | None = None
    ) -> None:
        """The fronts have agreed on `transport`; answered by PeerAttached. `geometry`: how the
        peer cuts KV; None: as this worker does."""
        pages = None
        if self._window is not None:
            place = self._place
            theirs = geometry or KvGeometry(page_size=place.layout.page_size, tp_size=place.tp_size)
            try:
                pages = place.writer_pages(theirs, slot_bytes=int(self._window.memory.shape[1]))
            except ValueError as error:
                self._emit(PeerAttached(peer=peer, ok=False, reason=str(error)))
                return
        self.thread.do(lambda: self.thread.attach(peer, transport, offer, pages))

    def peer_gone(self, peer: str, reason: str, *, proven_dead: bool) -> None:
        """The session has ended, or fell silent. May be called again once death is proven (the
        process has exited): that frees what was kept for a silent peer."""
        self.thread.do(lambda: self.thread.detach(peer, reason, proven_dead=proven_dead))

    def probe(self, peer: str, num_bytes: int, rounds: int, done: ProbeDone) -> None:
        """Measures the way to a peer that this worker writes to, beside its work; `done` is called
        once, on the transfer thread."""
        self.thread.do(lambda: self._prober.start(peer, num_bytes, rounds, done))

    # ---- prefill --------------------------------------------------------------------------------

    def open(self, ticket: Ticket) -> None:
        """Call when the ticket arrives. Raises DuplicateTransferError while an earlier transfer of
        the request still holds source pages."""
        if ticket.request_id in self._held:
            raise DuplicateTransferError(f"request {ticket.request_id} is being sent already")
        transport = self._transports.get(ticket.transport)
        self._held[ticket.request_id] = _Held(
            at_once=transport is not None and transport.any_thread,
            behind=transport is not None and transport.writes_behind,
            early=transport is not None and (transport.writes_behind or transport.writes_parts),
        )
        self._tally.begin(ticket.request_id, ticket.transport)
        self.thread.do(lambda: self.thread.sender.open(ticket))

    def announce_coming(self, request_id: str) -> None:
        """The step that computes the last of the request's pages is on its way."""
        held = self._held.get(request_id)
        if held is not None:
            self._start(held, lambda: self.thread.sender.announce_coming(request_id))

    def push(
        self, request_id: str, pages: Sequence[SourcePage], *, first_token: int | None = None
    ) -> None:
        """Hands over pages whose KV is final; the step that computed them must have ended. They
        are held until SourceReleased, or TransferFailedEvent with `quiesced`. Pages pushed after
        that are ignored, and not held. `first_token`: they are the last, as `complete` says."""
        held = self._held.get(request_id)
        if held is None:
            return
        held.add([page.page for page in pages])
        self._tally.moved(request_id, len(pages))
        copy = list(pages)

        def push() -> None:
            if held.behind:
                self.thread.look()  # what was queued behind the step has landed, as a rule
            self.thread.sender.push(request_id, copy, first_token)

        self._start(held, push)

    def push_layers(self, request_id: str, pages: Sequence[tuple[int, int]], layers: range) -> None:
        """Hands over `layers` of (position, page) whose other layers are still to be computed; the
        part of the step that computed them must have ended. `push` follows with the whole pages.
        They are held from now on, as in `push`. See `EarlyLayers.push`."""
        held = self._held.get(request_id)
        if held is None:
            return
        held.add([page for _, page in pages])
        copy = list(pages)
        self._start(held, lambda: self.thread.sender.early.push(request_id, copy, layers))

    def push_behind(
        self,
        request_id: str,
        pages: Sequence[tuple[int, int]],
        layers: range,
        passed: torch.cuda.Event | None,
    ) -> None:
        """As `push_layers`, of layers that the device is still to compute: they are final when it
        has passed the event, and leave then. See `EarlyLayers.push_behind`."""
        held = self._held.get(request_id)
        if held is None or not held.early:
            return
        held.add([page for _, page in pages])
        copy = list(pages)
        early = self.thread.sender.early
        self._start(held, lambda: early.push_behind(request_id, copy, layers, passed))

    def _start(self, held: _Held, command: Callable[[], None]) -> None:
        """Runs what may start a write of a request: on this thread where its transport lets it."""
        if held.at_once:
            self.thread.do_now(command)
        else:
            self.thread.do(command)

    def complete(self, request_id: str, first_token: int) -> None:
        """All pages were pushed, and this is the first token."""
        held = self._held.get(request_id)
        if held is not None:
            self._start(held, lambda: self.thread.sender.complete(request_id, first_token))

    def abort(self, request_id: str, failure: TransferFailure, detail: str) -> None:
        """Gives an outgoing transfer up; TransferFailedEvent follows as for any failure."""
        self.thread.do(lambda: self.thread.sender.abort(request_id, failure, detail))

    def held_pages(self) -> dict[str, list[int]]:
        """Source pages that transfers own, by request: never free, evict or rewrite them."""
        return {request: list(held.pages) for request, held in self._held.items()}

    # ---- decode ---------------------------------------------------------------------------------

    def pages_of(self, writer: str) -> WriterPages:
        """What this peer's pages are, in which `grant` and landed pages count. Raises
        UnknownPeerError where it is not connected."""
        return self._links.pages_of(writer)

    def grant(
        self,
        *,
        request_id: str,
        writer: str,
        total_pages: int,
        total_tokens: int,
        prefix_len: int,
        token_hash: bytes,
        chain_hashes: Sequence[bytes] = (),
    ) -> Ticket:
        """See `Receiver.grant`; answers at once."""
        if request_id in self._receiving:
            raise DuplicateTransferError(f"request {request_id} is being received already")
        ticket = self._receiver.grant(
            request_id=request_id,
            writer=writer,
            total_pages=total_pages,
            total_tokens=total_tokens,
            prefix_len=prefix_len,
            token_hash=token_hash,
            chain_hashes=chain_hashes,
        )
        self._receiving[request_id] = ticket.ticket_id
        self._tally.begin(request_id, ticket.transport)
        self.thread.wake()
        return ticket

    def accept(self, request_id: str, positions: Sequence[int]) -> None:
        """Landed pages were copied, verified and published."""
        ticket_id = self._receiving.get(request_id)
        if ticket_id is not None:
            self._tally.moved(request_id, len(positions))
            copy = list(positions)
            self.thread.do(lambda: self._receiver.accept(ticket_id, copy))

    def reject(self, request_id: str, detail: str) -> None:
        """A landed page does not match its seal: fails on both sides; no event follows here."""
        ticket_id = self._receiving.pop(request_id, None)
        if ticket_id is not None:
            self._count(request_id, TransferFailure.MISMATCH, detail)
            self._tally.fail(request_id, TransferFailure.MISMATCH)
            self.thread.do(lambda: self._receiver.reject(ticket_id, detail))

    def release(
        self,
        request_id: str,
        failure: TransferFailure = TransferFailure.ABORTED,
        detail: str = "the request was withdrawn",
    ) -> None:
        """Withdraws an incoming transfer; no event follows."""
        ticket_id = self._receiving.pop(request_id, None)
        if ticket_id is not None:
            self._tally.fail(request_id, failure)
            self.thread.do(lambda: self._receiver.release(ticket_id, failure, detail))

    # ---- events and figures ---------------------------------------------------------------------

    def poll_events(self) -> list[KvEvent]:
        """What happened since the last call; never waits. Ownership changes hands here: what is
        held is held until its event was returned. Events of a withdrawn or rejected incoming
        transfer are left out, and pages of one that landed one after another are one event: they
        are copied and checked at once."""
        events: list[KvEvent] = []
        while self._events:
            event = self._events.popleft()
            if not self._settle(event):
                continue
            joined = joined_landings(events[-1], event) if events else None
            if joined is None:
                events.append(event)
            else:
                events[-1] = joined
        return events

    def _settle(self, event: KvEvent) -> bool:
        match event:
            case SourceReleased():
                self._held.pop(event.request_id, None)
                self._tally.complete(event.request_id)
            case TransferFailedEvent():
                received = self._receiving.get(event.request_id) == event.ticket_id
                if received:
                    del self._receiving[event.request_id]
                elif event.request_id not in self._held:
                    return False
                elif event.quiesced:
                    del self._held[event.request_id]
                self._tally.fail(event.request_id, event.failure)
                if event.quiesced:
                    self._count(event.request_id, event.failure, event.detail)
            case PagesLanded() | PagesComing() | WriterFinished():
                return self._receiving.get(event.request_id) == event.ticket_id
            case TransferCompleted():
                if self._receiving.get(event.request_id) != event.ticket_id:
                    return False
                del self._receiving[event.request_id]
                self._tally.complete(event.request_id)
        return True

    def _count(self, request_id: str, failure: TransferFailure, detail: str) -> None:
        self._failures[failure.name.lower()] += 1
        if failure is TransferFailure.MISMATCH:
            # Somebody's memory, or a way between, does not keep what it was given.
            logger.error("KV of request %s is not what was sealed: %s", request_id, detail)

    def stats(self) -> TransferStats:
        """Any thread, for reading only."""
        none = SlotCounts(0, 0, 0, 0)
        return TransferStats(
            sending=self.thread.sender.active,
            receiving=self._receiver.active,
            bytes_sent=self.thread.sender.bytes_sent,
            early_layers_sent=self.thread.sender.early.sent,
            bytes_received=self._receiver.bytes_received,
            failures=dict(self._failures),
            dropped=dict(self.thread.links.dropped),
            slots=self._windows.counts() if self._windows is not None else none,
            window_replacements=self._windows.replacements if self._windows is not None else 0,
            held_source_pages=len({p for held in list(self._held.values()) for p in held.pages}),
            peers=len(self.thread.links.peers()),
            handles=sum(transport.handles() for transport in self._transports.values()),
            by_transport=self._tally.by_transport,
        )

    def _emit(self, event: KvEvent) -> None:
        if self._prober.on_event(event):
            return
        self._events.append(event)
        if self._wake_scheduler is not None:
            self._wake_scheduler()

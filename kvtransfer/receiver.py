"""Decode's side of the handover: grants tickets, checks what peers report, and passes landed
pages to the role, which alone copies them into the pool and believes them.

Nothing that a peer says is trusted: a message must name the ticket, its epoch, its request and come
from its writer, and a page must lie in a slot of the ticket, at an expected position, with the
expected number of tokens. What is late or repeated is dropped and counted; what cannot be right
fails the transfer with a typed reason.

`grant` may be called from the scheduler's thread; everything else runs on the transfer thread.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

import torch

from kvtransfer import messages
from kvtransfer.errors import DuplicateTransferError, UnknownPeerError
from kvtransfer.events import (
    KvEvent,
    PagesComing,
    PagesLanded,
    TransferCompleted,
    TransferFailedEvent,
    WriterFinished,
)
from kvtransfer.geometry import WriterPages
from kvtransfer.incoming import Incoming
from kvtransfer.layout import PageLayout
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.outgoing import beat_s
from kvtransfer.quarantine import Quarantine
from kvtransfer.states import TransferFailure, TransferState, Trigger, advance
from kvtransfer.ticket import LandedPage, Ticket
from kvtransfer.trace import HEARD, Trace, no_trace
from kvtransfer.windows import LandingWindows
from protos.baton.v1 import kv_pb2

MAX_TOMBSTONES = 8_192
"""Completed tickets remembered, so that a lost acknowledgement can be sent again."""


class Receiver:
    """All incoming transfers of a worker."""

    def __init__(
        self,
        *,
        instance_id: str,
        layout: PageLayout,
        windows: LandingWindows | None,
        quarantine: Quarantine,
        links: PeerLinks,
        emit: Callable[[KvEvent], None],
        clock: Clock,
        lease_s: float,
        max_slots_per_ticket: int = 0,
        trace: Trace = no_trace,
    ) -> None:
        """`windows` None: the worker only sends. `max_slots_per_ticket` 0: a quarter of a window,
        so that one long prompt streams through a few slots and leaves room for others."""
        self._instance_id = instance_id
        self._layout = layout
        self._windows = windows
        self._quarantine = quarantine
        self._links = links
        self._emit = emit
        self._clock = clock
        self._lease_s = lease_s
        self._trace = trace
        slots = windows.current.slots if windows is not None else 0
        self._max_slots = max_slots_per_ticket or max(1, slots // 4)
        self._lock = threading.Lock()
        self._granted: deque[Incoming] = deque()
        self._live_ids: set[str] = set()
        self._next_ticket = 1
        self._by_ticket: dict[int, Incoming] = {}
        self._acknowledged: OrderedDict[int, Incoming] = OrderedDict()
        self.bytes_received = 0

    @property
    def active(self) -> int:
        """Transfers that are neither complete nor failed."""
        return len(self._live_ids)

    @property
    def free_slots(self) -> int:
        return self._windows.current.counts().free if self._windows is not None else 0

    def most_pages(self, pages: WriterPages) -> int:
        """Of a writer's pages, as many as one ticket may have in flight."""
        return max(1, self._max_slots // pages.slots)

    @property
    def receiving(self) -> bool:
        """Whether pages of some transfer have come and others are to come; transfer thread."""
        return any(e.state is TransferState.RECEIVING for e in self._by_ticket.values())

    def unfit(self, pages: WriterPages) -> str:
        """Why a peer that writes such pages cannot be served; empty where it can."""
        if self._windows is not None and pages.slots > self._windows.current.slots:
            return (
                f"a page of its {pages.page_size} tokens takes {pages.slots} landing slots, and "
                f"there are {self._windows.current.slots} (--landing-slots)"
            )
        return ""

    # ---- commands of the role -------------------------------------------------------------------

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
        """Promises landing slots for the pages of a request, counted over its whole sequence.

        Pages are the writer's (`PeerLinks.pages_of`), except that `prefix_len` tokens are here
        already in whole pages of ours; `chain_hashes`, where given, has one entry for each page
        that holds a token after them. No I/O; any thread. Raises NoSlotsError (wait or refuse),
        UnknownPeerError (writer not connected), DuplicateTransferError, ValueError.
        """
        transport = self._links.require(writer)
        if self._windows is None:
            raise UnknownPeerError("this worker has no landing window: it does not receive KV")
        self._quarantine.check_writer(writer)
        window = self._windows.for_writer(writer)
        pages = self._links.pages_of(writer)
        first = self._first_position(pages, total_pages, total_tokens, prefix_len, chain_hashes)
        most = self.most_pages(pages)
        with self._lock:
            if request_id in self._live_ids:
                raise DuplicateTransferError(f"request {request_id} is being received already")
            ticket_id = self._next_ticket
            slots, epoch = window.grant(min(total_pages - first, most), ticket_id, run=pages.slots)
            self._next_ticket += 1
            self._live_ids.add(request_id)
        ticket = Ticket(
            ticket_id=ticket_id,
            instance_id=self._instance_id,
            epoch=epoch,
            request_id=request_id,
            writer_instance=writer,
            slots=slots,
            lease_s=self._lease_s,
            decode_prefix_len=prefix_len,
            total_tokens=total_tokens,
            token_hash=token_hash,
            transport=transport.name,
        )
        now = self._clock()
        self._granted.append(
            Incoming(
                ticket,
                window,
                pages,
                first,
                total_pages,
                tuple(chain_hashes),
                last_message=now,
                last_sent=now,
                credited=set(slots),
            )
        )
        return ticket

    def _first_position(
        self,
        pages: WriterPages,
        total_pages: int,
        total_tokens: int,
        prefix_len: int,
        chain_hashes: Sequence[bytes],
    ) -> int:
        page_size = self._layout.page_size
        if prefix_len % page_size or not 0 <= prefix_len <= total_tokens:
            raise ValueError(f"prefix of {prefix_len} tokens: not whole pages of {page_size}")
        if total_pages != pages.pages_of(total_tokens):
            raise ValueError(
                f"{total_tokens} tokens are not {total_pages} pages of {pages.page_size}"
            )
        first = pages.first_position(prefix_len)
        if chain_hashes and len(chain_hashes) != total_pages - first:
            raise ValueError(f"{len(chain_hashes)} chain hashes for {total_pages - first} pages")
        return first

    def accept(self, ticket_id: int, positions: Sequence[int]) -> None:
        """Pages at `positions` were copied, verified and published: their slots may be written
        again. Ignored for a transfer that ended meanwhile."""
        self._adopt()
        entry = self._by_ticket.get(ticket_id)
        if entry is None:
            return
        freed: set[int] = set()
        for position in positions:
            slot = entry.landed.pop(position, None)
            if slot is None:
                self._links.dropped["unknown_accept"] += 1
                continue
            freed.add(slot)
            entry.accepted.add(position)
        self.bytes_received += len(freed) * entry.pages.page_bytes
        self._recycle(entry, freed)
        self._finish(entry)

    def reject(self, ticket_id: int, detail: str) -> None:
        """A landed page does not match its seal. Fails the transfer on both sides; no event."""
        self._withdraw(ticket_id, TransferFailure.MISMATCH, detail)

    def release(
        self,
        ticket_id: int,
        failure: TransferFailure = TransferFailure.ABORTED,
        detail: str = "the request was withdrawn",
    ) -> None:
        """Withdraws the ticket; no event follows. Its slots stay in quarantine until the writer
        has said that it writes no more, or is known to be dead. Ended requests are ignored."""
        self._withdraw(ticket_id, failure, detail)

    def _withdraw(self, ticket_id: int, failure: TransferFailure, detail: str) -> None:
        self._adopt()
        entry = self._by_ticket.get(ticket_id)
        if entry is not None:
            self._fail(entry, failure, detail, emit=False)

    # ---- inputs of the transports ---------------------------------------------------------------

    def on_message(self, peer: str, message: kv_pb2.KvMessage) -> None:
        """A message of a writer: pages, completion or failure."""
        self._adopt()
        kind = message.WhichOneof("kind")
        entry = self._by_ticket.get(message.ticket_id)
        if entry is None:
            self._on_ended(peer, message, kind)
        elif not entry.is_from_writer(peer, message):
            self._links.dropped["wrong_ticket"] += 1
        else:
            entry.last_message = self._clock()
            if kind == "written":
                self._on_written(entry, message.written)
                if message.written.HasField("complete") and entry.state != TransferState.FAILED:
                    self._on_complete(entry, message.written.complete)
            elif kind == "complete":
                self._on_complete(entry, message.complete)
            elif kind == "failed":
                self._on_writer_failed(entry, message.failed)

    def _on_ended(self, peer: str, message: kv_pb2.KvMessage, kind: str | None) -> None:
        done = self._acknowledged.get(message.ticket_id)
        if done is not None and done.is_from_writer(peer, message) and kind == "complete":
            self._acknowledge(done)
        elif kind == "failed" and message.failed.quiesced:
            self._quarantine.lift(peer, message)
        else:
            self._links.dropped["unknown_ticket"] += 1

    def _is_short(self, entry: Incoming, pages: int) -> bool:
        """Fails a transfer whose writer has counted more pages than were announced for as long as a
        heartbeat: writes end with their announcement in place, so one of them got lost."""
        if entry.lacks(pages, self._clock(), beat_s(self._lease_s) / 2):
            self._fail(entry, TransferFailure.TRANSPORT, "an announcement of pages got lost")
            return True
        return False

    def _on_written(self, entry: Incoming, written: kv_pb2.PagesWritten) -> None:
        try:
            pages = messages.landed(written)
        except ValueError as error:
            self._fail(entry, TransferFailure.MISMATCH, f"an announcement of pages: {error}")
            return
        if not pages:
            if not self._is_short(entry, written.pages_written) and written.coming:
                ticket = entry.ticket
                self._emit(PagesComing(request_id=ticket.request_id, ticket_id=ticket.ticket_id))
            return
        fresh: list[LandedPage] = []
        first_slot = entry.window.first_slot
        for page in pages:
            if page.position in entry.landed or page.position in entry.accepted:
                self._links.dropped["duplicate_page"] += 1
                continue
            problem = self._page_problem(entry, page)
            if problem is not None:
                self._fail(entry, TransferFailure.MISMATCH, problem)
                return
            entry.credited.discard(page.slot)
            entry.landed[page.position] = page.slot
            fresh.append(page._replace(slot=page.slot - first_slot) if first_slot else page)
        state = advance(entry.state, Trigger.PAGES)
        if fresh and state is not None:
            entry.state = state
            self._trace(entry.ticket.request_id, HEARD)
            self._emit(
                PagesLanded(
                    request_id=entry.ticket.request_id,
                    ticket_id=entry.ticket.ticket_id,
                    window=self._memory(entry),
                    pages=tuple(fresh),
                    first_slot=first_slot,
                )
            )

    def _memory(self, entry: Incoming) -> torch.Tensor:
        transport = self._links.get(entry.ticket.writer_instance)
        first_slot = entry.window.first_slot
        landing = transport.landing_of(first_slot) if transport is not None else None
        return entry.window.memory if landing is None else landing

    def _page_problem(self, entry: Incoming, page: LandedPage) -> str | None:
        position = page.position
        if not entry.first_position <= position < entry.total_pages:
            return f"page at position {position} was not asked for"
        if page.slot not in entry.credited:
            return f"page at position {position} lies in slot {page.slot}, which was not granted"
        if page.valid_tokens != entry.pages.valid_tokens(position, entry.ticket.total_tokens):
            return f"page at position {position} claims {page.valid_tokens} valid tokens"
        chain_hashes = entry.chain_hashes
        if chain_hashes and page.chain_hash != chain_hashes[position - entry.first_position]:
            return f"page at position {position} belongs to other tokens"
        return None

    def _on_complete(self, entry: Incoming, complete: kv_pb2.TransferComplete) -> None:
        if complete.total_pages != entry.travelling_pages:
            self._fail(
                entry,
                TransferFailure.MISMATCH,
                f"{complete.total_pages} pages were sent, {entry.travelling_pages} were asked for",
            )
        elif self._is_short(entry, complete.total_pages):
            return
        elif entry.first_token is None:
            entry.first_token = complete.first_token
            self._emit(
                WriterFinished(
                    request_id=entry.ticket.request_id,
                    ticket_id=entry.ticket.ticket_id,
                    first_token=entry.first_token,
                )
            )
            self._finish(entry)
        elif entry.first_token != complete.first_token:
            self._fail(entry, TransferFailure.MISMATCH, "two different first tokens were reported")

    def _on_writer_failed(self, entry: Incoming, failed: kv_pb2.TransferFailed) -> None:
        failure = TransferFailure.from_wire(failed.failure)
        self._fail(entry, failure, failed.detail, quiesced=failed.quiesced)

    def on_attached(self, peer: str) -> None:
        """The writer is reachable, again or for the first time."""
        self._quarantine.ask(peer)
        if self._windows is not None:
            self._windows.announce(peer)

    def on_window_ready(self, peer: str, ready: kv_pb2.WindowReady) -> None:
        if self._windows is not None:
            self._windows.on_ready(peer, ready.first_slot)

    def on_peer_gone(self, peer: str, reason: str, *, writes_ended: bool) -> None:
        """The writer is unreachable. `writes_ended`: nothing of it can land any more, because its
        process has exited or because the transport says so; else its slots stay in quarantine."""
        self._adopt()
        for entry in [e for e in self._by_ticket.values() if e.ticket.writer_instance == peer]:
            self._fail(entry, TransferFailure.TRANSPORT, reason, quiesced=writes_ended)
        if writes_ended:
            self._quarantine.lift_all(peer)
        if self._windows is not None:
            self._windows.forget(peer)

    def tick(self) -> None:
        """Heartbeats, and the end of tickets that have none; call it several times a lease."""
        self._adopt()
        now = self._clock()
        for entry in list(self._by_ticket.values()):
            writer = entry.ticket.writer_instance
            if self._links.get(writer) is None:
                self._fail(entry, TransferFailure.TRANSPORT, f"prefill instance {writer} is gone")
            elif now - entry.last_message > entry.ticket.lease_s:
                detail = f"nothing from prefill for {entry.ticket.lease_s:g} s"
                self._fail(entry, TransferFailure.EXPIRED, detail)
            elif now - entry.last_sent >= beat_s(entry.ticket.lease_s):
                self._credit(entry, ())
        self._quarantine.ask_again()
        if self._windows is not None:
            self._windows.check(self._quarantine.silent_slots())

    # ---- the machine ----------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Takes over what `grant` promised since the last call."""
        while self._granted:
            entry = self._granted.popleft()
            self._by_ticket[entry.ticket.ticket_id] = entry

    def _recycle(self, entry: Incoming, freed: set[int]) -> None:
        """Credits freed slots, and more where the window has room, while pages are to come."""
        ticket_id = entry.ticket.ticket_id
        run = entry.pages.slots
        most = max(1, self._max_slots // run)
        need = max(0, min(most, entry.unreported_pages) - len(entry.credited))
        again = set(sorted(freed)[:need])
        entry.window.release(freed - again, ticket_id)
        fresh = set(entry.window.top_up(need - len(again), ticket_id, run=run)) | again
        if fresh:
            entry.credited |= fresh
            entry.credit_total += len(fresh)
            self._credit(entry, sorted(fresh))

    def _credit(self, entry: Incoming, slots: Sequence[int]) -> None:
        entry.last_sent = self._clock()
        message = messages.credit(entry.ticket, slots, total=entry.credit_total)
        self._links.send(entry.ticket.writer_instance, message)

    def _finish(self, entry: Incoming) -> None:
        if not entry.finished:
            return
        state = advance(entry.state, Trigger.ALL_ACCEPTED)
        if state is None:
            return
        entry.state = state
        # Complete says that nothing is written any more: unused credits return at once
        entry.window.release(entry.slots, entry.ticket.ticket_id)
        entry.credited.clear()
        transport = self._links.get(entry.ticket.writer_instance)
        name = transport.name if transport is not None else entry.ticket.transport
        self._acknowledged[entry.ticket.ticket_id] = entry
        while len(self._acknowledged) > MAX_TOMBSTONES:
            self._acknowledged.popitem(last=False)
        self._acknowledge(entry)
        self._forget(entry)
        self._emit(
            TransferCompleted(
                request_id=entry.ticket.request_id,
                ticket_id=entry.ticket.ticket_id,
                first_token=entry.first_token or 0,
                total_bytes=len(entry.accepted) * entry.pages.page_bytes,
                transport=name,
            )
        )

    def _acknowledge(self, entry: Incoming) -> None:
        message = messages.acknowledgement(entry.ticket, entry.travelling_pages)
        self._links.send(entry.ticket.writer_instance, message)

    def _fail(
        self,
        entry: Incoming,
        failure: TransferFailure,
        detail: str,
        *,
        quiesced: bool = False,
        emit: bool = True,
    ) -> None:
        state = advance(entry.state, Trigger.FAILURE)
        if state is None:
            return
        entry.state = state
        self._forget(entry)
        if quiesced:
            entry.window.release(entry.slots, entry.ticket.ticket_id)
        else:
            self._quarantine.hold(entry.ticket, entry.window, entry.slots, failure, detail)
        if emit:
            self._emit(
                TransferFailedEvent(
                    request_id=entry.ticket.request_id,
                    ticket_id=entry.ticket.ticket_id,
                    failure=failure,
                    detail=detail,
                    quiesced=True,
                )
            )

    def _forget(self, entry: Incoming) -> None:
        self._by_ticket.pop(entry.ticket.ticket_id, None)
        with self._lock:
            self._live_ids.discard(entry.ticket.request_id)

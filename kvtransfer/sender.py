"""Prefill's side of the handover: pages go out as credits allow, and stay owned until decode has
acknowledged them or every write has ended.

Runs on the transfer thread, or in its turn on the scheduler's (`TransferThread.do_now`): on one at
a time. Pages are digested once more as they leave: so late that a page
which was freed and reused while it waited for credit is caught. On CUDA a stream of its own does
that beside the wire, and a transfer is not complete before each digest was compared: decode, which
compares its own, hears of the pages no later for it. Pages that left while they were computed
(kvtransfer/early_writes.py) were sealed just there, and are not digested again.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from kvtransfer import messages
from kvtransfer.early_writes import EarlyLayers
from kvtransfer.errors import TransportError
from kvtransfer.events import KvEvent, SourceReleased, TransferFailedEvent
from kvtransfer.layout import PageLayout
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.outgoing import (
    CreditNews,
    Outgoing,
    TicketKey,
    Tombstones,
    Write,
    WriteKey,
    beat_s,
    refusal,
)
from kvtransfer.pool_sealer import PoolSealer, Sealer
from kvtransfer.source_checks import SourceChecks
from kvtransfer.states import TransferFailure, TransferState, Trigger, advance
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.trace import STARTED, WRITTEN, Trace, no_trace
from kvtransfer.transport import WriteId
from protos.baton.v1 import kv_pb2

MAX_WRITE_PAGES = 64
WRITE_BYTES = 128 << 20
"""Most pages of a write, and about as many bytes: 0.35 ms between two H200s. A write costs both
hosts a few tenths of a millisecond beside that, and only the last one's check is waited for."""

HOST_WRITE_BYTES, HOST_WRITES = 8 << 20, 3
"""The same for host memory, and most writes under way where their pages are digested right here:
what has just been digested is copied from the cache, and decode copies out meanwhile."""


class Sender:
    """All outgoing transfers of a worker."""

    def __init__(
        self,
        *,
        instance_id: str,
        layout: PageLayout,
        pool: torch.Tensor | None,
        links: PeerLinks,
        emit: Callable[[KvEvent], None],
        clock: Clock,
        verify: bool = True,
        sealer: Sealer | None = None,
        trace: Trace = no_trace,
    ) -> None:
        """`pool`: [pages, page_bytes] uint8, the source of every page; None where the worker only
        receives. `sealer`: None where this pool is all of it."""
        self._instance_id = instance_id
        size = WRITE_BYTES if pool is None or pool.is_cuda else HOST_WRITE_BYTES
        self._write_pages = max(1, min(MAX_WRITE_PAGES, size // layout.page_bytes))
        self._layout = layout
        self._pool = pool
        self._links = links
        self._emit = emit
        self._clock = clock
        self._trace = trace
        if sealer is None and pool is not None:
            sealer = PoolSealer(pool, layout)
        self._checks = SourceChecks(sealer, verify=verify)
        self._by_request: dict[str, Outgoing] = {}
        self._by_key: dict[TicketKey, Outgoing] = {}
        self._writes: dict[WriteKey, Write] = {}
        self._unchecked: dict[WriteKey, Write] = {}
        """They have ended, and the digests of their source pages are not known yet."""
        self._tombstones = Tombstones()
        self._peer_written: dict[str, float] = {}
        """Peer -> when a write to it last ended."""
        self.bytes_sent = 0
        self.early = EarlyLayers(
            links=links,
            layout=layout,
            at_most=self._write_pages,
            live=self._live,
            add_write=self._add_write,
            fail=self._fail,
        )
        """What leaves before `push`."""

    @property
    def active(self) -> int:
        """Transfers that are not settled, draining failures included."""
        return len(self._by_request)

    # ---- commands of the role -------------------------------------------------------------------

    def open(self, ticket: Ticket) -> None:
        """Starts a transfer. Call it when the ticket arrives, also while the prompt still queues:
        it tells decode that the ticket is held, which renews the lease.
        """
        now = self._clock()
        out = Outgoing(ticket, now, now, now, credits=deque(ticket.slots))
        problem = self._refusal(out)
        if problem is None:
            self._by_request[ticket.request_id] = out
            self._by_key[out.key] = out
            self._beat(out)
            return
        out.failure, out.detail = problem
        mine = ticket.writer_instance == self._instance_id and out.key not in self._by_key
        if mine:
            self._tombstones.bury(out.key, problem)
        self._tell_failed(out, quiesced=True, decode_too=mine)

    def _refusal(self, out: Outgoing) -> tuple[TransferFailure, str] | None:
        if self._pool is None:
            return TransferFailure.REFUSED, "this worker has no source pages to send"
        return refusal(
            out.ticket,
            instance_id=self._instance_id,
            withdrawn=out.key in self._tombstones,
            in_use=out.key in self._by_key,
            transport=self._links.get(out.ticket.instance_id),
        )

    def announce_coming(self, request_id: str) -> None:
        """The step that computes the last pages is on its way: decode may prepare for them."""
        out = self._live(request_id)
        if out is not None:
            self._send(out, messages.coming(out.ticket, so_far=out.pages_written))

    def push(
        self, request_id: str, pages: Sequence[SourcePage], first_token: int | None = None
    ) -> None:
        """Pages whose KV is final. They belong to the transfer until it is released or quiesced.
        `first_token`: they are the last, and it is drawn; nothing is written afterwards."""
        out = self._live(request_id)
        if out is None:
            return
        self.early.whole(request_id, pages)
        out.pending.extend(pages)
        if first_token is not None:
            out.first_token = first_token
        self._pump(out)

    def _add_write(self, key: WriteKey, write: Write) -> None:
        out = write.out
        out.writes.add(key)
        out.last_sent = out.last_written = self._clock()
        self._writes[key] = write

    def complete(self, request_id: str, first_token: int) -> None:
        """Every page was pushed, and the first token is drawn."""
        self.push(request_id, (), first_token)

    def abort(self, request_id: str, failure: TransferFailure, detail: str) -> None:
        """Gives the transfer up and tells decode why. Unknown and ended requests are ignored."""
        out = self._live(request_id)
        if out is not None:
            self._fail(out, failure, detail)

    def _live(self, request_id: str) -> Outgoing | None:
        out = self._by_request.get(request_id)
        return out if out is not None and out.state != TransferState.FAILED else None

    # ---- inputs of the transports ---------------------------------------------------------------

    def on_message(self, peer: str, message: kv_pb2.KvMessage) -> None:
        """A message of decode: credit, acknowledgement or withdrawal."""
        key = (peer, message.ticket_id)
        out = self._by_key.get(key)
        kind = message.WhichOneof("kind")
        if out is not None and not messages.names(out.ticket, message):
            self._links.dropped["wrong_epoch"] += 1
            return
        if kind == "failed":
            self._on_withdrawn(key, out, message)
        elif out is None or out.state == TransferState.FAILED:
            self._on_ended(key, out, message)
        else:
            out.last_heard = self._clock()
            if kind == "credit":
                self._on_credit(out, message.credit)
            elif kind == "ack":
                self._on_ack(out, message.ack)

    def _on_ended(self, key: TicketKey, out: Outgoing | None, message: kv_pb2.KvMessage) -> None:
        """Decode speaks of a ticket that has failed here: it has not heard of that. Of one that is
        still on its way through the router there is nothing to say."""
        failure = self._tombstones.failure(key) if out is None else (out.failure, out.detail)
        if failure is not None:
            self._links.dropped["failed_ticket"] += 1
            answer = messages.answer_failed(message, *failure, quiesced=out is None)
            self._links.send(key[0], answer)
        elif key in self._tombstones or message.credit.slots:
            self._links.dropped["unknown_ticket"] += 1

    def _on_credit(self, out: Outgoing, credit: kv_pb2.Credit) -> None:
        match out.take_credit(credit):
            case CreditNews.REPEATED:
                self._links.dropped["duplicate_credit"] += 1
            case CreditNews.LOST_BEFORE:
                self._fail(out, TransferFailure.TRANSPORT, "a credit of decode got lost")
            case CreditNews.TAKEN:
                self._pump(out)

    def _on_ack(self, out: Outgoing, ack: kv_pb2.TransferAck) -> None:
        if not out.complete_sent or ack.pages != out.pages:
            # an acknowledgement for pages that never left proves nothing about those that did
            self._links.dropped["early_ack"] += 1
            return
        state = advance(out.state, Trigger.ALL_ACCEPTED)
        if state is None:
            self._links.dropped["late_ack"] += 1
            return
        out.state = state
        self._forget(out)
        self._emit(
            SourceReleased(
                request_id=out.ticket.request_id,
                total_bytes=out.pages * self._layout.page_bytes,
                transport=self._transport_name(out),
            )
        )

    def _on_withdrawn(
        self, key: tuple[str, int], out: Outgoing | None, message: kv_pb2.KvMessage
    ) -> None:
        if out is None:
            # not open, or ended: nothing of it is being written, and it may never be opened again
            if key not in self._tombstones:
                self._tombstones.bury(key)
            failure = TransferFailure.from_wire(message.failed.failure)
            answer = messages.answer_failed(message, failure, message.failed.detail, quiesced=True)
            self._links.send(key[0], answer)
        elif out.state != TransferState.FAILED:
            failure = TransferFailure.from_wire(message.failed.failure)
            self._fail(out, failure, message.failed.detail)

    def on_write_done(self, transport: str, write_id: WriteId) -> None:
        key = (transport, write_id)
        write = self._writes.pop(key, None)
        if write is None:
            return
        self._note_end(write)
        self._trace(write.out.ticket.request_id, WRITTEN)
        if write.checked:
            self._settle_write(key, write)
        else:
            self._unchecked[key] = write

    def on_write_failed(self, transport: str, write_id: WriteId, reason: str) -> None:
        key = (transport, write_id)
        write = self._writes.pop(key, None)
        if write is None:
            return
        self._note_end(write)
        write.out.writes.discard(key)
        self._fail_or_settle(write.out, TransferFailure.TRANSPORT, reason)

    def _note_end(self, write: Write) -> None:
        out = write.out
        out.last_written = self._peer_written[out.ticket.instance_id] = self._clock()
        for early in write.early:
            early.writes -= 1

    @property
    def checking(self) -> bool:
        """Whether writes have ended whose digests only polling shows."""
        return bool(self._unchecked)

    def poll(self) -> bool:
        """Takes up layers and digests that the device has by now; whether there were any."""
        worked = self.early.poll()
        known = [key for key, write in self._unchecked.items() if write.checked]
        for key in known:
            self._settle_write(key, self._unchecked.pop(key))
        return worked or bool(known)

    def _settle_write(self, key: WriteKey, write: Write) -> None:
        out, spoilt = write.out, write.spoilt()
        out.writes.discard(key)
        if spoilt or out.state == TransferState.FAILED:
            self._fail_or_settle(out, TransferFailure.MISMATCH, spoilt)
            return
        self._count_written(out, write.pages)
        self._pump(out)

    def _fail_or_settle(self, out: Outgoing, failure: TransferFailure, reason: str) -> None:
        if out.state == TransferState.FAILED:
            self._settle_failed(out)
        else:
            self._fail(out, failure, reason)

    def on_peer_gone(self, peer: str, reason: str, *, proven_dead: bool) -> None:
        """The peer is unreachable. With `proven_dead` its process has exited, so that whatever a
        write still reads goes nowhere and the source pages are free at once."""
        self._peer_written.pop(peer, None)
        for out in [o for o in self._by_request.values() if o.ticket.instance_id == peer]:
            if out.state != TransferState.FAILED:
                self._fail(out, TransferFailure.TRANSPORT, reason)
            if proven_dead and out.ticket.request_id in self._by_request:
                for write in out.writes:
                    self._writes.pop(write, None)
                    self._unchecked.pop(write, None)
                out.writes.clear()
                self._settle_failed(out)

    def tick(self) -> None:
        """Heartbeats, and the end of what has none; call it several times a lease."""
        now = self._clock()
        for out in list(self._by_request.values()):
            if out.state == TransferState.FAILED:
                continue
            writes = [self._writes[key] for key in out.writes if key in self._writes]
            if not all(write.has_begun for write in writes):
                out.last_written = now  # a step that takes long is no silence
            silence = out.silence(now, self._peer_written.get(out.ticket.instance_id, 0.0))
            if silence:
                self._fail(out, TransferFailure.EXPIRED, silence)
            elif now - out.last_sent >= beat_s(out.ticket.lease_s):
                self._beat(out)

    def _beat(self, out: Outgoing) -> None:
        if out.complete_sent:
            self._send_complete(out)
        else:
            self._send(out, messages.written(out.ticket, (), (), so_far=out.pages_written))

    # ---- the machine ----------------------------------------------------------------------------

    def _pump(self, out: Outgoing) -> None:
        all_layers = self._layout.layers
        begun: list[WriteKey | None] = []
        most = HOST_WRITES if self._checks.at_once else math.inf
        while out.state != TransferState.FAILED and len(out.writes) < most:
            pages, landed = out.next_pages(at_most=self._write_pages, all_layers=all_layers)
            if not pages:
                break
            if landed == all_layers:
                self._announce(out, pages)
            else:
                begun.append(self._write(out, pages, landed))
        # The wire is at work meanwhile.
        self._writes.update(self._checks.beside((k, self._writes[k]) for k in begun if k))
        if out.finished and not out.complete_sent and out.state != TransferState.FAILED:
            out.complete_sent = True
            self._send_complete(out)

    def _announce(self, out: Outgoing, pages: list[SourcePage]) -> None:
        """All their bytes have landed. Nothing leaves now, so that a digest of the source would say
        nothing about them: they were sealed where they left, and decode compares."""
        self._trace(out.ticket.request_id, STARTED)
        slots = out.slots_for(pages)
        message = messages.written(out.ticket, pages, slots, so_far=out.pages_written)
        out.take(pages)
        if out.finished:
            out.complete_sent = True
            message.written.complete.CopyFrom(out.end(self._layout.page_bytes))
        self._send(out, message)
        self._trace(out.ticket.request_id, WRITTEN)
        self._count_written(out, pages)

    def _count_written(self, out: Outgoing, pages: Sequence[SourcePage]) -> None:
        out.pages_written += len(pages)
        self.bytes_sent += len(pages) * self._layout.page_bytes

    def _write(self, out: Outgoing, pages: list[SourcePage], landed: int) -> WriteKey | None:
        """`landed`: leading layers that are there already. None: the transfer has failed."""
        slots = out.slots_for(pages)
        part = (landed * 2 * self._layout.row_bytes, self._layout.page_bytes) if landed else None
        message = messages.written(out.ticket, pages, slots, so_far=out.pages_written)
        transport = self._links.get(out.ticket.instance_id)
        if transport is None:
            self._fail(out, TransferFailure.TRANSPORT, "decode instance is not connected")
            return None
        write = self._checks.of_write(out, pages)
        if write.checked and (spoilt := write.spoilt()):
            self._fail(out, TransferFailure.MISMATCH, spoilt)
            return None
        copies = [(page.page, slot) for page, slot in zip(pages, slots, strict=True)]
        try:
            write_id = transport.write(
                out.ticket.instance_id, copies, message.SerializeToString(), part=part
            )
        except TransportError as error:
            self._fail(out, TransferFailure.TRANSPORT, error.message)
            return None
        out.take(pages)
        self._trace(out.ticket.request_id, STARTED)
        key = transport.name, write_id
        self._add_write(key, write)
        return key

    def _fail(self, out: Outgoing, failure: TransferFailure, detail: str) -> None:
        state = advance(out.state, Trigger.FAILURE)
        if state is None:
            return
        out.state, out.failure, out.detail = state, failure, detail
        out.pending.clear()
        out.credits.clear()
        out.early.clear()
        if out.writes:
            self._tell_failed(out, quiesced=False)
        else:
            self._settle_failed(out)

    def _settle_failed(self, out: Outgoing) -> None:
        """Reports the end of a failed transfer once no write of it is left."""
        if not out.writes:
            self._forget(out)
            self._tell_failed(out, quiesced=True)

    def _tell_failed(self, out: Outgoing, *, quiesced: bool, decode_too: bool = True) -> None:
        if decode_too:
            message = messages.failed(
                out.ticket, out.failure, out.detail, quiesced=quiesced, from_writer=True
            )
            self._send(out, message)
        self._emit(
            TransferFailedEvent(
                request_id=out.ticket.request_id,
                ticket_id=out.ticket.ticket_id,
                failure=out.failure,
                detail=out.detail,
                quiesced=quiesced,
            )
        )

    def _send_complete(self, out: Outgoing) -> None:
        self._send(out, messages.complete(out.ticket, out.end(self._layout.page_bytes)))

    def _send(self, out: Outgoing, message: kv_pb2.KvMessage) -> None:
        out.last_sent = self._clock()
        self._links.send(out.ticket.instance_id, message)

    def _transport_name(self, out: Outgoing) -> str:
        transport = self._links.get(out.ticket.instance_id)
        return transport.name if transport is not None else out.ticket.transport

    def _forget(self, out: Outgoing) -> None:
        self._by_request.pop(out.ticket.request_id, None)
        if self._by_key.get(out.key) is out:
            del self._by_key[out.key]
            failed = out.state == TransferState.FAILED
            self._tombstones.bury(out.key, (out.failure, out.detail) if failed else None)

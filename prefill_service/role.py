"""Prefill as a composition: the common scheduler, and a transfer for every request.

A request waits for decode's ticket before it may cost a forward (nothing starts that cannot
land). Each chunk's whole pages leave when the chunk ends; the first token goes straight to the
client; the source pages stay owned until decode has acknowledged them.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.errors import EngineError, QueueFullError
from engine.execution.forward_batch import LayersDone
from engine.memory.chain_hash import namespace_hash, page_chain_hashes
from engine.scheduler.deadlines import Deadlines
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.step_result import StepResult
from engine.scheduler.waiting_queue import Key, WaitingQueue
from engine.types import RequestId
from kvtransfer.errors import TransferError
from kvtransfer.events import KvEvent, SourceReleased, TransferFailedEvent
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import Ticket
from prefill_service.seals import Sealing, SealStore, StaleSourceError
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.engine_parts import EngineParts
from worker.engine_role import FAILURE_CODES, EngineRole, make_rid, told
from worker.handover_trace import COMPUTED, PUSHED, SEALED

NOTHING_FOLLOWS = (FinishReason.ABORT, FinishReason.ERROR)
"""Of a request that ended so, what is computed still is no result."""


@dataclass(slots=True)
class Handover:
    """One request between its arrival here and decode's acknowledgement."""

    req: Req
    decode_instance: str
    ticket: Ticket | None = None
    ticket_arrived: float = 0.0
    """time.monotonic() seconds."""
    given_up: bool = False
    """The transfer is lost or not wanted; the pages stay owned until the writer is quiet."""


class LaunchedExtend(NamedTuple):
    """See `SchedulerRole.on_extend_launched`."""

    req: Req
    start: int
    end: int
    draws: bool


class PrefillRole(EngineRole):
    """Runs in a prefill engine."""

    decodes = False

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._handovers: dict[RequestId, Handover] = {}
        self._reqs: dict[RequestId, Req] = {}
        self._chains: dict[RequestId, list[bytes]] = {}
        """Chain hash of each page of a request that is computed, or was found cached, so far."""
        self._extends: dict[RequestId, deque[tuple[range, Sealing]]] = {}
        """Of each extend that is launched, oldest first: the positions of the pages that it makes
        whole, and the seals of those that it computes."""
        self._launched: list[LaunchedExtend] = []
        """Of the step launched last, until its part is done here."""
        self._layers_done: Sequence[LayersDone] = ()
        self._seals = SealStore(parts)
        parts.memory.tree_cache.seals = self._seals
        by_priority = parts.config.enable_priority_scheduling
        self._without_ticket = WaitingQueue(
            _arrival, displaces=_importance if by_priority else None
        )
        """Requests of `_handovers` that wait for decode's promise."""
        self._deadlines = Deadlines()

    # ---- messages -------------------------------------------------------------------------------

    def handle_request(self, message: channel_pb2.FrontToEngine) -> None:
        kind = message.WhichOneof("kind")
        if kind == "prefill":
            self._accept(message.prefill)
        elif kind == "ticket":
            self._take_ticket(message.ticket)

    def _accept(self, request: worker_pb2.PrefillRequest) -> None:
        rid = self.arrive(request)
        try:
            req = self.checked_req(request)
            self._reqs[rid] = req
            if request.decode_instance:
                self.scheduler.check_request(req)
                self._make_room_for(req)
                # Meanwhile, so that a wrong grammar is told before decode promises anything.
                self.scheduler.prepare_grammar(req)
                self._handovers[rid] = Handover(req, request.decode_instance)
                self._without_ticket.append(req)
                self._deadlines.watch(req, req.deadline)
            else:
                self.scheduler.add_request(req)
        except EngineError as error:
            self.refuse(rid, error)
            self.done(rid)

    def _make_room_for(self, req: Req) -> None:
        """Raises QueueFullError: requests that wait for their ticket are bounded, too. With
        priorities on, the least important of them gives way to a more important one."""
        num_here = len(self._handovers)
        if num_here < self.parts.config.max_queued_requests:
            return
        error = QueueFullError(
            f"{num_here} requests wait here or hand their KV over already, the bound "
            "(--max-queued-requests); try again later"
        )
        least = self._without_ticket.least_important()
        if least is None or least.priority <= req.priority:
            raise error
        self._leave(least.rid)
        self.refuse(least.rid, error)
        self.done(least.rid)

    def _leave(self, rid: RequestId) -> None:
        """Forgets a request that waits for its ticket."""
        self._without_ticket.remove(self._handovers.pop(rid).req)

    def _take_ticket(self, message: worker_pb2.TicketForPrefill) -> None:
        rid = make_rid(message.request_id, message.attempt)
        handover = self._handovers.get(rid)
        if handover is None or handover.ticket is not None:
            return
        try:
            ticket = Ticket.from_proto(message.ticket)
            if ticket.request_id != rid:
                # The transfer is settled under the ticket's id: under another one, never.
                raise TransferError(f"the ticket of request {rid} is for {ticket.request_id}")
            self.agent.open(ticket)
        except TransferError as error:
            self._leave(rid)
            self.report_failure(rid, error.code.value, error.message, retryable=True)
            self.done(rid)
            return
        self._without_ticket.remove(handover.req)
        handover.ticket = ticket
        handover.ticket_arrived = self._message_at
        try:
            self.scheduler.add_request(handover.req)
        except EngineError as error:
            self._give_up(rid, handover, TransferFailure.REFUSED, str(error))
            self.refuse(rid, error)

    def abort(self, rid: RequestId) -> None:
        handover = self._handovers.get(rid)
        if handover is None:
            if not self.scheduler.abort_request(rid):
                self.done(rid)
        elif handover.ticket is None:
            self._leave(rid)
            self.done(rid)
        else:
            self._give_up(rid, handover, TransferFailure.ABORTED, "the request was aborted")

    def _give_up(
        self, rid: RequestId, handover: Handover, failure: TransferFailure, detail: str
    ) -> None:
        """Ends the transfer; TransferFailedEvent follows when no write reads the pages."""
        if not handover.given_up:
            handover.given_up = True
            self.agent.abort(rid, failure, detail)
            self.scheduler.abort_request(rid)

    # ---- scheduler hooks ------------------------------------------------------------------------

    def poll(self) -> None:
        super().poll()
        for req in self._deadlines.take_expired(time.monotonic()):
            # With a ticket it waits in the scheduler, which sees its deadline itself.
            if req in self._without_ticket:
                self._leave(req.rid)
                detail = "its deadline passed while it waited for decode memory"
                self.report_failure(req.rid, "DEADLINE_EXCEEDED", detail, retryable=False)
                self.done(req.rid)

    def on_request_aborted(self, req: Req) -> None:
        """Ended by the scheduler (its deadline passed, or it gave its place to another): nothing
        is left to hand over."""
        handover = self._handovers.get(req.rid)
        if handover is not None and handover.ticket is not None:
            # An error goes to the router from here: decode need not report one, too.
            failed = req.finish_reason is FinishReason.ERROR
            failure = TransferFailure.NOT_NEEDED if failed else TransferFailure.ABORTED
            self._give_up(req.rid, handover, failure, "the request has ended")

    def on_grammar_failed(self, req: Req, error: EngineError) -> None:
        if req in self._without_ticket:
            self._leave(req.rid)
            self.refuse(req.rid, error)
            self.done(req.rid)

    def on_layers_done(self, req: Req, *, layers: range, start: int, end: int) -> None:
        # The last layers leave with the whole pages, whose seals cover all of them.
        if layers.stop >= self.parts.layout.layers:
            return
        pages = self._leaving(req, start=start, end=end)
        if pages:
            self.agent.push_layers(req.rid, pages, layers)

    def _leaving(self, req: Req, *, start: int, end: int) -> list[tuple[int, int]]:
        """(position, page) of what an extend makes whole and decode does not hold; none where
        nothing is to leave."""
        handover = self._handovers.get(req.rid)
        if handover is None or handover.ticket is None or handover.given_up:
            return []
        size = self.parts.layout.page_size
        stop = -(-end // size) if end == req.seqlen else end // size
        first = max(start, handover.ticket.decode_prefix_len) // size
        return [(position, req.pages[position]) for position in range(first, stop)]

    def on_extend_launched(self, req: Req, *, start: int, end: int, draws: bool) -> None:
        self._launched.append(LaunchedExtend(req, start, end, draws))

    def on_step_launched(self, layers_done: Sequence[LayersDone]) -> None:
        # The host does its part while the device computes: afterwards a client waits. But those of
        # the step before wait now.
        self._layers_done = layers_done
        if not layers_done:
            self._queue_behind_step()

    def publish(self, result: StepResult) -> None:
        super().publish(result)
        self._queue_behind_step()

    def _queue_behind_step(self) -> None:
        """Seals what the step launched last computes, and lets it leave, in time: when the device
        has come so far."""
        launched = [e for e in self._launched if e.req.finish_reason not in NOTHING_FOLLOWS]
        self._launched.clear()
        layers_done, self._layers_done = self._layers_done, ()
        computed_at = layers_done[-1].passed if layers_done else None
        for extend in launched:
            extends = self._extends.setdefault(extend.req.rid, deque())
            extends.append(self._begin_sealing(extend, computed_at))
        leaving = [
            (extend.req.rid, pages)
            for extend in launched
            # A request of one token has no decode.
            if layers_done and extend.req.remaining_new_tokens > 1
            if (pages := self._leaving(extend.req, start=extend.start, end=extend.end))
        ]
        first = 0
        for layers, passed in layers_done:
            for rid, pages in leaving:
                self.agent.push_behind(rid, pages, range(first, layers), passed)
            first = layers
        for extend in launched:
            if extend.draws and extend.req.remaining_new_tokens > 1:
                self._announce_coming(extend.req.rid)

    def _announce_coming(self, rid: RequestId) -> None:
        """Decode has the time of a step to prepare for the request."""
        handover = self._handovers.get(rid)
        if handover is not None and handover.ticket is not None and not handover.given_up:
            self.agent.announce_coming(rid)

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
        # Sealed whatever becomes of the request: the prefix cache may lend its pages to another.
        if prompt_done:
            self.trace.mark(req.rid, COMPUTED)
        if not self._extends.get(req.rid):
            self._queue_behind_step()
        fresh, sealing = self._extends[req.rid].popleft()
        self._seals.finish(sealing)
        if prompt_done:
            self.trace.mark(req.rid, SEALED)
        handover = self._handovers.get(req.rid)
        if handover is None or handover.ticket is None or handover.given_up:
            return
        if req.finished():
            # Nothing of the KV is wanted: the first token ended the request.
            self._give_up(
                req.rid, handover, TransferFailure.NOT_NEEDED, "the first token ended the request"
            )
            return
        try:
            self._push(req, handover.ticket, fresh, first_token=token if prompt_done else None)
        except StaleSourceError as error:
            self._give_up(req.rid, handover, TransferFailure.MISMATCH, str(error))
            detail = told(TransferFailure.MISMATCH, str(error))
            self.report_failure(req.rid, "DATA_LOSS", detail, retryable=True)
            return
        if prompt_done:
            self.trace.mark(req.rid, PUSHED)

    def _begin_sealing(
        self, extend: LaunchedExtend, computed_at: torch.cuda.Event | None
    ) -> tuple[range, Sealing]:
        """Extends the request's chain over the pages that this extend makes whole (at the prompt's
        end, over the last one, too), and seals those that it computes: when the device has passed
        `computed_at`, or has ended the step. Returns the positions of all of them, pages of a
        cached prefix included: these carry the seal of whoever computed them.
        """
        req, start, end = extend.req, extend.start, extend.end
        layout = self.parts.layout
        size = layout.page_size
        chain = self._chains.setdefault(req.rid, [])
        stop = -(-end // size) if extend.draws else end // size
        fresh = range(len(chain), stop)
        ids = req.token_ids(end)[fresh.start * size : stop * size]
        previous = chain[-1] if chain else namespace_hash(req.extra_key)
        chain += page_chain_hashes(ids, size, previous=previous)
        computed = range(max(fresh.start, start // size), stop)
        return fresh, self._seals.begin(
            req.pages[computed.start : computed.stop],
            chain[computed.start : computed.stop],
            [layout.valid_tokens(position, end) for position in computed],
            passed=computed_at,
        )

    def _push(self, req: Req, ticket: Ticket, fresh: range, *, first_token: int | None) -> None:
        """Hands over the pages that decode does not hold; all that were left of them, where the
        first token is known. Raises StaleSourceError."""
        pages, chain = self.scheduler.request_pages(req), self._chains[req.rid]
        layout = self.parts.layout
        self.agent.push(
            req.rid,
            [
                self._seals.source_page(
                    pages[position],
                    position=position,
                    chain_hash=chain[position],
                    valid=layout.valid_tokens(position, req.kv_ready_len),
                )
                for position in fresh
                if position >= ticket.decode_prefix_len // layout.page_size
            ],
            first_token=first_token,
        )

    def retain_pages(self, req: Req) -> bool:
        handover = self._handovers.get(req.rid)
        return handover is not None and handover.ticket is not None

    # ---- ends -----------------------------------------------------------------------------------

    def on_kv_event(self, event: KvEvent) -> None:
        match event:
            case SourceReleased(request_id=request_id):
                self._settle(RequestId(request_id))
            case TransferFailedEvent():
                self._on_transfer_failed(event)

    def _on_transfer_failed(self, event: TransferFailedEvent) -> None:
        rid = RequestId(event.request_id)
        handover = self._handovers.get(rid)
        if handover is None:
            return
        if not handover.given_up:
            handover.given_up = True
            code = FAILURE_CODES.get(event.failure, "UNAVAILABLE")
            why = told(event.failure, event.detail)
            detail = f"handing its KV to {handover.decode_instance} failed: {why}"
            self.report_failure(rid, code, detail, retryable=True, between_workers=True)
            self.scheduler.abort_request(rid)
        if event.quiesced:
            self._settle(rid)

    def _settle(self, rid: RequestId) -> None:
        """Nobody reads the source pages any more."""
        handover = self._handovers.pop(rid, None)
        if handover is None:
            return
        if handover.req.phase in (RequestPhase.TRANSFERRING, RequestPhase.HELD):
            self.scheduler.release_request(handover.req)
        elif handover.req.phase in (RequestPhase.ENDED, RequestPhase.WAITING):
            self.done(rid)

    def on_released(self, rid: RequestId) -> None:
        if rid not in self._handovers:
            self.done(rid)

    def done(self, rid: RequestId) -> None:
        self._reqs.pop(rid, None)
        self._chains.pop(rid, None)
        self._extends.pop(rid, None)
        super().done(rid)

    # ---- readings -------------------------------------------------------------------------------

    def worker_timing(self, rid: RequestId) -> worker_pb2.WorkerTiming:
        req = self._reqs[rid]
        handover = self._handovers.get(rid)
        admitted = handover.ticket_arrived if handover is not None else self.arrivals[rid]
        return worker_pb2.WorkerTiming(
            queue_ms=(req.t_first_forward - admitted) * 1e3,
            prefill_ms=(time.monotonic() - req.t_first_forward) * 1e3,
            cached_tokens=req.cached_tokens,
        )

    def queues(self) -> dict[str, int]:
        """ticket: waits for decode's promise; waiting: has it; running: is computed; inflight: is
        computed, and its last pages leave."""
        lengths = self.scheduler.queue_lengths()
        return {
            "ticket": len(self._without_ticket),
            "waiting": lengths["waiting"],
            "running": lengths["running"],
            "inflight": lengths["transferring"],
        }

    def status(self) -> worker_pb2.WorkerStatus:
        status = super().status()
        status.waiting += len(self._without_ticket)
        status.queued_tokens += self._without_ticket.num_tokens
        status.early_layers_sent = self.agent.stats().early_layers_sent
        status.transferring = len(self._handovers) - len(self._without_ticket)
        return status


def _arrival(req: Req) -> Key:
    return (req.t_arrival,)


def _importance(req: Req) -> Key:
    return (req.priority, req.t_arrival)

"""Prefill as a composition: the common scheduler, and a transfer for every request.

A request waits for decode's ticket before it may cost a forward (nothing starts that cannot
land). Each chunk's whole pages leave when the chunk ends; the first token goes straight to the
client; the source pages stay owned until decode has acknowledged them.
"""

import time
from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.memory.chain_hash import chain_hash
from engine.scheduler.req import Req, RequestPhase
from engine.types import RequestId
from kvtransfer.errors import TransferError
from kvtransfer.events import KvEvent, SourceReleased, TransferFailedEvent
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import Ticket
from prefill_service.seals import SealStore, StaleSourceError
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.engine_parts import EngineParts
from worker.engine_role import FAILURE_CODES, EngineRole, make_rid


@dataclass(slots=True)
class Handover:
    """One request between its arrival here and decode's acknowledgement."""

    req: Req
    decode_instance: str
    ticket: Ticket | None = None
    ticket_arrived: float = 0.0
    """time.monotonic() seconds."""
    chain: list[bytes] = field(default_factory=list)
    """Chain hash of each page dealt with so far."""
    given_up: bool = False
    """The transfer is lost or not wanted; the pages stay owned until the writer is quiet."""


class PrefillRole(EngineRole):
    """Runs in a prefill engine."""

    decodes = False

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._handovers: dict[RequestId, Handover] = {}
        self._reqs: dict[RequestId, Req] = {}
        self._seals = SealStore(parts)

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
            req = self.make_req(request)
            self._reqs[rid] = req
            if request.decode_instance:
                self.scheduler.check_request(req)
                self._handovers[rid] = Handover(req, request.decode_instance)
            else:
                self.scheduler.add_request(req)
        except EngineError as error:
            self.refuse(rid, error)
            self.done(rid)

    def _take_ticket(self, message: worker_pb2.TicketForPrefill) -> None:
        rid = make_rid(message.request_id, message.attempt)
        handover = self._handovers.get(rid)
        if handover is None or handover.ticket is not None:
            return
        try:
            ticket = Ticket.from_proto(message.ticket)
            self.agent.open(ticket)
        except TransferError as error:
            del self._handovers[rid]
            self.report_failure(rid, error.code.value, error.message, retryable=True)
            self.done(rid)
            return
        handover.ticket = ticket
        handover.ticket_arrived = time.monotonic()
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
            del self._handovers[rid]
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

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
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
            self._push_new_pages(handover, handover.ticket, prompt_done=prompt_done)
        except StaleSourceError as error:
            self._give_up(req.rid, handover, TransferFailure.MISMATCH, str(error))
            self.report_failure(req.rid, "DATA_LOSS", str(error), retryable=True)
            return
        if prompt_done and token is not None:
            self.agent.complete(req.rid, token)

    def _push_new_pages(self, handover: Handover, ticket: Ticket, *, prompt_done: bool) -> None:
        """Seals what this chunk computed, and pushes every page that decode does not hold."""
        req, page_size = handover.req, self.parts.layout.page_size
        committed = req.kv_committed_len
        pages = self.scheduler.request_pages(req)
        stop = -(-committed // page_size) if prompt_done else committed // page_size
        start = len(handover.chain)
        if start >= stop:
            return
        ids = req.token_ids(committed)
        valid: list[int] = []
        for position in range(start, stop):
            tokens = ids[position * page_size : (position + 1) * page_size]
            previous = handover.chain[-1] if handover.chain else b""
            handover.chain.append(chain_hash(previous, tokens))
            valid.append(len(tokens))
        computed = max(start, req.prefix_len // page_size)
        self._seals.seal(
            pages[computed:stop], handover.chain[computed:stop], valid[computed - start :]
        )
        wanted = range(max(start, ticket.decode_prefix_len // page_size), stop)
        self.agent.push(
            req.rid,
            [
                self._seals.source_page(
                    pages[position],
                    position=position,
                    chain_hash=handover.chain[position],
                    valid=valid[position - start],
                )
                for position in wanted
            ],
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
            detail = f"handing its KV to {handover.decode_instance} failed: {event.detail}"
            self.report_failure(rid, code, detail, retryable=True)
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
        super().done(rid)

    # ---- readings -------------------------------------------------------------------------------

    def worker_timing(self, rid: RequestId) -> worker_pb2.WorkerTiming:
        req = self._reqs[rid]
        handover = self._handovers.get(rid)
        admitted = handover.ticket_arrived if handover is not None else self.arrivals[rid]
        return worker_pb2.WorkerTiming(
            queue_ms=(req.t_first_forward - admitted) * 1e3,
            prefill_ms=(req.t_first_token - req.t_first_forward) * 1e3,
            cached_tokens=req.cached_tokens,
        )

    def status(self) -> worker_pb2.WorkerStatus:
        status = super().status()
        no_ticket = [h.req for h in self._handovers.values() if h.ticket is None]
        status.waiting += len(no_ticket)
        status.queued_tokens += sum(req.seqlen for req in no_ticket)
        status.transferring = len(self._handovers) - len(no_ticket)
        return status

"""Decode as a composition: the common scheduler, tickets, and the landing of KV.

The scheduler polls this role at the start of every pass: what has landed is copied into the pool
and verified, what is whole joins the running batch, and what waits for memory is admitted in
order (scheduling.md section 5). Nobody but this thread writes the pool.
"""

import time
from collections.abc import Iterable, Sequence
from functools import partial

from decode_service.landings import Check, Landing
from decode_service.reserve_queue import Reservation, ReserveQueue
from engine.errors import EngineError, OutOfMemoryError
from engine.execution.forward_batch import LayersDone
from engine.memory.chain_hash import namespace_hash, page_chain_hashes
from engine.memory.prefix_cache import LoadBack
from engine.scheduler.admission import Promise
from engine.scheduler.req import Req
from engine.scheduler.role import OwnerKind
from engine.scheduler.step_result import StepResult
from engine.types import RequestId
from kvtransfer.errors import NoSlotsError, TransferError
from kvtransfer.events import (
    KvEvent,
    PagesComing,
    PagesLanded,
    TransferFailedEvent,
    WriterFinished,
)
from kvtransfer.states import TransferFailure
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.engine_parts import EngineParts
from worker.engine_role import FAILURE_CODES, EngineRole, split_rid, told
from worker.handover_trace import ARRIVED, CHECKED, DECODED, JOINED, LAUNCHED, QUEUED

DEFAULT_WAIT_S = 30.0
"""How long a request may wait for memory where the router names no limit."""


HOST_LOAD_WAIT_S = 0.5
"""How long a ticket may wait for the prefix that comes back from host memory. A copy takes some
milliseconds; this bounds what evictions in between can make of it."""


class DecodeRole(EngineRole):
    """Runs in a decode engine."""

    decodes = True

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._waiting = ReserveQueue(by_priority=parts.config.enable_priority_scheduling)
        self._landings: dict[RequestId, Landing] = {}
        self._joined: dict[RequestId, Landing] = {}
        """Requests that landed, until their first token from here was sent."""
        self._to_accept: list[tuple[RequestId, list[int]]] = []
        """Positions of pages that were verified and are still to be acknowledged."""

    # ---- messages -------------------------------------------------------------------------------

    def handle_request(self, message: channel_pb2.FrontToEngine) -> None:
        if message.WhichOneof("kind") == "reserve":
            self._accept(message.reserve)

    def _accept(self, request: worker_pb2.ReserveRequest) -> None:
        rid = self.arrive(request)
        try:
            req = self.checked_req(request)
            self.scheduler.check_request(req)
            # Ready, as a rule, before the pages land; the request joins no sooner.
            self.scheduler.prepare_grammar(req)
        except EngineError as error:
            self.refuse(rid, error)
            self.done(rid)
            return
        num_waiting = len(self._waiting)
        if num_waiting >= self.parts.config.max_queued_requests:
            least = self._waiting.less_important_than(req)
            if least is None:
                self._turn_away(rid, f"{num_waiting} requests wait for decode memory already")
                return
            self._waiting.remove(least.rid)
            self._turn_away(
                least.rid,
                f"{num_waiting} requests wait for decode memory and a more important one came",
            )
        deadline = self.arrivals[rid] + (request.max_wait_s or DEFAULT_WAIT_S)
        self._waiting.append(Reservation(rid, req, request.prefill_instance, deadline))
        self._admit()

    def on_grammar_failed(self, req: Req, error: EngineError) -> None:
        rid = req.rid
        if self._waiting.remove(rid) is not None:
            self.refuse(rid, error)
            self.done(rid)
        elif rid in self._landings:
            self.refuse(rid, error)
            self.agent.release(rid, TransferFailure.ABORTED, str(error))
            self._forget_landing(rid)

    def on_drain(self) -> None:
        """No ticket is granted any more: what waits for one waits better elsewhere."""
        for reservation in self._waiting.take_all():
            detail = "this decode worker drains and grants no more memory"
            self.report_failure(
                reservation.rid, "UNAVAILABLE", detail, retryable=True, turned_away=True
            )
            self.done(reservation.rid)

    def is_idle(self) -> bool:
        # A request may end before prefill knows that it need not keep its pages any longer.
        return super().is_idle() and not self.agent.stats().receiving

    def _turn_away(self, rid: RequestId, why: str) -> None:
        self.report_failure(rid, "RESOURCE_EXHAUSTED", why, retryable=True, retry_after_s=1.0)
        self.done(rid)

    def abort(self, rid: RequestId) -> None:
        landing = self._landings.get(rid)
        if self._waiting.remove(rid) is not None:
            self.done(rid)
        elif landing is not None:
            self.agent.release(rid, TransferFailure.ABORTED, "the request was aborted")
            self._forget_landing(rid)
        elif not self.scheduler.abort_request(rid):
            self.done(rid)

    def _forget_landing(self, rid: RequestId) -> None:
        """Peers never write the pool, so the pages may go as soon as nothing is copied into them;
        slots wait for their writer."""
        landing = self._landings.pop(rid)
        landing.take_checks(verify=False)
        self.parts.memory.free_pages(landing.own_pages)
        self.scheduler.unlock_prefix(landing.req)
        self.done(rid)

    # ---- admission ------------------------------------------------------------------------------

    def _admit(self) -> None:
        """In order; stops at the first that does not fit. One whose adapter has no slot is passed
        over."""
        for late in self._waiting.take_late(time.monotonic()):
            self._turn_away_late(late)
        for head in self._waiting.in_order():
            if not self.scheduler.admission.has_lora_slot_for(head.req.lora_id):
                continue
            if not self._grant_if_it_fits(head):
                return
            self._waiting.remove(head.rid)

    def waits_for_ticket(self) -> Req | None:
        if self.agent.stats().slots.free < 1:
            return None
        has_slot = self.scheduler.admission.has_lora_slot_for
        for head in self._waiting.in_order():
            if has_slot(head.req.lora_id):
                return head.req
        return None

    def on_room_made(self) -> None:
        self._admit()

    def _turn_away_late(self, late: Reservation) -> None:
        deadline = late.req.deadline
        if deadline is None or deadline > late.deadline:
            self._turn_away(late.rid, "no decode memory came free in time; try again later")
            return
        detail = "its deadline passed while it waited for decode memory"
        self.report_failure(late.rid, "DEADLINE_EXCEEDED", detail, retryable=False)
        self.done(late.rid)

    def _grant_if_it_fits(self, head: Reservation) -> bool:
        """True where the request leaves the queue: with a ticket, or with an error."""
        req = head.req
        prefix = self.scheduler.lock_prefix(req)
        prefix_len = len(prefix) * self.parts.layout.page_size
        slots = self.agent.stats().slots.free
        if not self.scheduler.admission.can_admit(
            req.seqlen,
            prefix_len,
            req.remaining_new_tokens,
            free_landing_slots=slots,
            priority=req.priority,
        ):
            self.scheduler.unlock_prefix(req)
            return False
        match self._load_prefix(head):
            case LoadBack.PENDING:
                self.scheduler.unlock_prefix(req)
                return False
            case LoadBack.DONE:
                self.scheduler.unlock_prefix(req)
                return self._grant_if_it_fits(head)
        try:
            self._grant(head, prefix, prefix_len)
        except NoSlotsError:
            self.scheduler.unlock_prefix(req)
            return False
        except TransferError as error:
            self.scheduler.unlock_prefix(req)
            self.report_failure(
                head.rid, error.code.value, error.message, retryable=True, between_workers=True
            )
            self.done(head.rid)
        return True

    def _load_prefix(self, head: Reservation) -> LoadBack:
        """What host memory has of the conversation need not travel again; but it is not waited for
        any longer than `HOST_LOAD_WAIT_S`."""
        now = time.monotonic()
        if head.loading_since is not None and now - head.loading_since > HOST_LOAD_WAIT_S:
            return LoadBack.NOTHING
        outcome = self.scheduler.load_prefix(head.req)
        if outcome is LoadBack.PENDING and head.loading_since is None:
            head.loading_since = now
        return outcome

    def _grant(self, head: Reservation, prefix: list[int], prefix_len: int) -> None:
        req = head.req
        pages = self.agent.pages_of(head.writer)
        chain = page_chain_hashes(
            req.fill_ids, pages.page_size, previous=namespace_hash(req.extra_key)
        )
        expected = chain[pages.first_position(prefix_len) :]
        ticket = self.agent.grant(
            request_id=head.rid,
            writer=head.writer,
            total_pages=len(chain),
            total_tokens=req.seqlen,
            prefix_len=prefix_len,
            token_hash=chain[-1],
            chain_hashes=expected,
        )
        self._landings[head.rid] = Landing(
            req, prefix, pages, chain, len(expected), transport=ticket.transport
        )
        self.scheduler.prefix_query_tokens += req.seqlen
        self.scheduler.prefix_hit_tokens += prefix_len
        request_id, attempt = split_rid(head.rid)
        reserved = worker_pb2.Reserved(
            request_id=request_id,
            attempt=attempt,
            ticket=ticket.to_proto(),
            reserve_ms=(time.monotonic() - self.arrivals[head.rid]) * 1e3,
        )
        self.parts.channel.send(channel_pb2.EngineToFront(reserved=reserved))

    def promises(self) -> Iterable[Promise]:
        return [
            Promise(
                prompt_len=landing.req.seqlen,
                max_new_tokens=landing.req.remaining_new_tokens,
                prefix_len=len(landing.prefix) * self.parts.layout.page_size,
                pages_allocated=bool(landing.pages),
                lora_id=landing.req.lora_id,
            )
            for landing in self._landings.values()
        ]

    # ---- landing --------------------------------------------------------------------------------

    def on_step_launched(self, layers_done: Sequence[LayersDone]) -> None:
        now = time.monotonic()
        for landing in self._joined.values():
            landing.queued = landing.queued or (now if landing.req.t_first_decode else 0.0)
        self._accept_last_pages()

    def publish(self, result: StepResult) -> None:
        super().publish(result)
        for landing in [landing for landing in self._joined.values() if landing.checks]:
            # Nothing was launched for it yet (it may wait for an adapter's slot): as its slots do.
            if not landing.req.kv_is_good():
                self.scheduler.abort_request(landing.req.rid)
        self._accept_last_pages()

    def _accept_last_pages(self) -> None:
        """Of requests whose pages are all here: nobody waits for that word, and the transfer
        thread, which it wakes, would share the interpreter with the launch of their first step."""
        last_pages, self._to_accept = self._to_accept, []
        for rid, positions in last_pages:
            self.agent.accept(rid, positions)

    def poll(self) -> None:
        super().poll()
        for rid, landing in list(self._landings.items()):
            if landing.checks and not self._settle_checks(rid, landing):
                self._forget_landing(rid)
        self._admit()

    def on_kv_event(self, event: KvEvent) -> None:
        match event:
            case PagesLanded():
                self._on_landed(event)
            case PagesComing(request_id=request_id):
                self._prepare(RequestId(request_id))
            case WriterFinished(request_id=request_id, first_token=first_token):
                self._on_writer_finished(RequestId(request_id), first_token)
            case TransferFailedEvent(request_id=request_id, failure=failure, detail=detail):
                rid = RequestId(request_id)
                if rid not in self._landings:
                    return
                if failure is not TransferFailure.NOT_NEEDED:
                    # Else the first token ended the request: prefill tells the router itself.
                    code = FAILURE_CODES.get(failure, "UNAVAILABLE")
                    why = f"its KV did not arrive: {told(failure, detail)}"
                    self.report_failure(rid, code, why, retryable=True, between_workers=True)
                self._forget_landing(rid)

    def _on_landed(self, event: PagesLanded) -> None:
        rid = RequestId(event.request_id)
        landing = self._landings.get(rid)
        if landing is None:
            return
        started = time.monotonic()
        self.trace.mark(rid, ARRIVED, started)
        try:
            self._bind_pages(landing)
        except OutOfMemoryError as error:
            self.agent.release(rid, TransferFailure.REFUSED, str(error))
            self.report_failure(rid, error.code, str(error), retryable=True)
            self._forget_landing(rid)
            return
        found = self.parts.lander.start(
            event.window,
            event.pages,
            landing.writer,
            pages=landing.pages,
            kept_tokens=len(landing.prefix) * self.parts.layout.page_size,
            first_slot=event.first_slot,
        )
        # A device copies and checks meanwhile.
        self.scheduler.expect_prebuilt(landing.req, landing.pages)
        landing.checks.append(Check(event.pages, found))
        landing.verified = time.monotonic()
        landing.verify_s = landing.verified - started
        self._join_if_whole(rid, landing)

    def _on_writer_finished(self, rid: RequestId, first_token: int) -> None:
        landing = self._landings.get(rid)
        if landing is None:
            return
        if first_token >= self.scheduler.config.vocab_size:
            # The model would be asked for a row that it does not have, and the engine would end.
            self._reject(rid, f"its first token {first_token} is not of the vocabulary")
            self._forget_landing(rid)
            return
        landing.first_token = first_token
        self._join_if_whole(rid, landing)

    def _reject(self, rid: RequestId, problem: str) -> None:
        self.agent.reject(rid, problem)
        why = f"its KV was refused: {told(TransferFailure.MISMATCH, problem)}"
        self.report_failure(rid, "DATA_LOSS", why, retryable=True, between_workers=True)

    def _prepare(self, rid: RequestId) -> None:
        """Its last pages are being computed. What its join needs beside them is made now."""
        landing = self._landings.get(rid)
        if landing is None:
            return
        try:
            self._bind_pages(landing)
        except OutOfMemoryError:
            return  # pages are still promised to it, and looked for again when they land
        self.scheduler.expect_prebuilt(landing.req, landing.pages)

    def _bind_pages(self, landing: Landing) -> None:
        """Its promise becomes pages. Raises OutOfMemoryError."""
        if not landing.pages:
            count = self.parts.layout.pages_of(landing.req.seqlen)
            own = self.parts.memory.alloc_pages(count - len(landing.prefix))
            landing.pages = landing.prefix + own

    def _settle_checks(self, rid: RequestId, landing: Landing) -> bool:
        """Waits for the copies of what has landed: after this the slots go back to their writer.
        False: something is not what was sealed, and all sides are told."""
        began = time.monotonic()
        positions, problem = landing.take_checks(verify=self.parts.config.verify_kv)
        self.trace.mark(rid, CHECKED)
        if problem:
            self._reject(rid, problem)
            return False
        if rid in self._landings:
            landing.verified = time.monotonic()
            landing.verify_s += landing.verified - began
        if len(landing.accepted) < landing.travelling:
            self.agent.accept(rid, positions)  # its writer waits for these slots
        else:
            self._to_accept.append((rid, positions))
        return True

    def _join_if_whole(self, rid: RequestId, landing: Landing) -> None:
        """What still is being checked is waited for behind the preparation of its first step."""
        if landing.first_token is None or not landing.whole:
            return
        del self._landings[rid]
        landing.completed = time.monotonic()
        self.trace.mark(rid, JOINED, landing.completed)
        self._joined[rid] = landing
        self.scheduler.add_prebuilt(
            landing.req,
            landing.pages,
            landing.first_token,
            kv_check=partial(self._settle_checks, rid, landing) if landing.checks else None,
        )

    def page_owners(self) -> Iterable[tuple[OwnerKind, Sequence[int]]]:
        return [("in_use", landing.pages or landing.prefix) for landing in self._landings.values()]

    # ---- readings -------------------------------------------------------------------------------

    def done(self, rid: RequestId) -> None:
        self._joined.pop(rid, None)
        super().done(rid)

    def worker_timing(self, rid: RequestId) -> worker_pb2.WorkerTiming:
        landing = self._joined.pop(rid, None)
        if landing is None:
            return worker_pb2.WorkerTiming()
        now = time.monotonic()
        # Retracted in the pass that it joined, it came back by way of an extend.
        forward = landing.req.t_first_decode or now
        self.trace.mark(rid, LAUNCHED, forward)
        self.trace.mark(rid, QUEUED, landing.queued)
        self.trace.mark(rid, DECODED, now)
        return worker_pb2.WorkerTiming(
            verify_ms=landing.verify_s * 1e3,
            transfer_tail_ms=(landing.completed - landing.verified) * 1e3,
            join_ms=(forward - landing.completed) * 1e3,
            first_decode_step_ms=(now - forward) * 1e3,
            kv_bytes=len(landing.accepted) * landing.writer.page_bytes,
            transport=landing.transport,
        )

    def queues(self) -> dict[str, int]:
        """reserve: waits for memory; transfer: its KV is on the way; prebuilt: it is here and joins
        the batch; retracted: it was sent back to be computed again."""
        lengths = self.scheduler.queue_lengths()
        return {
            "reserve": len(self._waiting),
            "transfer": len(self._landings),
            "prebuilt": lengths["prebuilt"],
            "running": lengths["running"],
            "retracted": lengths["waiting"],
        }

    def status(self) -> worker_pb2.WorkerStatus:
        status = super().status()
        status.waiting += len(self._waiting)
        status.transferring = len(self._landings)
        return status

"""The scheduler: one pass decides what runs, runs it, and hands out what came of it.

Single-threaded. It composes: `RequestLifecycle` (who is live), `PrefillAdder` (what a prefill may
take), `ScheduleBatch` (rows, pages, tensors), `StepsInFlight` (what is launched), `ResultProcessor`
(what was drawn); how requests come and go is in `SchedulerRequests`. Rules and names are the seed's
(scheduling.md sections 1 and 2), overlap is section 7.
"""

import time

import torch

from engine.errors import OutOfMemoryError, StepMemoryError
from engine.execution.forward_batch import BatchRunner
from engine.grammar.compiler import GrammarCompiler
from engine.memory.pools import MemoryPools
from engine.scheduler.admission import (
    DecodeAdmission,
    ceil_page,
    promised_loras,
    unbound_tokens,
)
from engine.scheduler.admit_waiting import WaitingAdmission
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.in_flight import LaunchedStep, extend_spans
from engine.scheduler.prefill_adder import PrefillAdder
from engine.scheduler.req import Req, RequestPhase
from engine.scheduler.requests import SchedulerRequests
from engine.scheduler.role import SchedulerRole
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.step_result import StepResult
from engine.scheduler.ticket_room import TicketRoom


class Scheduler(SchedulerRequests):
    """All requests of one engine, pass by pass. Every method is called from one thread."""

    def __init__(
        self,
        config: SchedulerConfig,
        runner: BatchRunner,
        memory: MemoryPools,
        role: SchedulerRole | None = None,
        device: torch.device | str = "cpu",
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`grammars`: None where outputs cannot be constrained. Raises `ConfigError` where config,
        memory and device do not belong together."""
        super().__init__(config, runner, memory, role, device, grammars)
        self.admission = DecodeAdmission(self)
        self._ticket_room = TicketRoom(self)
        self._newly_joined: list[Req] = []
        """In this pass, by transfer."""
        self.role.attach(self)

    # ---- one pass

    def step(self) -> StepResult:
        """One pass: polls the role, chooses a batch, launches it, handles what a step drew: this
        batch's, or with overlap the one's before, while the device computes this one. A batch that
        memory does not suffice for (`StepMemoryError`) ends with that error, and the others go on;
        other errors of the runner pass through, and the engine cannot go on after one.
        """
        self._in_flight.clock.pass_begins(time.monotonic())
        self.role.poll()
        batch = self.get_next_batch_to_run()
        self._refuse_spoilt()
        if batch is not None:
            try:
                self._launch(batch)
            except StepMemoryError as error:
                self._lose(batch, error)
                batch = None
        self.last_batch = None if batch is self._split.batch else batch
        overlaps = batch is not None and self.config.enable_overlap
        self._settle_outstanding(but=1 if overlaps else 0)
        self._teach_tree()
        return self._lifecycle.take_events()

    def hold_s(self) -> float:
        """Seconds for which the next `step` may wait without the device waiting for it: time to
        listen, since who arrives before the launch need not wait for one step more."""
        if not self.config.enable_overlap:
            return 0.0
        joining = any(
            self.lora_slots.has_room_for(req.lora_id)
            for req in self.prebuilt
            if not self.grammar_queue.is_pending(req)
        )
        return self._in_flight.hold_s(joining=joining)

    def _launch(self, batch: ScheduleBatch) -> None:
        """The tokens that the step will draw are inputs of the next one without leaving the
        device; the host reads them when it gets to it."""
        if batch is self._split.batch:
            self._lifecycle.events.num_input_tokens += self._split.launch_part()
            if self._split.batch is None:
                self._tell_of_extends(self._in_flight.newest)
            self.role.on_step_launched(())
            return
        step = self._in_flight.begin(batch)
        # Where a grammar has a say, the draw waits for the tokens before; the layers do not.
        result = self.runner.forward(
            batch.to_forward_batch(tokens_known=lambda: self._settle_outstanding(but=1))
        )
        batch.output_ids = result.next_token_ids
        self._in_flight.launched(step, batch, result)
        self._lifecycle.events.num_input_tokens += batch.num_input_tokens
        self._tell_of_extends(step)
        self.role.on_step_launched(result.layers_done)

    def _tell_of_extends(self, step: LaunchedStep) -> None:
        for req, span in zip(step.reqs, step.spans, strict=False):
            self.role.on_extend_launched(req, start=span.start, end=span.end, draws=span.draws)

    def _lose(self, batch: ScheduleBatch, error: StepMemoryError) -> None:
        """The batch was not computed. The tokens that earlier steps drew for it still count."""
        split = batch is self._split.batch
        if not split:
            self._in_flight.give_up()
        self._settle_outstanding()
        if self.chunked_req in batch.reqs:
            self.chunked_req = None
        if split:
            self._split.give_up(error)
            return
        spans = extend_spans(batch)
        starts = [span.start for span in spans]
        starts += [req.kv_committed_len - 1 for req in batch.reqs[len(spans) :]]
        for req, start in zip(list(batch.reqs), starts, strict=True):
            self._lifecycle.on_step_lost(req, kv_len=start, error=error)
        self.running_batch.filter_batch()

    def _settle_outstanding(self, *, but: int = 0) -> None:
        """Handles the results of launched steps, oldest first, until `but` are left.

        Called with 0, and at the price of this pass's overlap, wherever outputs must be known to
        the last token: before a retraction or a preemption, since the outputs are prompt then.
        """
        while len(self._in_flight) > but:
            self.running_batch.on_results(self._results.process_oldest().reqs)
            self._lifecycle.events.num_handled += 1

    def get_next_batch_to_run(self) -> ScheduleBatch | None:
        """Section 1. A new prefill goes first; otherwise the running batch decodes."""
        if self._may_preempt():
            self._settle_outstanding()
        self._settle_aborts()
        self.memory.check_hicache_events()
        self.move_ready_grammar_requests()
        self._drop_expired()
        self.running_batch.drop_ended(self._lifecycle.num_endings)
        self.running_batch.batch_is_full = False
        if len(self._in_flight) == 0:
            self._make_room_for_ticket()
        if self._split.batch is not None:
            self._join_prebuilt()
            decode = self.update_running_batch() if self._split.decode_is_next() else None
            return decode if decode is not None else self._split.batch

        chunked_req_to_exclude: set[Req] = set()
        if self._chunked_gives_way() and len(self._in_flight) == 0:
            self.num_preemptions += 1
            self._send_chunked_back()
        if self.chunked_req is not None:
            chunked_req_to_exclude.add(self.chunked_req)
            # A prefill-only worker's role may be reading the very pages that would be replaced.
            self._in_flight.cache_unfinished_req(
                self.chunked_req, replace_duplicates=self.role.decodes
            )
        last_batch, self.last_batch = self.last_batch, None
        if last_batch is not None and last_batch.forward_mode.is_extend():
            if last_batch.chunked_req is not None:
                chunked_req_to_exclude.add(last_batch.chunked_req)
            last_batch.filter_batch(chunked_req_to_exclude)
            if not last_batch.is_prefill_only:
                self._merge_into_running(last_batch)
        self._join_prebuilt()

        new_batch = self.get_new_batch_prefill()
        if self.memory.retracted is not None:
            self.memory.retracted.put_back_unclaimed()
        return new_batch if new_batch is not None else self.update_running_batch()

    def get_new_batch_prefill(self) -> ScheduleBatch | None:
        """Section 2: the chunked request and waiting ones, as far as memory and work allow."""
        if not self.waiting_queue and self.chunked_req is None:
            return None
        promises = list(self.role.promises())
        allocatable = self.get_num_allocatable_reqs(len(promises))
        # A victim must have its last token: with a step in flight it is the next pass's.
        preempting = len(self._in_flight) == 0 and self._may_preempt()
        if allocatable <= 0 and self.chunked_req is None and not preempting:
            self.running_batch.batch_is_full = True
            return None
        if self._shared is not None:
            self._shared.begin_pass(self.chunked_req)
        adder = self._make_adder(sum(unbound_tokens(p, self.page_size) for p in promises))
        if self.chunked_req is not None:
            chunked = self.chunked_req
            chunked.init_next_round_input()
            self.chunked_req = adder.add_chunked_req(chunked)
            if not adder.can_run_list:
                return None  # parked: nobody may overtake it into the memory it waits for
        admission = WaitingAdmission(
            adder=adder,
            places=allocatable,
            lora_slots=self.lora_slots,
            promised_loras=promised_loras(promises, self.prebuilt),
            preemption_threshold=(
                self.config.priority_preemption_threshold if preempting else None
            ),
        )
        admission.run(self.policy.calc_priority(self.waiting_queue))
        self.running_batch.batch_is_full = admission.out_of_places
        batch = adder.get_batch()
        prepared = None if batch is None else self._start_prefill(adder, batch)
        self.num_preemptions += len(adder.preempt_list)
        self.waiting_room.put_back(adder.preempt_list)
        return prepared

    def get_num_allocatable_reqs(self, num_promised: int = 0) -> int:
        """Requests that may still join: the running limit and the rows, less what is promised."""
        running = self.running_batch.batch_size() + (self.chunked_req is not None)
        rows = self.memory.req_to_token.available_size() + len(self.newcomers.rows)
        waiting_to_join = num_promised + len(self.prebuilt)
        return min(self.config.max_running_requests - running, rows) - waiting_to_join

    def update_running_batch(self) -> ScheduleBatch | None:
        """The running batch, prepared for one decode step; retracts where memory is short."""
        batch = self.running_batch
        if batch.is_empty():
            if not self._lifecycle.live:
                self.new_token_ratio.on_idle()
            return None
        reserved = self._promised_tokens()
        fits = batch.check_decode_mem(reserved_tokens=reserved)
        if not fits and len(self._in_flight) > 0:
            # Who has ended gives memory back, and who is retracted must be known to its last token.
            self._settle_outstanding()
            batch.filter_batch()
            if batch.is_empty():
                return None
            fits = batch.check_decode_mem(reserved_tokens=reserved)
        if fits:
            self.new_token_ratio.on_decode()
        else:
            result = batch.retract_decode(reserved_tokens=reserved)
            self.num_retractions += len(result.retracted)
            self.new_token_ratio.on_retraction(result.new_token_ratio)
            self.waiting_room.put_back(result.retracted)
            if result.does_not_fit is not None and not self._make_last_fit(result.does_not_fit):
                return None
        batch.prepare_for_decode()
        return batch

    # ---- parts of a pass

    def _settle_aborts(self) -> None:
        aborts, self._deferred_aborts = self._deferred_aborts, []
        for req in aborts:
            if req is self.chunked_req:
                self.chunked_req = None
            self._lifecycle.abort(req)
        if aborts:
            self._split.drop_if_nobody_waits(self._settle_outstanding)

    def move_ready_grammar_requests(self) -> None:
        """Requests whose grammar is compiled join the others; one that is wrong is the client's
        error."""
        for req, error, waited_here in self.grammar_queue.settled(time.monotonic()):
            if self._lifecycle.live.get(req.rid) is not req:
                if error is not None:
                    self.role.on_grammar_failed(req, error)
            elif error is not None:
                self.prebuilt.pop(req, None)
                self._lifecycle.fail(req, error)
            elif waited_here:
                self.waiting_queue.append(req)

    def _drop_expired(self) -> None:
        """Before it costs a forward: a request that waits and that nobody waits for any more."""
        now = time.monotonic()
        for req in self.waiting_room.expired(now):
            self._leave_queue(req)
            self.waiting_room.expire(req, now)

    def _may_preempt(self) -> bool:
        """Whether somebody who runs could give way to the first who waits; if not to that one, then
        to none behind it."""
        if not self.config.enable_priority_scheduling or not self.role.decodes:
            return False
        if self._ticket_room.wanted_by() is not None or self._chunked_gives_way():
            return True
        first = self.waiting_queue.first()
        if first is None:
            return False
        above = first.priority + self.config.priority_preemption_threshold
        return any(req.priority > above for req in self.running_requests())

    def _chunked_gives_way(self) -> bool:
        """Whether the first who waits is so much more important than the one in chunks that this
        one goes back to the queue, parked or not. Not on a prefill worker: there the KV of its
        chunks is on its way to decode already."""
        first, chunked = self.waiting_queue.first(), self.chunked_req
        if first is None or chunked is None or chunked.finished():
            return False
        if not self.config.enable_priority_scheduling or not self.role.decodes:
            return False
        if chunked.priority <= first.priority + self.config.priority_preemption_threshold:
            return False
        return self.lora_slots.has_room_for(first.lora_id)

    def _send_chunked_back(self) -> None:
        """What it has computed stays in the tree as long as there is room."""
        chunked, self.chunked_req = self.chunked_req, None
        if chunked is not None:
            self.running_batch.release_req(chunked)
            chunked.reset_for_retract()
            self.waiting_room.put_back([chunked])

    def _make_room_for_ticket(self) -> None:
        req = self._ticket_room.wanted_by()
        if req is None:
            return
        victims = self._ticket_room.make(req)
        self.num_preemptions += len(victims)
        self.waiting_room.put_back(victims)
        if victims:
            self.role.on_room_made()

    def _merge_into_running(self, batch: ScheduleBatch) -> None:
        if batch.is_empty():
            return
        if self.running_batch.is_empty():
            self.running_batch = batch
        else:
            self.running_batch.merge_batch(batch)

    def _join_prebuilt(self) -> None:
        """Merges requests that came by transfer, as far as rows reach."""
        ready = [req for req in self.prebuilt if not self.grammar_queue.is_pending(req)]
        for req in ready:
            has_row = req in self.newcomers or self.memory.req_to_token.available_size() > 0
            if has_row and self.lora_slots.try_acquire(req):
                self._join(req, self.prebuilt.pop(req))

    def _join(self, req: Req, first_token: int) -> None:
        batch = self.newcomers.take(req)
        if batch is None:
            batch = self._batch_of([req])
            batch.prepare_for_prebuilt()
        else:
            batch.begin_prebuilt()
        batch.process_prebuilt([first_token])
        self._newly_joined.append(req)
        self._in_flight.clock.joins()
        req.phase = RequestPhase.RUNNING
        if req.finished():
            self._lifecycle.finish(req)
        batch.filter_batch()
        self._merge_into_running(batch)

    def _refuse_spoilt(self) -> None:
        """Waits for the checks of KV that came by transfer, behind all that is prepared for the
        launch: no kernel reads it before. Whoever has spoilt KV is computed along with the others,
        since the batch is made; nothing of that is handed out."""
        for req in self._newly_joined:
            if not req.kv_is_good():
                self.abort_request(req.rid)

    def _teach_tree(self) -> None:
        """Prompts that came by transfer, once their first step is on its way, which need not wait
        for that. A page of the tree may take the place of one that arrived."""
        joined, self._newly_joined = self._newly_joined, []
        for req in joined:
            if req.phase is RequestPhase.RUNNING and not req.finished():
                self._in_flight.cache_unfinished_req(req)

    def _make_adder(self, reserved_tokens: int) -> PrefillAdder:
        mixed = self.running_batch.batch_size() if self.is_mixed_chunk else 0
        # However many rows decode along, a page of prompt goes on (as many as are taken at once),
        # or prompts would starve.
        align = self.config.truncation_align_size or self.page_size
        least = mixed + ceil_page(align, self.page_size)
        chunk = self.config.chunked_prefill_size
        return PrefillAdder(
            self.page_size,
            self.memory.tree_cache,
            self.memory.allocator,
            self.running_batch,
            self.new_token_ratio.current,
            max(self.config.max_prefill_tokens, least),
            None if chunk is None else max(min(chunk, self.config.max_prefill_tokens), least),
            mixed,
            prefill_only=not self.role.decodes,
            reserved_tokens=reserved_tokens,
            truncation_align_size=self.config.truncation_align_size,
            shared=self._shared,
        )

    def _start_prefill(self, adder: PrefillAdder, batch: ScheduleBatch) -> ScheduleBatch:
        for req in batch.reqs:
            if req in self.waiting_queue:
                self.waiting_queue.remove(req)
            if req.t_first_forward == 0.0:
                self.prefix_query_tokens += req.seqlen
                self.prefix_hit_tokens += req.prefix_len
            req.begin_extend()
        self.chunked_req = adder.new_chunked_req or self.chunked_req
        if self.chunked_req is not None:
            self.chunked_req.phase = RequestPhase.CHUNKED
        batch.chunked_req = self.chunked_req
        batch.prepare_for_extend()
        if self._split.enabled:
            self._split.begin(batch)
        running = self.running_batch
        if (
            self.is_mixed_chunk
            and not running.is_empty()
            and not (batch.return_logprob or running.return_logprob)
            and running.check_decode_mem(reserved_tokens=self._promised_tokens())
        ):
            running.prepare_for_decode()
            batch.mix_with_running(running)
            self.running_batch = self._batch_of([])
        return batch

    def _make_last_fit(self, req: Req) -> bool:
        """The only running request has no room for its next token. A half-done prompt gives way
        first; while transfers keep memory, it waits for them; otherwise it ends with an error,
        since no process may die for want of memory.
        """
        if self._split.batch is not None or self._deferred_aborts:
            return False  # these give memory back without a page more
        if self.chunked_req is not None:
            self._send_chunked_back()
            self.num_retractions += 1
            if self.running_batch.check_decode_mem():
                return True
        others = self.prebuilt or self.transferring or self.held
        if others or any(pages for _, pages in self.role.page_owners()):
            return False
        error = OutOfMemoryError(
            f"request {req.rid}: no KV page is left for token {req.seqlen} although it runs alone "
            f"({self.memory.allocator.num_pages} pages of {self.page_size} tokens in all)"
        )
        self._lifecycle.fail(req, error)
        self.running_batch.filter_batch()
        return False

    @property
    def is_mixed_chunk(self) -> bool:
        """Whether running requests take part in the steps of prompts."""
        return self.config.enable_mixed_chunk and not self._split.enabled

    def _promised_tokens(self) -> int:
        return sum(unbound_tokens(p, self.page_size) for p in self.role.promises())

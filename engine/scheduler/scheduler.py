"""The scheduler: one pass decides what runs, runs it, and hands out what came of it.

Single-threaded. It composes: `RequestLifecycle` (who is live), `PrefillAdder` (what a prefill may
take), `ScheduleBatch` (rows, pages, tensors), `ResultProcessor` (what was drawn). Rules and names
are the seed's (scheduling.md sections 1 and 2).
"""

from collections.abc import Iterator, Sequence

import torch

from engine.errors import EngineError, OutOfMemoryError, QueueFullError
from engine.execution.forward_batch import BatchRunner
from engine.memory.audit import PageCounts, RowCounts
from engine.memory.pools import MemoryPools
from engine.scheduler.admission import DecodeAdmission, unbound_tokens
from engine.scheduler.balance import MemoryBalance
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.new_token_ratio import NewTokenRatio
from engine.scheduler.policy import SchedulePolicy
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.results import ResultProcessor
from engine.scheduler.role import SchedulerRole
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.step_result import StepResult
from engine.scheduler.validation import validate_memory, validate_request
from engine.types import RequestId


class Scheduler:
    """All requests of one engine. Every method is called from one thread."""

    def __init__(
        self,
        config: SchedulerConfig,
        runner: BatchRunner,
        memory: MemoryPools,
        role: SchedulerRole | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises `ConfigError` where config, memory and device do not belong together."""
        validate_memory(config=config, memory=memory, device=torch.device(device))
        self.config = config
        self.runner = runner
        self.memory = memory
        self.role = role if role is not None else SchedulerRole()
        self.page_size = config.page_size

        self.waiting_queue: list[Req] = []
        self.chunked_req: Req | None = None
        self.running_batch = self._batch_of([])
        self.last_batch: ScheduleBatch | None = None
        self.prebuilt: dict[Req, int] = {}
        """Requests whose KV has arrived, with their first token; they join on the next pass."""
        self.policy = SchedulePolicy(enable_priority_scheduling=config.enable_priority_scheduling)
        self.new_token_ratio = NewTokenRatio(config.schedule_conservativeness)
        self.num_retractions = 0
        self.admission = DecodeAdmission(self)
        self._lifecycle = RequestLifecycle(memory, self.role)
        self._results = ResultProcessor(self._lifecycle, memory, self.role)
        self._balance = MemoryBalance(self._lifecycle, memory, self.role)
        self._deferred_aborts: list[Req] = []
        self.role.attach(self)

    # ---- requests come and go

    def check_request(self, req: Req) -> None:
        """What `add_request` and `add_prebuilt` check first; a role asks before it promises
        anything. Raises `InvalidRequestError` or `DuplicateRequestError`.
        """
        self._lifecycle.check_new(req.rid)
        validate_request(
            req,
            config=self.config,
            total_tokens=self.memory.allocator.total_tokens,
            prefill_only=not self.role.decodes,
        )

    def add_request(self, req: Req) -> None:
        """Queues a request. Raises `InvalidRequestError`, `DuplicateRequestError` or
        `QueueFullError`; then nothing of it stays here.
        """
        self.check_request(req)
        if len(self.waiting_queue) >= self.config.max_queued_requests:
            raise QueueFullError(
                f"request {req.rid}: {len(self.waiting_queue)} requests wait already, the bound "
                "(--max-queued-requests); try again later"
            )
        self._lifecycle.add(req, RequestPhase.WAITING)
        self.waiting_queue.append(req)

    def add_prebuilt(self, req: Req, pages: Sequence[int], first_token: int) -> None:
        """Takes over a request whose prompt's KV (and that of replayed outputs) is in `pages`,
        which belong to the scheduler from now on. `first_token` was drawn and delivered elsewhere;
        the first output here is the one after it. Raises like `add_request`, or `EngineError` for
        pages that do not fit the length, and then takes nothing.
        """
        self.check_request(req)
        if len(pages) != -(-req.seqlen // self.page_size):
            raise EngineError(
                f"request {req.rid}: {len(pages)} pages came for {req.seqlen} tokens of KV"
            )
        req.pages = list(pages)
        req.kv_committed_len = req.seqlen
        self._lifecycle.add(req, RequestPhase.PREBUILT)
        self.prebuilt[req] = first_token

    def lock_prefix(self, req: Req) -> list[int]:
        """Locks what the tree has of a request that will come by `add_prebuilt`, in whole pages:
        the first of the `pages` given later."""
        req.init_next_round_input(self.memory.tree_cache, computed_here=False)
        if req.last_node is not None:
            self.memory.tree_cache.inc_lock_ref(req.last_node)
        return list(req.pages)

    def unlock_prefix(self, req: Req) -> None:
        """Undoes `lock_prefix` where the request does not come after all."""
        if req.last_node is not None:
            self.memory.tree_cache.dec_lock_ref(req.last_node)
        req.drop_match()

    def abort_request(self, rid: RequestId) -> bool:
        """Ends a request in whatever phase it is; no token comes any more. False: it is unknown or
        over. What a batch still refers to is given back at the start of the next pass, the rest
        now; `StepResult.aborted` tells.
        """
        req = self._lifecycle.live.get(rid)
        if req is None or req.finished():
            return False
        if req.phase in (RequestPhase.CHUNKED, RequestPhase.RUNNING):
            req.finish_reason = FinishReason.ABORT
            self._deferred_aborts.append(req)
            return True
        if req.phase is RequestPhase.WAITING:
            self.waiting_queue.remove(req)
        self.prebuilt.pop(req, None)
        self._lifecycle.abort(req)
        return True

    def release_request(self, req: Req) -> None:
        """For the role: nobody reads this request's pages any more (it may own none). Raises
        `EngineError` for one that still runs or waits: abort it first."""
        self._lifecycle.release(req)

    def request_pages(self, req: Req) -> list[int]:
        """Pages with the KV of the first `req.kv_committed_len` tokens, in order."""
        return req.pages[: -(-req.kv_committed_len // self.page_size)]

    def find_request(self, rid: RequestId) -> Req | None:
        """The live request of that id."""
        return self._lifecycle.live.get(rid)

    @property
    def transferring(self) -> dict[RequestId, Req]:
        return self._lifecycle.transferring

    @property
    def held(self) -> set[Req]:
        """Ended requests whose pages the role still reads."""
        return self._lifecycle.held

    def running_requests(self) -> Iterator[Req]:
        """Those that decode, in a batch or about to join it."""
        yield from (req for req in self.running_batch.reqs if not req.finished())
        if self.last_batch is not None and self.last_batch is not self.running_batch:
            for req in self.last_batch.reqs:
                if req.phase is RequestPhase.RUNNING and not req.finished():
                    yield req

    def returning_requests(self) -> Iterator[Req]:
        """Those that will take memory for their prompt here, now or again."""
        yield from self.waiting_queue
        if self.chunked_req is not None:
            yield self.chunked_req

    def has_work(self) -> bool:
        """Whether `step` has something to do now. Requests in transfer wait for their role."""
        return bool(
            self.waiting_queue
            or self.chunked_req is not None
            or self.prebuilt
            or self._deferred_aborts
            or self._lifecycle.has_events()
            or next(self.running_requests(), None) is not None
            or self.role.has_work()
        )

    # ---- one pass

    def step(self) -> StepResult:
        """One pass: polls the role, chooses a batch, runs it, processes what it drew. Errors of
        the runner pass through; the engine cannot go on after one.
        """
        self.role.poll()
        batch = self.get_next_batch_to_run()
        if batch is not None:
            result = self.runner.forward(batch.to_forward_batch())
            self._results.process(batch, result)
        self.last_batch = batch
        return self._lifecycle.take_events()

    def get_next_batch_to_run(self) -> ScheduleBatch | None:
        """Section 1. A new prefill goes first; otherwise the running batch decodes."""
        self._settle_aborts()
        self.running_batch.filter_batch()
        self.running_batch.batch_is_full = False

        chunked_req_to_exclude: set[Req] = set()
        if self.chunked_req is not None:
            chunked_req_to_exclude.add(self.chunked_req)
            # A prefill-only worker's role may be reading the very pages that would be replaced.
            self.memory.tree_cache.cache_unfinished_req(
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
        return new_batch if new_batch is not None else self.update_running_batch()

    def get_new_batch_prefill(self) -> ScheduleBatch | None:
        """Section 2: the chunked request and waiting ones, as far as memory and work allow."""
        if not self.waiting_queue and self.chunked_req is None:
            return None
        promises = list(self.role.promises())
        allocatable = self.get_num_allocatable_reqs(len(promises))
        if allocatable <= 0 and self.chunked_req is None:
            self.running_batch.batch_is_full = True
            return None
        self.policy.calc_priority(self.waiting_queue)
        adder = self._make_adder(sum(unbound_tokens(p, self.page_size) for p in promises))
        if self.chunked_req is not None:
            chunked = self.chunked_req
            chunked.init_next_round_input()
            self.chunked_req = adder.add_chunked_req(chunked)
            if not adder.can_run_list:
                return None  # parked: nobody may overtake it into the memory it waits for
        continued = len(adder.can_run_list)
        for req in self.waiting_queue:
            if len(adder.can_run_list) - continued >= allocatable:
                self.running_batch.batch_is_full = True
                break
            if adder.add_req(req) is not AddReqResult.CONTINUE:
                break
        batch = adder.get_batch()
        return None if batch is None else self._start_prefill(adder, batch)

    def get_num_allocatable_reqs(self, num_promised: int = 0) -> int:
        """Requests that may still join: the running limit and the rows, less what is promised."""
        running = self.running_batch.batch_size() + (self.chunked_req is not None)
        rows = self.memory.req_to_token.available_size()
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
        if batch.check_decode_mem(reserved_tokens=reserved):
            self.new_token_ratio.on_decode()
        else:
            result = batch.retract_decode(reserved_tokens=reserved)
            self.num_retractions += len(result.retracted)
            self.new_token_ratio.on_retraction(result.new_token_ratio)
            self.waiting_queue.extend(result.retracted)
            if result.does_not_fit is not None and not self._make_last_fit(result.does_not_fit):
                return None
        batch.prepare_for_decode()
        return batch

    # ---- parts of a pass

    def _batch_of(self, reqs: list[Req]) -> ScheduleBatch:
        return ScheduleBatch(reqs=reqs, memory=self.memory, vocab_size=self.config.vocab_size)

    def _settle_aborts(self) -> None:
        aborts, self._deferred_aborts = self._deferred_aborts, []
        for req in aborts:
            if req is self.chunked_req:
                self.chunked_req = None
            self._lifecycle.abort(req)

    def _merge_into_running(self, batch: ScheduleBatch) -> None:
        if batch.is_empty():
            return
        if self.running_batch.is_empty():
            self.running_batch = batch
        else:
            self.running_batch.merge_batch(batch)

    def _join_prebuilt(self) -> None:
        """Merges requests that came by transfer, as far as rows reach."""
        rows = self.memory.req_to_token.available_size()
        joining = [(req, self.prebuilt[req]) for req in list(self.prebuilt)[:rows]]
        if not joining:
            return
        batch = self._batch_of([req for req, _ in joining])
        batch.prepare_for_prebuilt()
        batch.process_prebuilt([token for _, token in joining])
        for req, _ in joining:
            del self.prebuilt[req]
            req.phase = RequestPhase.RUNNING
            if req.finished():
                self._lifecycle.finish(req)
        batch.filter_batch()
        self._merge_into_running(batch)

    def _make_adder(self, reserved_tokens: int) -> PrefillAdder:
        mixed = self.running_batch.batch_size() if self.config.enable_mixed_chunk else 0
        # However many rows decode along, a page of prompt goes on, or prompts would starve.
        least = mixed + self.page_size
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
        )

    def _start_prefill(self, adder: PrefillAdder, batch: ScheduleBatch) -> ScheduleBatch:
        admitted = set(batch.reqs)
        self.waiting_queue = [req for req in self.waiting_queue if req not in admitted]
        for req in batch.reqs:
            req.begin_extend()
        self.chunked_req = adder.new_chunked_req or self.chunked_req
        if self.chunked_req is not None:
            self.chunked_req.phase = RequestPhase.CHUNKED
        batch.chunked_req = self.chunked_req
        batch.prepare_for_extend()
        running = self.running_batch
        if (
            self.config.enable_mixed_chunk
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
        if self.chunked_req is not None:
            chunked, self.chunked_req = self.chunked_req, None
            self.running_batch.release_req(chunked)
            chunked.reset_for_retract()
            self.num_retractions += 1
            self.waiting_queue.append(chunked)
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

    def _promised_tokens(self) -> int:
        return sum(unbound_tokens(p, self.page_size) for p in self.role.promises())

    # ---- the invariant

    def page_counts(self) -> PageCounts:
        """Pages by state, recounted from their owners; balanced or not."""
        return self._balance.audit().counts

    def row_counts(self) -> RowCounts:
        """Rows by state; raises `MemoryInvariantError` where they do not balance."""
        return self._balance.row_counts()

    def check_invariant(self) -> None:
        """Raises `MemoryInvariantError` if a page, a row or a lock is not accounted for."""
        self._balance.check()

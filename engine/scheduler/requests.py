"""Who is here: how a request comes to the scheduler, is found there, and goes.

The other half of `Scheduler`, which decides what runs. Nothing here waits for a device.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from engine.errors import EngineError, QueueFullError
from engine.execution.forward_batch import BatchRunner
from engine.grammar.compiler import GrammarCompiler
from engine.memory.audit import PageCounts, RowCounts
from engine.memory.pools import MemoryPools
from engine.memory.prefix_cache import LoadBack
from engine.scheduler.balance import MemoryBalance
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.grammar_queue import GrammarQueue
from engine.scheduler.in_flight import StepsInFlight
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.lora_slots import LoraSlots
from engine.scheduler.new_token_ratio import NewTokenRatio
from engine.scheduler.newcomers import Newcomers
from engine.scheduler.policy import SchedulePolicy
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.results import ResultProcessor
from engine.scheduler.role import SchedulerRole
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.shared_prefixes import SharedPrefixes
from engine.scheduler.split_prefill import SplitPrefill
from engine.scheduler.step_result import TokenOutput
from engine.scheduler.validation import validate_memory, validate_request
from engine.scheduler.waiting_room import WaitingRoom
from engine.types import RequestId


class SchedulerRequests:
    """All requests of one engine, and what they share. `Scheduler` adds the passes."""

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
        validate_memory(config=config, memory=memory, device=torch.device(device))
        self.config = config
        self.runner = runner
        self.memory = memory
        self.role = role if role is not None else SchedulerRole()
        self.page_size = config.page_size

        self.policy = SchedulePolicy(
            config.schedule_policy,
            tree_cache=memory.tree_cache,
            enable_priority_scheduling=config.enable_priority_scheduling,
            seed=config.schedule_seed,
        )
        self.waiting_queue = self.policy.make_queue()
        self.grammar_queue = GrammarQueue(grammars)
        self.chunked_req: Req | None = None
        self.running_batch = self._batch_of([])
        self.last_batch: ScheduleBatch | None = None
        self.prebuilt: dict[Req, int] = {}
        """Requests whose KV has arrived, with their first token; they join on the next pass."""
        self.newcomers = Newcomers(memory.req_to_token, self._batch_of)
        """Of those, and of others whose KV is still to arrive, the ones that are described."""
        self.new_token_ratio = NewTokenRatio(config.schedule_conservativeness)
        self.num_retractions = 0
        self.num_preemptions = 0
        """Requests that ran and gave way to a more important one."""
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        """Prompt tokens of requests whose first extend began, and those of them that were
        cached."""
        self.lora_slots = LoraSlots(config.max_loras_per_batch)
        self._lifecycle = RequestLifecycle(memory, self.role, self.lora_slots)
        self.waiting_room = WaitingRoom(
            config, self.waiting_queue, self._lifecycle, self.lora_slots
        )
        self._shared = SharedPrefixes(self.page_size) if self.policy.looks_at_the_tree else None
        self._in_flight = StepsInFlight(memory)
        self._split = SplitPrefill(
            config.split_prefill_layers, runner, self._in_flight, self._lifecycle
        )
        self._results = ResultProcessor(self._lifecycle, memory, self.role, self._in_flight)
        self._balance = MemoryBalance(
            self._lifecycle, memory, self.role, self._in_flight, self.lora_slots, self.newcomers
        )
        self._deferred_aborts: list[Req] = []

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

    def prepare_grammar(self, req: Req) -> None:
        """Starts compiling the grammar of a request that will be added later, if it has one; a role
        learns by `on_grammar_failed` that it will not be. Undone by `grammar_queue.discard`. Raises
        `GrammarsUnavailableError` or `QueueFullError`.
        """
        self.grammar_queue.start(req, time.monotonic())

    def add_request(self, req: Req) -> None:
        """Queues a request, behind its grammar if that is still to be compiled. Raises
        `InvalidRequestError`, `DuplicateRequestError`, `GrammarsUnavailableError` or
        `QueueFullError`; then nothing of it stays here.
        """
        self.check_request(req)
        self.prepare_grammar(req)
        try:
            num_waiting = len(self.waiting_queue) + len(self.grammar_queue)
            self.waiting_room.make_room_for(req, num_waiting)
        except QueueFullError:
            self.grammar_queue.discard(req.rid)
            raise
        self._lifecycle.add(req, RequestPhase.WAITING)
        self.waiting_room.watch(req)
        if not self.grammar_queue.hold(req):
            self.waiting_queue.append(req)

    def expect_prebuilt(self, req: Req, pages: Sequence[int]) -> None:
        """Describes a request that is to come by `add_prebuilt` with these pages, so that its join
        takes less time then. It costs a row; undone by `unlock_prefix`."""
        self.newcomers.describe(req, pages)

    def add_prebuilt(
        self,
        req: Req,
        pages: Sequence[int],
        first_token: int,
        *,
        kv_check: Callable[[], bool] | None = None,
    ) -> None:
        """Takes over a request whose prompt's KV (and that of replayed outputs) is in `pages`,
        which belong to the scheduler from now on. `first_token` was drawn and delivered elsewhere;
        the first output here is the one after it. It joins when its grammar is compiled. `kv_check`
        (see `Req.check_kv_by`): the KV is still being checked; where it turns out spoilt, the
        request is aborted and its pages are lent to nobody. Raises
        like `add_request`, or `EngineError` for pages that do not fit the length, and then takes
        nothing.
        """
        self.check_request(req)
        self.prepare_grammar(req)
        if len(pages) != -(-req.seqlen // self.page_size):
            raise EngineError(
                f"request {req.rid}: {len(pages)} pages came for {req.seqlen} tokens of KV"
            )
        req.pages = list(pages)
        req.kv_committed_len = req.kv_ready_len = req.seqlen
        if kv_check is not None:
            req.check_kv_by(kv_check)
        self._lifecycle.add(req, RequestPhase.PREBUILT)
        self.newcomers.confirm(req, pages)
        self.prebuilt[req] = first_token

    def lock_prefix(self, req: Req) -> list[int]:
        """Locks what the tree has of a request that will come by `add_prebuilt`, in whole pages:
        the first of the `pages` given later."""
        req.init_next_round_input(self.memory.tree_cache, computed_here=False)
        if req.last_node is not None:
            self.memory.tree_cache.inc_lock_ref(req.last_node)
        return list(req.pages)

    def load_prefix(self, req: Req) -> LoadBack:
        """Brings back what host memory holds right behind the prefix that `lock_prefix` found.
        DONE or PENDING: unlock it and look again, now or in a later pass, for a longer one; the
        caller has found that there is memory for all of the request."""
        if req.last_host_node is None or req.host_hit_len == 0:
            return LoadBack.NOTHING
        return self.memory.tree_cache.load_back(req.last_host_node)

    def unlock_prefix(self, req: Req) -> None:
        """Undoes `lock_prefix` and `expect_prebuilt` where the request does not come after all."""
        self.newcomers.drop(req)
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
            self._leave_queue(req)
        if self.prebuilt.pop(req, None) is not None:
            self.newcomers.drop(req)
            self.grammar_queue.discard(rid)
        self._lifecycle.abort(req)
        return True

    def release_request(self, req: Req) -> None:
        """For the role: nobody reads this request's pages any more (it may own none). Raises
        `EngineError` for one that still runs or waits: abort it first."""
        self._lifecycle.release(req)

    def request_pages(self, req: Req) -> list[int]:
        """Pages with the KV of the first `req.kv_ready_len` tokens, in order."""
        return req.pages[: -(-req.kv_ready_len // self.page_size)]

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
        for batch in (self.last_batch, self._split.batch):
            if batch is None or batch is self.running_batch:
                continue
            for req in batch.reqs:
                if req.phase is RequestPhase.RUNNING and not req.finished():
                    yield req

    def returning_requests(self) -> Iterator[Req]:
        """Those that will take memory for their prompt here, now or again."""
        yield from self.waiting_queue
        yield from self.grammar_queue
        if self.chunked_req is not None:
            yield self.chunked_req

    def take_outputs(self) -> list[TokenOutput]:
        """Tokens drawn in this pass that nobody has taken; its `StepResult` lacks them then."""
        outputs, self._lifecycle.events.outputs = self._lifecycle.events.outputs, []
        return outputs

    def queue_lengths(self) -> dict[str, int]:
        """Live requests by where they are, each in one place: waiting, prebuilt (KV came, joins the
        batch), running (computed or decoded, in chunks too), transferring (a transfer reads it)."""
        waiting = len(self.waiting_queue) + len(self.grammar_queue)
        elsewhere = waiting + len(self.prebuilt) + len(self.transferring)
        return {
            "waiting": waiting,
            "prebuilt": len(self.prebuilt),
            "running": len(self._lifecycle.live) - elsewhere,
            "transferring": len(self.transferring),
        }

    def has_work(self) -> bool:
        """Whether `step` has something to do now. Requests in transfer wait for their role."""
        return bool(
            self.waiting_queue
            or self.chunked_req is not None
            or any(not self.grammar_queue.is_pending(req) for req in self.prebuilt)
            or self.grammar_queue.has_settled(time.monotonic())
            or self._deferred_aborts
            or len(self._in_flight) > 0
            or self._split.batch is not None
            or self._lifecycle.has_events()
            or next(self.running_requests(), None) is not None
            or self.memory.has_pending_copies()
            or self.role.has_work()
        )

    # ---- the invariant

    def page_counts(self) -> PageCounts:
        """Pages by state, recounted from their owners; balanced or not."""
        return self._balance.audit().counts

    def estimated_page_counts(self) -> PageCounts:
        """Pages by state as the books' counters have them: cheap, for figures while steps run."""
        return self._balance.estimate()

    def row_counts(self) -> RowCounts:
        """Rows by state; raises `MemoryInvariantError` where they do not balance."""
        return self._balance.row_counts()

    def check_invariant(self) -> None:
        """Raises `MemoryInvariantError` if a page, a row or a lock is not accounted for."""
        self._balance.check()

    # ---- for the passes

    def _batch_of(self, reqs: list[Req]) -> ScheduleBatch:
        return ScheduleBatch(
            reqs=reqs,
            memory=self.memory,
            vocab_size=self.config.vocab_size,
            enable_overlap=self.config.enable_overlap,
        )

    def _leave_queue(self, req: Req) -> None:
        """Takes a WAITING request out of the list that it waits in."""
        if not self.grammar_queue.discard(req.rid):
            self.waiting_queue.remove(req)

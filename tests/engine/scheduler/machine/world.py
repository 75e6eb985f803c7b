"""Runs an example on the real scheduler and judges every pass and every request's end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import engine.scheduler.scheduler as scheduler_module
from engine.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.scheduler.admission import fits_empty_worker
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.growth import Growth
from engine.scheduler.req import Req, RequestPhase
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_result import StepResult, TokenOutput
from engine.types import RequestId
from tests.engine.scheduler.async_runner import AsyncRunner
from tests.engine.scheduler.machine.cases import (
    Example,
    Expected,
    RequestScript,
    make_req,
    reference,
)
from tests.engine.scheduler.machine.chain import CONTEXT, VOCAB, ChainRunner
from tests.engine.scheduler.machine.grammars import SlowCompiler
from tests.engine.scheduler.machine.host import ChainCopier
from tests.engine.scheduler.machine.launches import Launch, LaunchRecorder
from tests.engine.scheduler.machine.roles import ScriptedDecode, ScriptedPrefill, ScriptedUnified

PREEMPTION_THRESHOLD = 3
IDLE_PASSES = 2
"""Passes in a row that may run nothing while somebody waits and nothing travels."""


@dataclass
class Journey:
    """One request as the outside sees it."""

    script: RequestScript
    expected: Expected
    req: Req
    arrived: int
    outputs: list[TokenOutput] = field(default_factory=list)
    refused: EngineError | None = None
    error: EngineError | None = None
    aborted: bool = False
    released: bool = False


class World:
    """A scheduler, its role, and all requests of one example."""

    def __init__(self, example: Example) -> None:
        setup = self.setup = example.setup
        self.now = 0
        self.memory = self._pools()
        self.runner = ChainRunner(self.memory)
        self.device = AsyncRunner(self.runner, self.memory)
        self.recorder = LaunchRecorder(
            self.device if setup.overlap else self.runner, self.runner, self._owner_of_row
        )
        self.scripts: dict[str, RequestScript] = {}
        self.role = self._role(example)
        compiler = SlowCompiler(lambda: self.now, setup.compile_passes)
        self.scheduler = Scheduler(
            self._config(),
            self.recorder,
            self.memory,
            self.role,
            grammars=compiler.as_compiler(),
        )
        self.journeys: dict[str, Journey] = {}
        self.to_come = list(enumerate(example.requests))
        self.to_abort: list[tuple[int, str]] = []
        self.idle = 0

    def _pools(self) -> MemoryPools:
        setup = self.setup

        def copier(num_pages: int) -> ChainCopier | None:
            if num_pages == 0:
                return None
            return ChainCopier(lambda: self.runner.kv, num_pages, setup.copy_looks, steps_so_far)

        def steps_so_far() -> Callable[[], None]:
            last = self.device.last_step
            return lambda: self.device.run_up_to(last)

        return make_memory_pools(
            num_pages=setup.pages,
            page_size=setup.page_size,
            num_rows=setup.rows,
            max_context_len=CONTEXT,
            enable_radix_cache=setup.radix,
            eviction_policy=setup.eviction,
            host_copier=copier(setup.host_pages),
            host_write_policy=setup.host_write,
            retract_copier=copier(setup.retract_pages),
        )

    def _role(self, example: Example) -> ScriptedUnified | ScriptedPrefill | ScriptedDecode:
        if self.setup.role == "prefill":
            sender = ScriptedPrefill(self.scripts)
            sender.kv = self.runner.kv
            return sender
        if self.setup.role == "decode":
            receiver = ScriptedDecode(self.scripts)
            receiver.kv = self.runner.kv
            return receiver
        return ScriptedUnified(example.squeezes)

    def _config(self) -> SchedulerConfig:
        setup = self.setup
        chunk = None if setup.chunk_pages is None else setup.chunk_pages * setup.page_size
        return SchedulerConfig(
            page_size=setup.page_size,
            context_length=CONTEXT,
            vocab_size=VOCAB,
            chunked_prefill_size=chunk,
            max_prefill_tokens=setup.max_prefill_pages * setup.page_size,
            max_running_requests=setup.max_running,
            max_queued_requests=setup.max_queued,
            enable_mixed_chunk=setup.mixed,
            enable_overlap=setup.overlap,
            split_prefill_layers=setup.split_layers,
            schedule_policy=setup.policy,
            enable_priority_scheduling=setup.priorities,
            priority_preemption_threshold=PREEMPTION_THRESHOLD,
            max_loras_per_batch=setup.max_loras,
            lora_ids=("A", "B", "C"),
            schedule_conservativeness=setup.conservativeness,
            decode_reserve_tokens=8,
        )

    def _owner_of_row(self, row: int) -> Req:
        (owner,) = [j.req for j in self.journeys.values() if j.req.req_pool_idx == row]
        return owner

    # ---- from outside

    def _arrive(self, number: int, script: RequestScript) -> None:
        rid = f"r{number}"
        expected = reference(script)
        self.scripts[rid] = script
        journey = Journey(script, expected, make_req(rid, script, expected, now=self.now), self.now)
        self.journeys[rid] = journey
        try:
            if isinstance(self.role, ScriptedDecode):
                self.scheduler.check_request(journey.req)
                self.scheduler.prepare_grammar(journey.req)
                first = expected.tokens[journey.req.prior_output_len]
                self.role.reservations.append((journey.req, first))
            else:
                self.scheduler.add_request(journey.req)
        except EngineError as error:
            journey.refused = error
            self._check_refusal(journey)
            return
        if script.abort_after is not None:
            self.to_abort.append((self.now + script.abort_after, rid))

    def _check_refusal(self, journey: Journey) -> None:
        """Nobody is sent away without a reason."""
        req, error = journey.req, journey.refused
        if isinstance(error, QueueFullError):
            waiting = len(self.scheduler.waiting_queue) + len(self.scheduler.grammar_queue)
            assert waiting >= self.setup.max_queued
            return
        assert isinstance(error, InvalidRequestError)
        limit = min(req.sampling_params.max_new_tokens, CONTEXT - req.prompt_len)
        if self.setup.role == "prefill":
            limit = req.prior_output_len + 1
        assert not fits_empty_worker(
            prompt_len=req.prompt_len,
            max_new_tokens=limit,
            total_tokens=self.setup.pages * self.setup.page_size,
            page_size=self.setup.page_size,
        )

    def _abort(self, rid: str) -> None:
        journey = self.journeys[rid]
        role = self.role
        if isinstance(role, ScriptedDecode) and self.scheduler.find_request(RequestId(rid)) is None:
            was_here = role.forget_reservation(RequestId(rid))
            if was_here:
                self.scheduler.grammar_queue.discard(RequestId(rid))
            elif rid in role.landings:
                role.drop(RequestId(rid))
                was_here = True
            journey.aborted |= was_here
            journey.released |= was_here
            return
        self.scheduler.abort_request(RequestId(rid))

    # ---- passes

    def run(self) -> None:
        """Time is the number of passes."""
        clock = SimpleNamespace(monotonic=lambda: float(self.now))
        with patch.object(scheduler_module, "time", clock):
            self._run()

    def _run(self) -> None:
        gap = self.to_come[0][1].gap
        bound = None
        while self.to_come or self._busy():
            while self.to_come and gap <= 0:
                self._arrive(*self.to_come.pop(0))
                gap = self.to_come[0][1].gap if self.to_come else 0
            gap -= 1
            for due, rid in self.to_abort:
                if due == self.now:
                    self._abort(rid)
            self.step()
            if not self.to_come:
                bound = self.now + self._passes_allowed() if bound is None else bound
                assert self.now < bound, f"no end after {self.now} passes: {self.describe()}"
        self._check_ends()

    def step(self) -> None:
        scheduler, now = self.scheduler, self.now
        launches = len(self.recorder.launches)
        late = [r for r in scheduler.waiting_queue if r.deadline is not None and r.deadline <= now]
        result = scheduler.step()
        for req in late:
            assert req not in scheduler.waiting_queue, f"{req} is late and waits"
            assert all(req not in launch.reqs for launch in self.recorder.launches[launches:])
        self._take(result)
        scheduler.check_invariant()
        self.device.check_pages()
        self._check_pass(result, self.recorder.launches[launches:])
        self.now += 1

    def _busy(self) -> bool:
        scheduler = self.scheduler
        compiling = len(scheduler.grammar_queue) > 0 or bool(scheduler.prebuilt)
        return scheduler.has_work() or compiling or self._travelling()

    def _travelling(self) -> bool:
        return self.role.in_transfer()

    def _take(self, result: StepResult) -> None:
        for output in result.outputs:
            journey = self.journeys[output.rid]
            assert not journey.aborted, "a token after the abort"
            assert not journey.outputs or journey.outputs[-1].finish_reason is None
            journey.outputs.append(output)
        for rid, error in result.errors:
            self.journeys[rid].error = error
        for rid in result.aborted:
            self.journeys[rid].aborted = True
        for rid in result.released:
            assert not self.journeys[rid].released, f"{rid} was released twice"
            self.journeys[rid].released = True

    def _passes_allowed(self) -> int:
        """Every pass computes a page of some prompt or a token of somebody, or waits for a
        transfer; what a retraction throws away may have to be computed once more, for each of the
        others that it made room for.
        """
        live = [j for j in self.journeys.values() if j.refused is None and not j.released]
        work = sum(
            len(j.expected.tokens) + 2 + len(j.req.fill_ids) // self.setup.page_size for j in live
        )
        return 50 + 3 * work + 2 * sum(j.script.transfer for j in live)

    # ---- what must hold

    def _check_pass(self, result: StepResult, launches: list[Launch]) -> None:
        scheduler, setup = self.scheduler, self.setup
        assert len(launches) <= 1
        for launch in launches:
            self._check_budgets(launch)
        if result.ran:
            self.idle = 0
        elif scheduler.waiting_queue or scheduler.chunked_req is not None:
            others = scheduler.prebuilt or scheduler.held or self.memory.has_pending_copies()
            self.idle += not (others or self._travelling())
            assert self.idle <= IDLE_PASSES, f"nothing runs, somebody waits: {self.describe()}"
        chunked = [j.req for j in self.journeys.values() if j.req.phase is RequestPhase.CHUNKED]
        assert len(chunked) <= 1, f"two chunked requests: {chunked}"
        assert scheduler.running_batch.batch_size() <= setup.max_running
        reqs = scheduler.running_batch.reqs
        if not any(req.finished() for req in reqs):
            counted, kept = Growth.of(reqs), scheduler.running_batch.growth()
            assert (counted.certain, counted.expected) == (kept.certain, kept.expected)
        adapters = {r.lora_id for r in scheduler.running_requests()} - {""}
        assert len(adapters) <= setup.max_loras
        self._check_tenants()
        self._check_promises()

    def _check_budgets(self, launch: Launch) -> None:
        """No pass computes more than it may."""
        setup = self.setup
        assert len({req.lora_id for req in launch.reqs} - {""}) <= setup.max_loras
        if not launch.mode.is_extend():
            return
        size = setup.page_size
        decode_rows = 0
        batch = self.scheduler.last_batch
        if launch.mode is ForwardMode.MIXED and batch is not None:
            decode_rows = batch.num_decode_rows
        extends = launch.extend_lens[: len(launch.extend_lens) - decode_rows]
        floor = (setup.max_running if setup.mixed else 0) + size
        work = max(setup.max_prefill_pages * size, floor)
        if setup.chunk_pages is not None:
            work = max(min(setup.chunk_pages * size, work), floor)
            assert sum(extends) <= work, f"{extends} in one pass, {work} allowed"
        elif len(extends) > 1:
            assert sum(extends) <= work, f"{extends} in one pass, {work} allowed"

    def _check_tenants(self) -> None:
        """What a request shares is of its own name space."""
        if not self.setup.radix:
            return
        for journey in self.journeys.values():
            node = journey.req.last_node
            if node is None:
                continue
            while node.parent is not None:
                node = node.parent
            assert node.namespace == journey.req.extra_key

    def _check_promises(self) -> None:
        """What was promised to a ticket is there until it binds."""
        if not isinstance(self.role, ScriptedDecode):
            return
        unbound = sum(
            -(-p.prompt_len // self.setup.page_size) * self.setup.page_size - p.prefix_len
            for p in self.role.promises()
            if not p.pages_allocated
        )
        running = list(self.scheduler.running_requests())
        if len(running) > 1:
            assert self.memory.available_tokens() >= unbound, self.describe()

    def _check_ends(self) -> None:
        for rid, journey in self.journeys.items():
            if journey.refused is None:
                self._check_end(rid, journey)
        counts = self.scheduler.page_counts()
        assert counts.balanced
        assert (counts.in_use, counts.held) == (0, 0)
        assert self.scheduler.row_counts().in_use == 0
        tree = self.memory.tree_cache
        assert tree.protected_size() == 0
        tree.evict(counts.total * self.setup.page_size)
        assert self.memory.allocator.free_pages == counts.total

    def _check_end(self, rid: str, journey: Journey) -> None:
        tokens = [output.token for output in journey.outputs]
        start = journey.req.prior_output_len
        first = start
        expected = journey.expected.tokens
        if isinstance(self.role, ScriptedDecode):
            first += 1
            if rid in [*self.role.lost, *self.role.short_of_memory, *self.role.wrong_grammar]:
                assert not tokens
                assert rid not in self.role.wrong_grammar or journey.script.grammar == 0
                return
            if journey.script.spoilt:
                assert not tokens, f"{rid}: tokens of KV that is not what was sealed"
                assert journey.released
                return
        elif isinstance(self.role, ScriptedPrefill):
            expected = expected[: start + 1]
        assert journey.released, f"{rid} was never let go: {journey.req}"
        assert tokens == expected[first : first + len(tokens)], f"{rid}: wrong tokens"
        assert [o.index for o in journey.outputs] == list(range(first, first + len(tokens)))
        if journey.script.logprobs:
            assert [o.logprob for o in journey.outputs] == [-float(t) for t in tokens]
        if journey.script.judged and journey.outputs and start == 0 == first:
            judged = journey.outputs[0].prompt
            assert judged is not None
            assert [t.token for t in judged] == journey.req.origin_input_ids
            assert [t.logprob for t in judged[1:]] == [-float(t.token) for t in judged[1:]]
        if journey.aborted:
            assert journey.script.abort_after is not None or journey.script.lost
            return
        if isinstance(journey.error, DeadlineExceededError):
            assert journey.req.deadline is not None
            return
        if journey.script.grammar == 0:
            assert isinstance(journey.error, InvalidRequestError)
            assert not tokens
            return
        if isinstance(journey.error, QueueFullError):
            assert self.setup.priorities, "only a more important one takes a place in the queue"
            assert not tokens
            return
        if journey.script.grammar == 0:
            assert isinstance(journey.error, InvalidRequestError)
            assert not tokens
            return
        if isinstance(journey.error, QueueFullError):
            assert self.setup.priorities, f"{rid} was displaced by nobody more important"
            return
        assert journey.error is None, f"{rid}: {journey.error}"
        assert tokens == expected[first:]
        if isinstance(self.role, ScriptedPrefill) and start + 1 < len(journey.expected.tokens):
            assert journey.outputs[-1].finish_reason is None
        elif tokens:
            assert journey.outputs[-1].finish_reason is journey.expected.finish_reason

    def describe(self) -> str:
        scheduler = self.scheduler
        return (
            f"pass {self.now}, {self.setup}, waiting {scheduler.waiting_queue}, chunked "
            f"{scheduler.chunked_req}, running {scheduler.running_batch.reqs}, transferring "
            f"{list(scheduler.transferring)}, pages {scheduler.page_counts()}"
        )

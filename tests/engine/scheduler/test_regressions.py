"""Bugs that other servers had where these rules come from, each as a test by name.

Every scenario runs twice: as the scheduler is, and with the guard taken out, where it must show. A
scenario that passes both ways would prove nothing. Numbers are SGLang's issues and pull requests.
"""

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import EngineError, InvalidRequestError, OutOfMemoryError
from engine.execution.forward_batch import ForwardBatch, ForwardResult
from engine.scheduler import prefill_adder
from engine.scheduler.in_flight import StepsInFlight
from engine.scheduler.new_token_ratio import NewTokenRatio
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.role import OwnerKind, SchedulerRole
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from tests.engine.scheduler.stub import Engine, make_req, undisturbed


class Shown(Exception):
    """What the bug does in a scenario that would otherwise go on."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise Shown(what)


def shows(scenario: Callable[[], object]) -> None:
    """With its guard taken out, the bug is there."""
    with pytest.raises((Shown, AssertionError, EngineError, KeyError)):
        scenario()


class Tenant(SchedulerRole):
    """Keeps pages as tickets do, until it is polled often enough."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.polls_left = 0

    def take(self, count: int, *, for_polls: int) -> None:
        self.pages = self.scheduler.memory.alloc_pages(count)
        self.polls_left = for_polls

    def poll(self) -> None:
        self.polls_left -= 1
        if self.polls_left <= 0 and self.pages:
            self.scheduler.memory.free_pages(self.pages)
            self.pages = []

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        return [("in_use", self.pages)]


# ---- the latched full flag


def four_prompts_in_chunks() -> None:
    engine = Engine(pages=128, max_running_requests=4, rows=8)
    reqs = [make_req(rid, [n] * 32, max_new_tokens=40) for n, rid in enumerate("abcd", start=1)]
    engine.add(*reqs)
    for _ in range(10):
        engine.step()
    running = {req.rid for req in engine.scheduler.running_requests()}
    check(running == set("abcd"), f"only {running} run, and nothing is short")
    check(not engine.scheduler.running_batch.batch_is_full, "full of whom?")


def test_latched_full_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """#35537 (fix #35609), #22518: `batch_is_full` was set in the pass that computed a prompt's
    last chunk and looked at before it was set anew, so a request waited beside free places until
    another one had finished; with prefill-only batches, for ever.
    """
    four_prompts_in_chunks()

    plain = Scheduler.get_new_batch_prefill

    def latched(self: Scheduler) -> ScheduleBatch | None:
        if getattr(self, "full", False) and self.chunked_req is None:
            return None
        batch = plain(self)
        # What the flag meant there: the last place is taken, by a chunk that goes on, too.
        taken = self.running_batch.batch_size() + len(batch.reqs if batch else [])
        self.full = taken >= self.config.max_running_requests - 1  # type: ignore[attr-defined]
        return batch

    monkeypatch.setattr(Scheduler, "get_new_batch_prefill", latched)
    shows(four_prompts_in_chunks)


# ---- chunk over-commit


def memory_goes_between_two_chunks() -> Engine:
    tenant = Tenant()
    engine = Engine(pages=16, role=tenant, conservativeness=0.02)
    short = make_req("short", [1] * 6, max_new_tokens=12, ignore_eos=False)
    long = make_req("long", [2] * 33, max_new_tokens=2)
    engine.add(short)
    engine.step()
    engine.add(long)
    engine.step()
    check(engine.scheduler.chunked_req is long, "it is to be in chunks")
    tenant.take(engine.memory.allocator.free_pages, for_polls=4)
    before = long.kv_committed_len
    engine.step()
    check(long.kv_committed_len == before, "a chunk was computed into memory that is not there")
    engine.drain()
    assert engine.tokens("long") == undisturbed(long)
    assert engine.tokens("short") == undisturbed(short)
    return engine


def test_chunk_over_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """#30743: with no memory left, `add_chunked_req` took a full chunk all the same; the allocation
    failed and the server died. Here the request is parked, and those who run go on.
    """
    engine = memory_goes_between_two_chunks()
    assert not engine.errors

    def over_committing(self: PrefillAdder, req: Req) -> Req | None:
        req.extend_input_len = min(req.extend_input_len, self.rem_chunk_tokens or 10**9)
        self.can_run_list.append(req)
        return req if req.prefix_len + req.extend_input_len < req.seqlen else None

    monkeypatch.setattr(PrefillAdder, "add_chunked_req", over_committing)
    shows(memory_goes_between_two_chunks)


# ---- two chunked requests


def a_second_prompt_beside_a_parked_one() -> None:
    engine = Engine(pages=64)
    adder = engine.scheduler._make_adder(0)
    first, second = make_req("first", [1] * 60), make_req("second", [2] * 60)
    first.init_next_round_input(engine.memory.tree_cache)
    # The first one takes nothing in this pass: all of the chunk's work is left over.
    limit, adder.rem_chunk_tokens = adder.rem_chunk_tokens, 0
    check(adder.add_chunked_req(first) is first, "it is to be parked")
    adder.rem_chunk_tokens = limit
    second.init_next_round_input(engine.memory.tree_cache)
    result = adder.add_one_req(second)
    check(result is AddReqResult.OTHER and adder.new_chunked_req is None, "two are in chunks")


def test_two_chunked_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """#12676 (`assert self.chunked_req is None` killed the server), #29438: that at most one prompt
    is in chunks held only since the first one used up the budget; whatever left some of it over
    let a second one begin.
    """
    a_second_prompt_beside_a_parked_one()
    monkeypatch.setattr(
        PrefillAdder,
        "chunked_req_goes_on",
        property(lambda self: False, lambda self, value: None),
        raising=False,
    )
    shows(a_second_prompt_beside_a_parked_one)


# ---- retraction storm


def more_growth_than_memory() -> int:
    """How often somebody is sent back while two dozen requests grow into memory for two."""
    engine = Engine(
        pages=60, page_size=2, rows=32, max_running_requests=32, conservativeness=0.02, radix=False
    )
    reqs = [
        make_req(f"r{n}", [1 + n, 2, 2], max_new_tokens=80, ignore_eos=False, seed=n)
        for n in range(24)
    ]
    engine.add(*reqs)
    engine.drain(3000)
    for req in reqs:
        assert engine.tokens(req.rid) == undisturbed(req)
    return engine.scheduler.num_retractions


def test_retraction_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retraction that leaves the estimate of growth as it was is followed by the next one: who
    was sent back is let in again at once, grows, and is sent back (#14939 is of the same family:
    memory was counted for fewer steps than were taken). The estimate jumps to what those kept have
    used.
    """
    calm = more_growth_than_memory()
    assert calm > 0
    monkeypatch.setattr(NewTokenRatio, "on_retraction", lambda self, ratio: None)
    assert more_growth_than_memory() >= 2 * calm


# ---- chunked insert race


def a_chunk_is_shared_while_it_is_computed() -> None:
    engine = Engine(pages=64, overlap=True)
    first = make_req("first", [5] * 60, max_new_tokens=2)
    launch, rows = engine.device.forward, set[int | None]()

    def looked_at(batch: ForwardBatch) -> ForwardResult:
        if first.phase is RequestPhase.CHUNKED:
            rows.add(first.req_pool_idx)
        shared = len(engine.memory.tree_cache.match_prefix([5] * 60).pages) * 4
        check(shared <= first.kv_ready_len, f"{shared} tokens are lent, {first.kv_ready_len} exist")
        return launch(batch)

    engine.device.forward = looked_at  # type: ignore[method-assign]
    engine.add(first)
    engine.drain()
    check(len(rows) == 1, "its row may be somebody else's between two chunks")


def test_chunked_insert_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """With overlap the next chunk is launched while the one before still runs. #17850: the
    request's row was given back between two chunks and could be handed to another one under a step
    that read it. The same holds for pages: what is put into the tree is lent at once, so it must
    have been computed, not only launched.
    """
    a_chunk_is_shared_while_it_is_computed()

    def at_launch(self: StepsInFlight, req: Req, **kwargs: Any) -> None:
        self._memory.tree_cache.cache_unfinished_req(req, computed_len=req.kv_committed_len)

    monkeypatch.setattr(StepsInFlight, "cache_unfinished_req", at_launch)
    shows(a_chunk_is_shared_while_it_is_computed)


# ---- the last request that does not fit


def nothing_is_left_for_the_only_one() -> Engine:
    tenant = Tenant()
    engine = Engine(pages=8, role=tenant)
    engine.add(make_req("a", [1] * 6, max_new_tokens=20))
    engine.step()
    lost = engine.memory.alloc_pages(engine.memory.allocator.free_pages)
    tenant.page_owners = list  # type: ignore[method-assign]
    tenant.scheduler.check_invariant = lambda: None  # type: ignore[method-assign]
    engine.drain(20)
    engine.memory.free_pages(lost)
    return engine


def test_the_last_request_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """#14948, #19881: the only request left had no memory for its next token, nobody could give
    way, and an assertion ended the server with everybody on it. Here that request ends with an
    error, and the next one is served.
    """
    engine = nothing_is_left_for_the_only_one()
    assert isinstance(engine.errors["a"], OutOfMemoryError)
    assert engine.released == ["a"]
    later = make_req("later", [3] * 6)
    engine.add(later)
    engine.drain()
    assert engine.tokens("later") == undisturbed(later)

    monkeypatch.setattr(Scheduler, "_make_last_fit", lambda self, req: True)
    shows(nothing_is_left_for_the_only_one)


# ---- double free of a preempted, finished request


def the_victim_has_just_ended() -> None:
    engine = Engine(pages=12, priorities=True, max_running_requests=1, overlap=True)
    victim = make_req("victim", [1] * 6, max_new_tokens=3, priority=50)
    engine.add(victim)
    engine.step()
    engine.step()
    engine.step()
    check(victim.in_flight > 0, "its last step is to be on its way")
    urgent = make_req("urgent", [2] * 6, max_new_tokens=3)
    engine.add(urgent)
    engine.drain(30)
    check(engine.released.count("victim") == 1, "released twice")
    check(victim.retraction_count == 0, "sent back although it has ended")
    for req in (victim, urgent):
        assert engine.tokens(req.rid) == undisturbed(req)


def test_double_free_of_a_preempted_finished_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """#17797 (fix #18694): preemption chose a request that had finished, and whose pages were given
    back, but that was still in the running batch, and gave them back once more.
    """
    the_victim_has_just_ended()

    running: list[Req] = []
    plain = prefill_adder.choose_victims

    def among_the_dead(candidates: Any, **kwargs: Any) -> list[Req]:
        kwargs["enough"] = lambda victims, freed: True
        listed = [*candidates, *running]
        reasons = [(req, req.finish_reason) for req in listed]
        for req in listed:
            req.finish_reason = None
        try:
            return plain(listed, **kwargs)
        finally:
            for req, reason in reasons:
                req.finish_reason = reason

    def unfiltered(self: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
        running[:] = [req for req in self.reqs if req.finished()] or running

    monkeypatch.setattr(prefill_adder, "choose_victims", among_the_dead)
    monkeypatch.setattr(ScheduleBatch, "filter_batch", unfiltered)
    shows(the_victim_has_just_ended)


# ---- abort of a chunked request


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_abort_of_a_chunked_request(
    monkeypatch: pytest.MonkeyPatch, passes: int, overlap: bool
) -> None:
    """#34149, #1858: an abort between two chunks left pages and row behind, and one that came while
    the last chunk was under way still showed its token. Nothing is shown, nothing stays.
    """

    def scenario() -> None:
        engine = Engine(pages=32, overlap=overlap)
        long, other = make_req("long", [1] * 60), make_req("other", [2] * 9)
        engine.add(long)
        for _ in range(passes):
            engine.step()
        drawn = engine.tokens("long")
        check(engine.scheduler.abort_request(RequestId("long")), "it is to be live")
        engine.add(other)
        engine.drain(50)
        check(engine.tokens("long") == drawn, "a token after the abort")
        assert engine.aborted == ["long"]
        assert sorted(engine.released) == ["long", "other"]
        assert engine.tokens("other") == undisturbed(other)
        assert engine.scheduler.row_counts().in_use == 0

    scenario()
    if passes <= 3:
        monkeypatch.setattr(Scheduler, "_settle_aborts", lambda self: None)
        shows(scenario)


# ---- an early return that stops polling


def memory_comes_back_by_polling() -> None:
    tenant = Tenant()
    engine = Engine(pages=16, role=tenant)
    req = make_req("a", [1] * 30)
    tenant.take(12, for_polls=6)
    engine.add(req)
    engine.drain(40)
    assert engine.tokens("a") == undisturbed(req)


def test_early_return_that_stops_polling_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """#37483, and #6857 of the same family: while requests waited for memory, a shortcut skipped
    the poll of transfers, and so what would have given memory back was never noticed.
    """
    memory_comes_back_by_polling()

    plain = Tenant.poll

    def shortcut(self: Tenant) -> None:
        if not self.scheduler.waiting_queue:
            plain(self)

    monkeypatch.setattr(Tenant, "poll", shortcut)
    shows(memory_comes_back_by_polling)


# ---- an admission that can never be satisfied


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("prompt_len", [1, 13, 31])
def test_admission_that_can_never_be_satisfied(
    monkeypatch: pytest.MonkeyPatch, prompt_len: int, chunk: int | None, radix: bool
) -> None:
    """#28530, #25126, #39271: the door counted tokens, the adder whole pages and one more, so a
    request near the size of memory was let in and never admitted, with all others behind it. What
    the door lets in here is served, and what it does not is told at once.
    """

    def scenario() -> None:
        engine = Engine(pages=8, page_size=4, radix=radix, chunked_prefill_size=chunk)
        with pytest.raises(InvalidRequestError, match="do not fit"):
            engine.add(make_req("too long", [1] * prompt_len, max_new_tokens=33 - prompt_len))
        full = make_req("full", [1] * prompt_len, max_new_tokens=32 - prompt_len)
        behind = make_req("behind", [2] * 5)
        engine.add(full, behind)
        engine.drain(150)
        for req in (full, behind):
            assert engine.tokens(req.rid) == undisturbed(req)
            assert engine.outputs[req.rid][-1].finish_reason is FinishReason.LENGTH

    scenario()
    monkeypatch.setattr(PrefillAdder, "_fits_alone", lambda self, *args: False)
    shows(scenario)

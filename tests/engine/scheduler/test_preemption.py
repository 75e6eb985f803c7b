"""More important requests take the places of less important ones, and nobody loses a token."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.scheduler.preemption import FreedTokens
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.stub import Engine, make_req, undisturbed

PAGE = 4


def engine_of(**settings: object) -> Engine:
    return Engine(priorities=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("radix", [False, True])
def test_the_only_place_goes_to_the_more_important_and_comes_back(
    overlap: bool, mixed: bool, radix: bool
) -> None:
    engine = engine_of(max_running_requests=1, overlap=overlap, mixed=mixed, radix=radix)
    low = make_req("low", [1] * 6, max_new_tokens=12, priority=20)
    engine.add(low)
    for _ in range(5):
        engine.step()
    had = len(low.output_ids)
    high = make_req("high", [2] * 6, max_new_tokens=4, priority=0)
    engine.add(high)
    engine.step()
    assert engine.scheduler.num_preemptions == 1
    assert list(engine.scheduler.waiting_queue) == [low]
    assert (low.pages, low.req_pool_idx, low.retraction_count) == ([], None, 1)
    engine.drain()
    assert engine.released == ["high", "low"]
    assert engine.tokens("low") == undisturbed(low)
    assert engine.tokens("high") == undisturbed(high)
    assert had < 12


def test_what_the_victim_had_computed_is_a_cache_hit_when_it_returns() -> None:
    engine = engine_of(max_running_requests=1)
    low = make_req("low", [1] * 9, max_new_tokens=12, priority=20)
    engine.add(low)
    for _ in range(4):
        engine.step()
    engine.add(make_req("high", [2] * 6, max_new_tokens=2))
    engine.drain()
    # 9 + 4 tokens were known; of 12 with KV, three whole pages came from the tree.
    assert [extends for mode, extends in engine.runner.forwards if mode is ForwardMode.EXTEND] == [
        [9],
        [6],
        [1],
    ]
    assert engine.tokens("low") == undisturbed(low)


@pytest.mark.parametrize(("difference", "expected"), [(10, 0), (11, 1)])
def test_only_a_difference_above_the_threshold_counts(difference: int, expected: int) -> None:
    engine = engine_of(max_running_requests=1, priority_preemption_threshold=10)
    engine.add(make_req("low", [1] * 4, max_new_tokens=9, priority=difference))
    engine.step()
    engine.add(make_req("high", [2] * 4, priority=0))
    engine.step()
    assert engine.scheduler.num_preemptions == expected
    engine.drain()


def test_without_the_flag_priorities_are_not_looked_at() -> None:
    engine = Engine(max_running_requests=1)
    engine.add(make_req("low", [1] * 4, max_new_tokens=5, priority=100))
    engine.step()
    engine.add(make_req("middle", [3] * 4, priority=50), make_req("high", [2] * 4, priority=0))
    engine.drain()
    assert engine.scheduler.num_preemptions == 0
    assert engine.released == ["low", "middle", "high"]


def test_a_prefill_worker_orders_its_queue_and_has_nobody_to_preempt() -> None:
    engine = engine_of(role=FakePrefillRole(), max_running_requests=2)
    reqs = [make_req(rid, [ord(rid) % 40] * 5, priority=p) for rid, p in (("a", 50), ("b", 0))]
    engine.add(*reqs)
    engine.step()
    assert [output.rid for outputs in engine.outputs.values() for output in outputs] == ["b", "a"]
    engine.add(make_req("c", [7] * 5, priority=-50))
    engine.step()
    assert engine.scheduler.num_preemptions == 0
    for req in reqs:
        engine.scheduler.release_request(req)
    engine.step()
    engine.step()
    assert "c" in engine.outputs


@pytest.mark.parametrize(("length", "expected"), [(30, "y"), (50, "xy"), (70, "xyz")])
def test_memory_is_taken_from_as_few_as_it_needs_the_least_important_and_newest_first(
    length: int, expected: str
) -> None:
    engine = engine_of(pages=28, max_prefill_tokens=200, chunked_prefill_size=None)
    running = [
        make_req(rid, [ord(rid) % 40] * 11, max_new_tokens=8, priority=p)
        for rid, p in (("w", 20), ("x", 30), ("y", 30), ("z", 20))
    ]
    engine.add(*running)
    engine.step()
    engine.step()
    assert len(engine.outputs) == 4
    # 112 tokens in all; each of the four holds 12 and may grow by 6.
    high = make_req("high", [20] * length, max_new_tokens=8, priority=0)
    engine.add(high)
    engine.step()
    assert {req.rid for req in engine.scheduler.waiting_queue} == set(expected)
    assert engine.scheduler.num_preemptions == len(expected)
    engine.drain()
    for req in [*running, high]:
        assert engine.tokens(req.rid) == undisturbed(req)


@pytest.mark.parametrize("passes", range(1, 8))
@pytest.mark.parametrize("overlap", [False, True])
def test_one_whose_last_token_is_drawn_already_is_not_preempted_and_freed_once(
    overlap: bool, passes: int
) -> None:
    """Double free of a preempted finished request: with overlap its end may not be known yet."""
    engine = engine_of(max_running_requests=1, overlap=overlap)
    low = make_req("low", [1] * 4, max_new_tokens=4, priority=99)
    engine.add(low)
    for _ in range(passes):
        engine.step()
    engine.add(make_req("high", [2] * 4, max_new_tokens=3))
    engine.drain()
    assert sorted(engine.released) == ["high", "low"]
    assert engine.tokens("low") == undisturbed(low)
    assert engine.scheduler.num_preemptions == (0 if passes >= 4 else 1)
    counts = engine.scheduler.page_counts()
    assert counts.in_use == counts.held == 0


def test_an_abort_of_a_victim_and_of_its_rival_leaves_nothing() -> None:
    for rid in ("low", "high"):
        engine = engine_of(max_running_requests=1)
        engine.add(make_req("low", [1] * 4, max_new_tokens=20, priority=99))
        engine.step()
        engine.step()
        engine.add(make_req("high", [2] * 4, max_new_tokens=20))
        engine.step()
        assert engine.scheduler.num_preemptions == 1
        engine.scheduler.abort_request(rid)  # type: ignore[arg-type]
        engine.drain()
        assert sorted(engine.released) == ["high", "low"]
        assert engine.aborted == [rid]


# ---- the adder's arithmetic


def pools(pages: int = 16, *, radix: bool = True) -> MemoryPools:
    return make_memory_pools(
        num_pages=pages, page_size=PAGE, num_rows=8, max_context_len=256, enable_radix_cache=radix
    )


def running_batch(memory: MemoryPools, *reqs: Req) -> ScheduleBatch:
    """Requests whose prompts were computed; they hold rows, pages and locks."""
    batch = ScheduleBatch(reqs=list(reqs), memory=memory, vocab_size=40)
    for number, req in enumerate(reqs):
        req.arrival_order, req.t_arrival = number, float(number)
        req.init_next_round_input(memory.tree_cache)
        if req.last_node is not None:
            memory.tree_cache.inc_lock_ref(req.last_node)
    batch.prepare_for_extend()
    for req in reqs:
        memory.tree_cache.cache_unfinished_req(req)
    batch.output_ids = torch.zeros(len(reqs), dtype=torch.int64)
    return batch


def adder_of(memory: MemoryPools, batch: ScheduleBatch, **kwargs: object) -> PrefillAdder:
    defaults: dict[str, object] = {"new_token_ratio": 1.0, "rem_input_tokens": 1000}
    return PrefillAdder(
        PAGE,
        memory.tree_cache,
        memory.allocator,
        batch,
        **{**defaults, "rem_chunk_tokens": None, **kwargs},  # type: ignore[arg-type]
    )


def low(rid: str, tokens: list[int], new: int = 4, priority: int = 20) -> Req:
    return make_req(rid, tokens, max_new_tokens=new, priority=priority, ignore_eos=False)


def test_where_all_of_them_would_not_do_none_is_touched() -> None:
    memory = pools()
    victim, equal = low("v", [1] * 8), low("e", [2] * 8, priority=5)
    batch = running_batch(memory, victim, equal)
    adder = adder_of(memory, batch)
    before = (adder.rem_total_tokens, memory.allocator.free_pages)
    big = make_req("big", [3] * 60, max_new_tokens=4)
    assert not adder.preempt_to_schedule(big, 10)
    assert (adder.rem_total_tokens, memory.allocator.free_pages) == before
    assert batch.reqs == [victim, equal]
    assert adder.preempt_list == []
    assert (big.pages, big.last_node) == ([], None)
    assert memory.tree_cache.protected_size() == 16


def test_each_victims_own_growth_is_no_longer_expected() -> None:
    memory = pools(16)
    victims = [low("a", [1] * 8, new=5), low("b", [2] * 8, new=11)]
    batch = running_batch(memory, *victims)
    adder = adder_of(memory, batch)
    assert adder.rem_total_tokens == 64 - 16 - 5 - 11
    newcomer = make_req("n", [3] * 24, max_new_tokens=4)
    assert adder.add_req(newcomer) is AddReqResult.NO_TOKEN
    assert adder.preempt_to_schedule(newcomer, 10)
    assert adder.preempt_list == [victims[1]]  # as important, and newer
    assert adder.rem_total_tokens == 64 - 8 - 5
    adder.add_req(newcomer)
    assert adder.can_run_list == [newcomer]


def test_victims_that_share_a_prefix_free_it_only_together() -> None:
    memory = pools(16)
    victims = [low("a", [*[1] * 24, 2]), low("b", [*[1] * 24, 3])]
    batch = running_batch(memory, victims[0])
    batch.merge_batch(running_batch(memory, victims[1]))
    assert memory.tree_cache.protected_size() == 24
    freed = FreedTokens(PAGE)
    freed.add(victims[1])
    assert freed.tokens == PAGE
    freed.add(victims[0])
    assert freed.tokens == 24 + 2 * PAGE
    adder = adder_of(memory, batch)
    # 64 - 24 shared - a last page each = 32 are free, of which 8 are for growth: one victim gives 8
    # more, both give all.
    big = make_req("big", [6] * 30, max_new_tokens=4)
    assert adder.add_req(big) is AddReqResult.NO_TOKEN
    assert adder.preempt_to_schedule(big, 10)
    assert set(adder.preempt_list) == set(victims)
    assert memory.tree_cache.protected_size() == 0
    adder.add_req(big)
    assert adder.can_run_list == [big]


def test_a_finished_request_is_no_victim() -> None:
    memory = pools()
    ended = low("e", [1] * 8)
    batch = running_batch(memory, ended)
    ended.finish_reason = FinishReason.STOP
    assert not adder_of(memory, batch).preempt_to_schedule(
        make_req("n", [2] * 4), 10, slots_needed=1
    )


def test_nobody_gives_way_to_one_that_this_pass_has_no_work_left_for() -> None:
    memory = pools()
    victim = low("v", [1] * 8)
    batch = running_batch(memory, victim)
    adder = adder_of(memory, batch, rem_chunk_tokens=3)
    assert not adder.preempt_to_schedule(make_req("n", [2] * 40), 10, slots_needed=1)
    assert batch.reqs == [victim]


def test_a_request_that_needs_all_the_memory_gets_it() -> None:
    memory = pools(radix=False)
    victims = [low("a", [1] * 8), low("b", [2] * 8)]
    batch = running_batch(memory, *victims)
    adder = adder_of(memory, batch)
    giant = make_req("g", [3] * 60, max_new_tokens=4)
    assert adder.preempt_to_schedule(giant, 10)
    adder.add_req(giant)
    assert adder.can_run_list == [giant]


# ---- at random


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4, 16]),
    radix=st.booleans(),
    overlap=st.booleans(),
    mixed=st.booleans(),
    chunk=st.sampled_from([None, 16, 32]),
    threshold=st.sampled_from([0, 2, 10]),
    tokens=st.sampled_from([112, 160, 320]),
)
@settings(max_examples=25)
def test_whoever_gives_way_to_whomever_the_tokens_stand(
    seed: int,
    page_size: int,
    radix: bool,
    overlap: bool,
    mixed: bool,
    chunk: int | None,
    threshold: int,
    tokens: int,
) -> None:
    run_at_random(seed, page_size, radix, overlap, mixed, chunk, threshold, tokens)


def test_the_random_runs_do_preempt() -> None:
    runs = [
        run_at_random(seed, 4, True, seed % 2 == 0, seed % 3 == 0, 16, 2, 160) for seed in range(12)
    ]
    assert sum(runs) > 5


def run_at_random(
    seed: int,
    page_size: int,
    radix: bool,
    overlap: bool,
    mixed: bool,
    chunk: int | None,
    threshold: int,
    tokens: int,
) -> int:
    rng = random.Random(seed)
    engine = engine_of(
        pages=tokens // page_size,
        page_size=page_size,
        rows=4,
        max_running_requests=4,
        radix=radix,
        overlap=overlap,
        mixed=mixed,
        chunked_prefill_size=chunk,
        priority_preemption_threshold=threshold,
        conservativeness=rng.choice([0.02, 1.0]),
    )
    reqs = [
        make_req(
            f"r{n}",
            [rng.randrange(3) for _ in range(rng.choice([1, 8, 33, 48]))],
            max_new_tokens=rng.choice([1, 5, 20, 40]),
            priority=rng.choice([0, 3, 11, 30]),
            ignore_eos=rng.random() < 0.7,
        )
        for n in range(rng.randint(2, 10))
    ]
    waiting, passes = list(reqs), 0
    while waiting or engine.scheduler.has_work():
        passes += 1
        assert passes < 2000
        if waiting and rng.random() < 0.4:
            engine.add(waiting.pop())
        if rng.random() < 0.02:
            engine.scheduler.abort_request(rng.choice(reqs).rid)
        engine.step()
    assert not engine.errors
    for req in reqs:
        expected = undisturbed(req)
        if req.rid in engine.aborted:
            assert engine.tokens(req.rid) == expected[: len(engine.tokens(req.rid))]
        else:
            assert engine.tokens(req.rid) == expected
    counts = engine.scheduler.page_counts()
    assert counts.in_use == counts.held == 0
    return engine.scheduler.num_preemptions

"""The adder's budgets, one rule a test.

Where each clause of scheduling.md sections 2 and 3 is held to. Names without a letter are tests of
this module, by their beginning; P: test_preemption.py, S: test_scheduler.py, L: test_lora_rule.py.

clause                                              test
--------------------------------------------------  --------------------------------------------
total_offset at the start, CLIP, ratio, mixed rows  running_requests_are_expected_to_grow
A is re-read at each use                            what_is_free_is_asked_anew
rem_total counts growth, cur_rem only this pass     an_admitted_request_is_charged
rem_input and rem_chunk less the mixed rows         mixed_rows_take_from_the_work
the charge: Ec + M + page                           an_admitted_request_is_charged
    M = 0 if truncated; 1 on a prefill worker       a_truncated_request, on_a_prefill_worker
promises to tickets                                 promised_memory_is_left_alone
budget_state                                        budget_states, memory_that_others_will_grow
refuse at extend + growth + page >= rem_total       what_would_outgrow_memory
    again under the lock                            locking_a_prefix_is_counted
    but not one that fills the memory alone         a_lone_request_may_fill_the_memory
no chunks: OTHER; an over-long first one passes     without_chunks, an_over_long_first_prompt
whole if it fits rem_chunk                          what_fits_the_chunk_exactly
else truncated: page, align, absolute end           what_exceeds_the_chunk, truncation_is_aligned,
                                                    an_aligned_chunk_after_a_cached_prefix
    nothing left means OTHER                        nothing_left_of_a_chunk, an_alignment_that
    it becomes new_chunked_req, one at most         what_exceeds_the_chunk, no_second_request
add_chunked_req: min(rest, rem_chunk, rem_total)    the_chunked_request_takes_whole_pages,
                                                    the_chunked_request_takes_no_more
    page end unless last, aligned if possible       later_chunks_are_aligned_too
    parked, never over-committed                    the_chunked_request_is_parked
    keeps its row between chunks                    the_chunked_request_keeps_its_row
add_one_req_ignore_eos simulates                    known_lengths_are_simulated, ..._that_meet
preempt_to_schedule                                 P
full, or nobody waits: nothing to do, but a chunk   a_chunk_goes_on_although_no_place_is_free
allocatable = min(limit - running, free rows)       S the_running_limit, S requests_wait_for_a_row
full is recomputed in every pass                    the_full_flag_is_never_latched
the LoRA limit skips only this one                  L only_the_one_without_a_slot
match over len - 1 tokens                           S a_prompt_that_is_cached_whole
    none where the prompt is judged                 one_that_judges_its_prompt
stop at the first answer other than CONTINUE        nobody_overtakes_the_first
one new chunked request at most                     at_most_one_prompt_is_in_chunks
mixing: decode memory is there, no logprobs         S a_new_prefill_goes, S mixing_is_left_out
truncation_align_size of the settings               the_alignment_of_the_settings,
                                                    however_many_rows_decode_along
"""

from typing import Any

import pytest

from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.config import CLIP_MAX_NEW_TOKENS
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import Req, RequestPhase
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.scheduler.stub import Engine, make_req

PAGE = 4
CONTINUE, NO_TOKEN, OTHER = AddReqResult.CONTINUE, AddReqResult.NO_TOKEN, AddReqResult.OTHER


def make_pools(pages: int = 16, *, radix: bool = True) -> MemoryPools:
    return make_memory_pools(
        num_pages=pages, page_size=PAGE, num_rows=8, max_context_len=256, enable_radix_cache=radix
    )


def make_adder(
    memory: MemoryPools,
    *,
    running: list[Req] | None = None,
    ratio: float = 0.5,
    rem_input: int = 1000,
    rem_chunk: int | None = None,
    mixed: int = 0,
    prefill_only: bool = False,
    reserved: int = 0,
    align: int | None = None,
) -> PrefillAdder:
    return PrefillAdder(
        PAGE,
        memory.tree_cache,
        memory.allocator,
        ScheduleBatch(reqs=running or [], memory=memory),
        ratio,
        rem_input,
        rem_chunk,
        mixed,
        prefill_only=prefill_only,
        reserved_tokens=reserved,
        truncation_align_size=align,
    )


def req_of(length: int, new: int = 4, *, rid: str = "r", ignore_eos: bool = False) -> Req:
    return make_req(rid, [1] * length, max_new_tokens=new, ignore_eos=ignore_eos)


def chunked(length: int, done: int, new: int = 4) -> Req:
    req = req_of(length, new)
    req.kv_committed_len = done
    req.init_next_round_input()
    return req


def test_running_requests_are_expected_to_grow_by_the_ratio_and_at_most_by_the_clip() -> None:
    memory = make_pools(4096)
    running = [req_of(4, 100), req_of(4, 10**6), req_of(4, 60, ignore_eos=True)]
    running[0].output_ids = [1] * 20
    adder = make_adder(memory, running=running, ratio=0.25, mixed=3)
    assert adder.rem_total_tokens == 4096 * PAGE - 3 - 20 - CLIP_MAX_NEW_TOKENS // 4 - 60
    assert adder.cur_rem_tokens == 4096 * PAGE - 3


def test_an_admitted_request_is_charged_its_pages_its_growth_and_a_page() -> None:
    adder = make_adder(make_pools(), rem_input=40, rem_chunk=30)
    assert adder.add_req(req_of(5, 7)) is CONTINUE
    assert adder.rem_total_tokens == 64 - 8 - 7 - PAGE
    assert adder.cur_rem_tokens == 64 - 8 - PAGE
    assert (adder.rem_input_tokens, adder.rem_chunk_tokens) == (32, 22)


def test_mixed_rows_take_from_the_work_of_the_pass() -> None:
    adder = make_adder(make_pools(), rem_input=40, rem_chunk=30, mixed=5)
    assert (adder.rem_input_tokens, adder.rem_chunk_tokens) == (35, 25)


def test_what_would_outgrow_memory_is_refused_and_owns_nothing() -> None:
    memory = make_pools()
    adder = make_adder(memory, running=[req_of(4, 40)], ratio=1.0)
    # 24 left: 16 + 4 + a page of 4 reaches it.
    refused = req_of(16, 4)
    assert adder.add_req(refused) is NO_TOKEN
    assert (refused.pages, refused.last_node, refused.prefix_len) == ([], None, 0)
    taken = req_of(15, 4)
    assert adder.add_req(taken) is NO_TOKEN  # taken, and nothing is left for another
    assert adder.can_run_list == [taken]


def test_promised_memory_is_left_alone() -> None:
    adder = make_adder(make_pools(), running=[req_of(4, 8)], ratio=1.0, reserved=32)
    assert adder.add_req(req_of(16, 4)) is NO_TOKEN


def test_a_lone_request_may_fill_the_memory_to_its_last_page() -> None:
    assert make_adder(make_pools()).add_req(req_of(60, 4)) is not OTHER
    adder = make_adder(make_pools())
    adder.add_req(req_of(60, 4))
    assert len(adder.can_run_list) == 1
    adder = make_adder(make_pools())
    assert adder.add_req(req_of(60, 5)) is NO_TOKEN
    assert not adder.can_run_list


def test_locking_a_prefix_is_counted_before_the_request_is_taken() -> None:
    memory = make_pools()
    memory.tree_cache.insert([1] * 32, memory.alloc_pages(8))
    # 32 tokens free, 32 evictable. Its prefix locks those; 4 are expected of others: 28 are left.
    adder = make_adder(memory, running=[req_of(4, 4)], ratio=1.0)
    refused = make_req("r", [1] * 32 + [2] * 20, max_new_tokens=4, ignore_eos=False)
    assert adder.add_req(refused) is NO_TOKEN
    assert memory.tree_cache.protected_size() == 0
    taken = make_req("r", [1] * 32 + [2] * 19, max_new_tokens=4, ignore_eos=False)
    adder.add_req(taken)
    assert adder.can_run_list == [taken]
    assert (taken.prefix_len, taken.extend_input_len) == (32, 19)
    assert memory.tree_cache.protected_size() == 32
    assert adder.log_hit_tokens == 32


def test_without_chunks_an_over_long_first_request_passes_and_a_second_does_not() -> None:
    memory = make_pools(64)
    adder = make_adder(memory, rem_input=16)
    assert adder.add_req(req_of(40)) is OTHER
    assert len(adder.can_run_list) == 1
    adder = make_adder(memory, rem_input=16)
    assert adder.add_req(req_of(8)) is CONTINUE
    assert adder.add_req(req_of(9)) is OTHER
    assert len(adder.can_run_list) == 1


def test_what_exceeds_the_chunk_is_truncated_to_whole_pages() -> None:
    adder = make_adder(make_pools(), rem_chunk=18)
    first = req_of(7)
    assert adder.add_req(first) is CONTINUE
    second = req_of(20)
    assert adder.add_req(second) is not NO_TOKEN
    assert adder.new_chunked_req is second
    assert second.extend_input_len == 8
    assert adder.budget_state() is OTHER or adder.rem_chunk_tokens == 2


def test_a_truncated_request_is_not_charged_its_growth() -> None:
    adder = make_adder(make_pools(), rem_chunk=8)
    assert adder.add_req(req_of(20, 20)) is OTHER
    assert adder.rem_total_tokens == 64 - 8 - PAGE


@pytest.mark.parametrize(
    ("chunk", "align", "expected"), [(30, 8, 24), (30, 16, 16), (30, None, 28), (21, 6, 16)]
)
def test_truncation_is_aligned(chunk: int, align: int | None, expected: int) -> None:
    adder = make_adder(make_pools(), rem_chunk=chunk, align=align)
    req = req_of(40)
    adder.add_req(req)
    assert req.extend_input_len == expected


def test_nothing_left_of_a_chunk_means_other() -> None:
    adder = make_adder(make_pools(), rem_chunk=3)
    req = req_of(20)
    assert adder.add_req(req) is OTHER
    assert not adder.can_run_list
    assert req.last_node is None


def test_the_chunked_request_takes_whole_pages_until_its_end() -> None:
    req = chunked(30, 8)
    adder = make_adder(make_pools(), rem_chunk=10)
    assert adder.add_chunked_req(req) is req
    assert req.extend_input_len == 8
    last = chunked(30, 24)
    adder = make_adder(make_pools(), rem_chunk=10)
    assert adder.add_chunked_req(last) is None
    assert last.extend_input_len == 6
    assert adder.rem_total_tokens == 64 - 8 - 4 - PAGE


def test_the_chunked_request_takes_no_more_than_memory_allows() -> None:
    memory = make_pools()
    memory.alloc_pages(13)
    req = chunked(40, 8)
    adder = make_adder(memory, rem_chunk=32, running=[req_of(4, 2)], ratio=1.0)
    assert adder.add_chunked_req(req) is req  # 12 free, 2 expected: 10, in whole pages 8
    assert req.extend_input_len == 8


def test_the_chunked_request_is_parked_where_nothing_is_left() -> None:
    memory = make_pools()
    memory.alloc_pages(15)
    req = chunked(40, 8)
    adder = make_adder(memory, rem_chunk=32, running=[req_of(4, 4)], ratio=1.0)
    assert adder.add_chunked_req(req) is req
    assert adder.can_run_list == []
    assert adder.chunked_req_goes_on


def test_no_second_request_is_truncated_while_one_goes_on() -> None:
    adder = make_adder(make_pools(), rem_chunk=10)
    adder.add_chunked_req(chunked(40, 8))
    assert adder.add_req(req_of(20)) is OTHER
    assert adder.new_chunked_req is None


def test_on_a_prefill_worker_a_request_grows_by_one_token() -> None:
    adder = make_adder(make_pools(), prefill_only=True)
    assert adder.add_req(req_of(16, 1000)) is CONTINUE
    assert adder.rem_total_tokens == 64 - 16 - 1 - PAGE


def test_budget_states() -> None:
    memory = make_pools()
    assert make_adder(memory).budget_state() is CONTINUE
    assert make_adder(memory, rem_input=0).budget_state() is OTHER
    assert make_adder(memory, rem_chunk=0).budget_state() is OTHER
    assert make_adder(memory, reserved=64).budget_state() is NO_TOKEN


def test_known_lengths_are_simulated_where_no_tree_shares_pages() -> None:
    memory = make_pools(16, radix=False)
    short, candidate = req_of(16, 4, ignore_eos=True), req_of(16, 24, ignore_eos=True)
    memory.alloc_pages(5)  # what `short` has
    # Summed up, 4 + 24 new tokens and 16 of prompt do not fit with a page to spare; in time they
    # do, since `short` ends first.
    adder = make_adder(memory, running=[short])
    adder.add_req(candidate)
    assert adder.can_run_list == [candidate]


def test_known_lengths_that_meet_in_time_are_refused() -> None:
    memory = make_pools(16, radix=False)
    running = [req_of(16, 20, ignore_eos=True)]
    memory.alloc_pages(5)
    adder = make_adder(memory, running=running)
    assert adder.add_req(req_of(16, 20, ignore_eos=True)) is NO_TOKEN
    assert not adder.can_run_list


def test_the_batch_is_of_those_admitted() -> None:
    adder = make_adder(make_pools())
    assert adder.get_batch() is None
    adder.add_req(req_of(4))
    batch = adder.get_batch()
    assert batch is not None
    assert batch.batch_size() == 1


def test_what_is_free_is_asked_anew_at_each_use() -> None:
    memory = make_pools()
    adder = make_adder(memory, running=[req_of(4, 4)], ratio=1.0)
    assert adder.rem_total_tokens == 60
    memory.alloc_pages(3)
    assert (adder.rem_total_tokens, adder.cur_rem_tokens) == (48, 52)


def test_memory_that_others_will_grow_into_ends_the_pass() -> None:
    adder = make_adder(make_pools(), running=[req_of(4, 64)], ratio=1.0)
    assert adder.cur_rem_tokens == 64
    assert adder.budget_state() is NO_TOKEN


def test_what_fits_the_chunk_exactly_is_taken_whole() -> None:
    adder = make_adder(make_pools(), rem_chunk=18)
    req = req_of(18)
    assert adder.add_req(req) is OTHER  # taken, and no work is left
    assert (adder.can_run_list, req.extend_input_len, adder.new_chunked_req) == ([req], 18, None)


def test_an_aligned_chunk_after_a_cached_prefix_ends_with_a_page() -> None:
    memory = make_pools(32)
    memory.tree_cache.insert([1] * 12, memory.alloc_pages(3))
    adder = make_adder(memory, rem_chunk=21, align=8)
    req = req_of(60)
    adder.add_req(req)
    assert (req.prefix_len, req.extend_input_len) == (12, 16)
    assert adder.new_chunked_req is req


def test_an_alignment_that_leaves_nothing_means_other() -> None:
    adder = make_adder(make_pools(), rem_chunk=15, align=16)
    req = req_of(40)
    assert adder.add_req(req) is OTHER
    assert adder.can_run_list == []


def test_later_chunks_are_aligned_too_as_long_as_that_leaves_any() -> None:
    req = chunked(60, 16)
    adder = make_adder(make_pools(32), rem_chunk=30, align=16)
    assert adder.add_chunked_req(req) is req
    assert req.extend_input_len == 16
    memory = make_pools()
    memory.alloc_pages(13)
    req = chunked(60, 16)
    adder = make_adder(memory, rem_chunk=30, align=16)
    assert adder.add_chunked_req(req) is req
    assert req.extend_input_len == 12  # all that is free


# ---- the clauses of section 2, on a scheduler


def prompts(*lengths: int, **params: Any) -> list[Req]:
    """Of different beginnings, so that nothing is shared."""
    return [make_req(f"r{i}", [i + 1] * length, **params) for i, length in enumerate(lengths)]


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    engine = Engine(pages=16, chunked_prefill_size=None)
    runs, big, small = prompts(8, 40, 4, max_new_tokens=12)
    engine.add(runs)
    engine.step()
    engine.add(big, small)
    engine.step()
    assert engine.modes[-1] is ForwardMode.DECODE
    assert list(engine.scheduler.waiting_queue.in_order()) == [big, small]
    engine.drain()
    assert list(engine.outputs) == ["r0", "r1", "r2"]


def test_an_over_long_first_prompt_passes_and_starves_nobody() -> None:
    engine = Engine(pages=64, chunked_prefill_size=None, max_prefill_tokens=16)
    reqs = prompts(60, 4, 40, 4)
    engine.add(*reqs)
    for expected in ([60], [4], [40], [4]):
        engine.step()
        assert engine.runner.forwards[-1] == (ForwardMode.EXTEND, expected)
    engine.drain()


def test_a_chunk_goes_on_although_no_place_is_free() -> None:
    engine = Engine(rows=2, max_running_requests=2, chunked_prefill_size=8)
    first, long, waits = prompts(4, 30, 4, max_new_tokens=20)
    engine.add(first, long, waits)
    for _ in range(5):
        engine.step()
    assert engine.modes[:4] == [ForwardMode.EXTEND] * 4
    assert list(engine.scheduler.waiting_queue) == [waits]
    engine.drain()


def test_the_chunked_request_keeps_its_row() -> None:
    engine = Engine(chunked_prefill_size=8)
    (req,) = prompts(30)
    engine.add(req)
    rows = set()
    while not engine.outputs:
        engine.step()
        rows.add(req.req_pool_idx)
    assert len(rows) == 1
    assert None not in rows


def test_at_most_one_prompt_is_in_chunks() -> None:
    engine = Engine(pages=64, chunked_prefill_size=8, rows=8)
    reqs = prompts(30, 30, 30)
    engine.add(*reqs)
    while engine.scheduler.has_work():
        engine.step()
        partly = [
            req
            for req in reqs
            if req.phase is RequestPhase.CHUNKED and 0 < req.kv_committed_len < 30
        ]
        assert len(partly) <= 1
    assert len(engine.outputs) == 3


def test_the_full_flag_is_never_latched() -> None:
    engine = Engine(max_running_requests=1)
    first, second = prompts(4, 4, max_new_tokens=2)
    engine.add(first, second)
    engine.step()
    engine.step()
    assert engine.scheduler.running_batch.batch_is_full
    engine.step()
    assert not engine.scheduler.running_batch.batch_is_full
    engine.drain()


def test_one_that_judges_its_prompt_matches_nothing() -> None:
    engine = Engine()
    engine.add(make_req("warm", [1] * 12))
    engine.drain()
    judge = Req(
        make_req("j", [1]).rid, [1] * 12, SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    )
    engine.add(judge)
    batch = engine.scheduler.get_next_batch_to_run()
    assert batch is not None
    assert (batch.prefix_lens, batch.extend_lens) == ([0], [12])


def test_the_alignment_of_the_settings_reaches_the_chunks() -> None:
    engine = Engine(pages=64, chunked_prefill_size=30, truncation_align_size=16)
    (req,) = prompts(90, max_new_tokens=1)
    engine.add(req)
    engine.drain()
    assert [extends for _, extends in engine.runner.forwards] == [[16]] * 4 + [[26]]


@pytest.mark.parametrize("mixed", [False, True])
def test_however_many_rows_decode_along_an_aligned_chunk_is_taken(mixed: bool) -> None:
    engine = Engine(
        pages=128, chunked_prefill_size=16, truncation_align_size=16, mixed=mixed, rows=8
    )
    engine.add(*prompts(4, 4, 4, max_new_tokens=60))
    engine.step()
    engine.step()
    engine.add(make_req("long", [30] * 70, max_new_tokens=2))
    for _ in range(5):
        engine.step()
    assert "long" in engine.outputs
    engine.drain()

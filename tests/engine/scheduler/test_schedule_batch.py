"""A batch's tensors and its memory."""

import pytest
import torch

from engine.errors import OutOfMemoryError
from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.scheduler.stub import make_req

PAGE = 4


@pytest.fixture
def memory() -> MemoryPools:
    return make_memory_pools(num_pages=16, page_size=PAGE, num_rows=4, max_context_len=64)


def extended(memory: MemoryPools, *reqs: Req) -> ScheduleBatch:
    """A batch whose extend has run and drawn 9 for everybody."""
    for req in reqs:
        req.init_next_round_input(memory.tree_cache)
    batch = ScheduleBatch(reqs=list(reqs), memory=memory)
    batch.prepare_for_extend()
    batch.output_ids = torch.full((len(reqs),), 9)
    for req in reqs:
        req.append_output(9, None)
    return batch


def test_an_extend_describes_all_its_tokens(memory: MemoryPools) -> None:
    a, b = make_req("a", [1, 2, 3, 4, 5]), make_req("b", [6, 7])
    batch = extended(memory, a, b)
    forward = batch.to_forward_batch()
    assert forward.forward_mode is ForwardMode.EXTEND
    assert forward.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert forward.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert forward.out_cache_loc.tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert forward.seq_lens.tolist() == forward.seq_lens_cpu == [5, 2]
    assert (forward.extend_prefix_lens, forward.extend_lens) == ([0, 0], [5, 2])
    assert forward.sampling.position.tolist() == [5, 2]
    for name in ("input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "output_ids"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.orig_seq_lens.dtype == torch.int32
    assert batch.seq_lens_sum == 7


def test_a_decode_step_advances_every_row_by_one(memory: MemoryPools) -> None:
    batch = extended(memory, make_req("a", [1, 2, 3]), make_req("b", [4, 5, 6, 7]))
    before = batch.seq_lens
    assert batch.new_page_count_next_decode() == 1  # b's page is full
    batch.prepare_for_decode()
    forward = batch.to_forward_batch()
    assert forward.input_ids.tolist() == [9, 9]
    assert forward.positions.tolist() == [3, 4]
    assert forward.seq_lens.tolist() == [4, 5]
    assert before.tolist() == [3, 4]  # what was launched is not written again
    assert forward.out_cache_loc.tolist() == [3, 8]
    assert forward.extend_prefix_lens == [3, 4]
    row = batch.req_pool_indices.tolist()[1]
    assert forward.req_to_token[row, :5].tolist() == [4, 5, 6, 7, 8]


def test_sampling_tensors_stay_while_the_members_stay(memory: MemoryPools) -> None:
    batch = extended(memory, make_req("a", [1], seed=2**64 - 1), make_req("b", [2]))
    first = batch.to_forward_batch().sampling
    assert first.seed.tolist() == [-1, 0]
    batch.prepare_for_decode()
    second = batch.to_forward_batch().sampling
    assert second.temperature is first.temperature
    assert second.position.tolist() == [2, 2]
    batch.filter_batch(keep_indices=[1])
    assert batch.to_forward_batch().sampling.seed.tolist() == [0]


def test_filter_keeps_rows_and_tensors_in_step(memory: MemoryPools) -> None:
    reqs = [make_req(name, [1] * n) for name, n in (("a", 3), ("b", 5), ("c", 7))]
    batch = extended(memory, *reqs)
    batch.filter_batch(chunked_req_to_exclude=[reqs[1]])
    assert [req.rid for req in batch.reqs] == ["a", "c"]
    assert batch.seq_lens.tolist() == [3, 7]
    assert batch.req_pool_indices.tolist() == [reqs[0].req_pool_idx, reqs[2].req_pool_idx]
    assert batch.seq_lens_sum == 10


def test_mixing_makes_each_running_row_an_extend_of_one(memory: MemoryPools) -> None:
    running = extended(memory, make_req("run", [1, 2, 3]))
    new = make_req("new", [4, 5])
    new.init_next_round_input(memory.tree_cache)
    batch = ScheduleBatch(reqs=[new], memory=memory)
    batch.prepare_for_extend()
    running.prepare_for_decode()
    batch.mix_with_running(running)
    forward = batch.to_forward_batch()
    assert forward.forward_mode is ForwardMode.MIXED
    assert forward.input_ids.tolist() == [4, 5, 9]
    assert forward.positions.tolist() == [0, 1, 3]
    assert forward.extend_prefix_lens == [0, 3]
    assert forward.extend_lens == [2, 1]
    assert forward.seq_lens.tolist() == [2, 4]


def test_rows_that_run_out_are_named(memory: MemoryPools) -> None:
    with pytest.raises(OutOfMemoryError, match=r"5 asked, 4 of 4 free"):
        ScheduleBatch(reqs=[], memory=memory).alloc_req_slots(5)


def test_pages_that_run_out_are_named_and_none_is_taken(
    memory: MemoryPools, caplog: pytest.LogCaptureFixture
) -> None:
    batch = ScheduleBatch(reqs=[], memory=memory, forward_mode=ForwardMode.DECODE)
    with pytest.raises(OutOfMemoryError, match=r"Decode.*17 pages asked, 16 free, 0 evictable"):
        batch.alloc_token_slots(17 * PAGE)
    assert memory.allocator.free_pages == 16
    assert "prefix cache: 0 tokens evictable" in caplog.text


def test_slots_can_be_given_back_by_restoring_the_state(memory: MemoryPools) -> None:
    batch = ScheduleBatch(reqs=[], memory=memory)
    pages, state = batch.alloc_token_slots(5, backup_state=True)
    assert len(pages) == 2
    memory.allocator.restore_state(state)
    assert memory.allocator.free_pages == 16


def test_decode_memory_counts_full_pages_times_the_buffer(memory: MemoryPools) -> None:
    batch = extended(memory, make_req("a", [1] * 4), make_req("b", [1] * 8))
    memory.alloc_pages(9)  # 4 left
    assert batch.check_decode_mem()
    assert batch.check_decode_mem(buf_multiplier=2)
    assert not batch.check_decode_mem(buf_multiplier=3)
    assert batch.check_decode_mem(reserved_tokens=2 * PAGE)
    assert not batch.check_decode_mem(reserved_tokens=3 * PAGE)


def test_decode_memory_evicts_from_the_tree(memory: MemoryPools) -> None:
    batch = extended(memory, make_req("a", [1] * 4))
    memory.tree_cache.insert([5] * 60, memory.alloc_pages(15))
    assert batch.check_decode_mem()
    assert memory.allocator.free_pages == 1


def test_retraction_takes_the_shortest_output_then_the_longest_prompt(
    memory: MemoryPools,
) -> None:
    reqs = [
        make_req("long output", [1] * 4, max_new_tokens=100),
        make_req("short prompt", [2] * 4, max_new_tokens=100),
        make_req("long prompt", [3] * 8, max_new_tokens=100),
    ]
    batch = extended(memory, *reqs)
    reqs[0].output_ids = [9] * 5
    memory.alloc_pages(12)  # none left: three full pages need three
    assert not batch.check_decode_mem()
    result = batch.retract_decode()
    assert [req.rid for req in result.retracted] == ["long prompt"]
    assert result.does_not_fit is None
    assert [req.rid for req in batch.reqs] == ["long output", "short prompt"]
    victim = reqs[2]
    assert (victim.pages, victim.req_pool_idx, victim.kv_committed_len) == ([], None, 0)
    assert victim.phase is RequestPhase.WAITING
    assert victim.output_ids == [9]
    assert result.new_token_ratio == pytest.approx((5 + 1 + 20 * 2) / (200 + 1))


def test_the_last_one_stays_and_is_reported_if_it_does_not_fit(memory: MemoryPools) -> None:
    only = make_req("only", [1] * 4, max_new_tokens=20)
    batch = extended(memory, only)
    memory.alloc_pages(15)
    result = batch.retract_decode()
    assert result.does_not_fit is only
    assert batch.reqs == [only]


def test_a_batch_has_every_field_of_the_seed(memory: MemoryPools) -> None:
    batch = ScheduleBatch(reqs=[], memory=memory)
    assert batch.is_empty()
    batch = extended(memory, make_req("a", [1, 2, 3]), make_req("b", [4, 5]))
    assert not batch.is_empty()
    assert batch.batch_size() == 2
    assert batch.req_to_token_pool is memory.req_to_token
    assert batch.token_to_kv_pool_allocator is memory.allocator
    assert batch.tree_cache is memory.tree_cache
    shapes = {"input_ids": 5, "out_cache_loc": 5, "req_pool_indices": 2, "seq_lens": 2,
              "output_ids": 2, "orig_seq_lens": 2}  # fmt: skip
    for name, length in shapes.items():
        assert getattr(batch, name).shape == (length,)
    for name in ("is_hybrid", "enable_overlap", "batch_is_full", "is_prefill_only"):
        assert getattr(batch, name) is False
    for name in ("model_config", "chunked_req", "input_embeds", "multimodal_inputs"):
        assert getattr(batch, name) is None
    assert batch.forward_mode is ForwardMode.EXTEND
    assert batch.seq_lens_sum == 5


def test_pages_are_counted_anew_when_members_come_and_go(memory: MemoryPools) -> None:
    batch = extended(memory, make_req("a", [1, 2, 3, 4]))
    assert batch.rows_that_need_a_page() == [0]
    batch.merge_batch(extended(memory, make_req("b", [5]), make_req("c", [6] * 8)))
    assert batch.rows_that_need_a_page() == [0, 2]
    batch.filter_batch(keep_indices=[1, 2])
    assert batch.rows_that_need_a_page() == [1]
    batch.prepare_for_decode()
    assert batch.new_page_count_next_decode() == 0


def test_who_has_ended_is_dropped_when_somebody_can_have(memory: MemoryPools) -> None:
    short, long = make_req("a", [1], max_new_tokens=3), make_req("b", [2], max_new_tokens=9)
    batch = extended(memory, short, long)  # one output each
    batch.drop_ended(0)
    for _ in range(2):
        assert batch.reqs == [short, long]
        batch.prepare_for_decode()
        short.append_output(9, None)
        long.append_output(9, None)
        batch.drop_ended(0)
    assert batch.reqs == [long]  # by its length, whoever counts endings
    long.finish_reason = FinishReason.ABORT
    batch.drop_ended(0)
    assert batch.reqs == [long]
    batch.drop_ended(1)
    assert batch.is_empty()


def test_split_prefill_is_a_mode(memory: MemoryPools) -> None:
    req = make_req("a", [1, 2])
    req.init_next_round_input(memory.tree_cache)
    batch = ScheduleBatch(reqs=[req], memory=memory)
    batch.prepare_for_extend()
    batch.prepare_for_split_prefill()
    assert batch.forward_mode is ForwardMode.SPLIT_PREFILL
    assert batch.forward_mode.is_extend()


def test_a_prebuilt_batch_joins_with_its_first_token(memory: MemoryPools) -> None:
    req = make_req("a", [1, 2, 3, 4, 5])
    req.pages, req.kv_committed_len = memory.alloc_pages(2), 5
    batch = ScheduleBatch(reqs=[req], memory=memory)
    batch.prepare_for_prebuilt()
    batch.process_prebuilt([7])
    assert batch.forward_mode is ForwardMode.PREBUILT
    assert req.output_ids == [7]
    batch.prepare_for_decode()
    forward = batch.to_forward_batch()
    assert forward.input_ids.tolist() == [7]
    assert forward.seq_lens.tolist() == [6]
    assert forward.out_cache_loc.tolist() == [req.pages[1] * PAGE + 1]

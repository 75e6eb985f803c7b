"""Every name of the document that this scheduler is built from exists here (docs/scheduling.md says
where one is spelt otherwise, and why). What each does, the other tests of this folder show."""

import inspect

import pytest

from engine.execution.forward_batch import ForwardMode
from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import BasePrefixCache
from engine.memory.req_to_token import ReqToTokenPool
from engine.scheduler.decode_mixin import ScheduleBatchDisaggregationDecodeMixin
from engine.scheduler.policy import SchedulePolicy
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.scheduler import Scheduler
from tests.engine.scheduler.stub import Engine, make_req

NAMES: dict[type, str] = {
    Scheduler: "get_next_batch_to_run get_new_batch_prefill get_num_allocatable_reqs "
    "move_ready_grammar_requests update_running_batch is_mixed_chunk",
    ScheduleBatch: "is_empty batch_size alloc_req_slots alloc_token_slots mix_with_running "
    "filter_batch merge_batch new_page_count_next_decode check_decode_mem "
    "prepare_for_split_prefill prepare_for_extend prepare_for_decode retract_decode",
    ScheduleBatchDisaggregationDecodeMixin: "prepare_for_prebuilt process_prebuilt",
    PrefillAdder: "add_req add_one_req add_chunked_req add_one_req_ignore_eos "
    "preempt_to_schedule get_batch",
    SchedulePolicy: "calc_priority",
    BasePrefixCache: "cache_unfinished_req cache_finished_req check_hicache_events pretty_print",
    PageAllocator: "alloc free available_size backup_state page_size",
    ReqToTokenPool: "alloc free available_size",
    Req: "init_next_round_input fill_ids seqlen",
}
OF_A_SCHEDULER = "chunked_req last_batch running_batch waiting_queue grammar_queue policy "
OF_A_BATCH = (
    "reqs req_to_token_pool token_to_kv_pool_allocator tree_cache is_hybrid model_config "
    "forward_mode enable_overlap batch_is_full chunked_req input_ids input_embeds "
    "req_pool_indices seq_lens out_cache_loc output_ids multimodal_inputs seq_lens_sum "
    "orig_seq_lens is_prefill_only prefix_lens extend_lens extend_num_tokens "
    "extend_logprob_start_lens"
)
OF_AN_ADDER = (
    "page_size tree_cache token_to_kv_pool_allocator running_batch new_token_ratio "
    "rem_input_tokens rem_chunk_tokens can_run_list new_chunked_req log_hit_tokens "
    "log_input_tokens"
)


@pytest.mark.parametrize("owner", NAMES, ids=lambda owner: owner.__name__)
def test_a_class_has_what_the_seed_names(owner: type) -> None:
    missing = [
        name
        for name in NAMES[owner].split()
        if not hasattr(owner, name) and name not in inspect.getsource(owner)
    ]
    assert missing == []


def test_so_have_a_scheduler_its_batch_and_its_adder() -> None:
    engine = Engine()
    engine.add(make_req("a", [1, 2, 3]))
    scheduler = engine.scheduler
    batch = scheduler.get_next_batch_to_run()
    adder = scheduler._make_adder(0)
    for owner, names in ((scheduler, OF_A_SCHEDULER), (batch, OF_A_BATCH), (adder, OF_AN_ADDER)):
        assert [name for name in names.split() if not hasattr(owner, name)] == []
    parameters = list(inspect.signature(PrefillAdder).parameters)[:8]
    assert parameters == [
        "page_size", "tree_cache", "token_to_kv_pool_allocator", "running_batch",
        "new_token_ratio", "rem_input_tokens", "rem_chunk_tokens", "mixed_with_decode_tokens",
    ]  # fmt: skip
    assert {result.name for result in AddReqResult} == {"CONTINUE", "NO_TOKEN", "OTHER"}
    assert {mode.name for mode in ForwardMode} == {
        "EXTEND", "DECODE", "MIXED", "SPLIT_PREFILL", "PREBUILT", "IDLE"
    }  # fmt: skip

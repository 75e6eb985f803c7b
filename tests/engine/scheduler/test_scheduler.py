"""The scheduler's passes on one engine."""

import pytest

from engine.errors import (
    ConfigError,
    DuplicateRequestError,
    InvalidRequestError,
    OutOfMemoryError,
    QueueFullError,
)
from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import make_memory_pools
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.new_token_ratio import NewTokenRatio
from engine.scheduler.req import FinishReason
from engine.scheduler.role import OwnerKind, SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from tests.engine.scheduler.stub import (
    CONTEXT,
    EOS,
    VOCAB,
    Engine,
    StubRunner,
    make_req,
    next_token,
    undisturbed,
)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 40])
def test_prompts_of_every_length_give_the_undisturbed_tokens(page_size: int, length: int) -> None:
    engine = Engine(pages=160 // page_size, page_size=page_size)
    req = make_req("a", [n % VOCAB for n in range(length)], max_new_tokens=10)
    engine.add(req)
    engine.drain()
    assert engine.tokens("a") == undisturbed(req)
    assert engine.outputs["a"][-1].finish_reason is FinishReason.LENGTH
    assert engine.released == ["a"]


def test_a_long_prompt_runs_in_chunks_then_decodes() -> None:
    engine = Engine(chunked_prefill_size=16)
    engine.add(make_req("a", [1] * 40, max_new_tokens=3))
    engine.drain()
    assert engine.runner.forwards == [
        (ForwardMode.EXTEND, [16]),
        (ForwardMode.EXTEND, [16]),
        (ForwardMode.EXTEND, [8]),
        (ForwardMode.DECODE, [1]),
        (ForwardMode.DECODE, [1]),
    ]


def test_a_second_request_reuses_the_firsts_whole_pages() -> None:
    engine = Engine()
    prompt = list(range(10))
    engine.add(make_req("a", prompt))
    engine.drain()
    again = make_req("b", prompt)
    engine.add(again)
    engine.drain()
    assert engine.tokens("b") == engine.tokens("a")
    assert again.cached_tokens == 8
    assert (ForwardMode.EXTEND, [2]) in engine.runner.forwards


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine = Engine()
    for rid in ("a", "b"):
        engine.add(make_req(rid, [1] * 8))
        engine.drain()
    assert engine.tokens("a") == engine.tokens("b")
    assert engine.scheduler.page_counts().cached > 0


def test_a_new_prefill_goes_before_decode_and_mixed_chunk_joins_them() -> None:
    for mixed, expected in ((False, ForwardMode.EXTEND), (True, ForwardMode.MIXED)):
        engine = Engine(mixed=mixed)
        engine.add(make_req("a", [1] * 4, max_new_tokens=8))
        engine.step()
        engine.step()
        engine.add(make_req("b", [2] * 4, max_new_tokens=8))
        engine.step()
        assert engine.modes == [ForwardMode.EXTEND, ForwardMode.DECODE, expected]
        engine.drain()
        assert engine.tokens("a") == undisturbed(make_req("a", [1] * 4, max_new_tokens=8))
        assert engine.tokens("b") == undisturbed(make_req("b", [2] * 4, max_new_tokens=8))


def test_mixing_is_left_out_where_either_side_wants_logprobs() -> None:
    engine = Engine(mixed=True)
    engine.add(make_req("a", [1] * 4, max_new_tokens=8, logprobs=True))
    engine.step()
    engine.add(make_req("b", [2] * 4, max_new_tokens=8))
    engine.drain()
    assert ForwardMode.MIXED not in engine.modes
    assert [o.logprob for o in engine.outputs["a"]] == [-float(t) for t in engine.tokens("a")]
    assert all(o.logprob is None for o in engine.outputs["b"])


def test_requests_come_first_in_first_out_and_by_priority_where_that_is_on() -> None:
    for priorities, expected in ((False, ["a", "b", "c"]), (True, ["c", "a", "b"])):
        engine = Engine(max_running_requests=1, priorities=priorities)
        for rid, priority in (("a", 0), ("b", 0), ("c", -5)):
            engine.add(make_req(rid, [1] * 4, max_new_tokens=2, priority=priority))
        engine.drain()
        assert engine.released == expected


def test_the_running_limit_holds() -> None:
    engine = Engine(max_running_requests=2)
    for rid in "abcd":
        engine.add(make_req(rid, [1], max_new_tokens=5))
    engine.step()
    assert len(engine.scheduler.waiting_queue) == 2
    engine.step()
    assert engine.scheduler.running_batch.batch_is_full
    engine.drain()
    assert sorted(engine.outputs) == list("abcd")


def test_memory_that_runs_short_retracts_and_nobody_notices() -> None:
    engine = Engine(pages=16, page_size=4, chunked_prefill_size=None, conservativeness=0.01)
    reqs = [make_req(f"{i}", [i] * 8, max_new_tokens=40, ignore_eos=False) for i in range(1, 4)]
    for req in reqs:
        req.stop_token_ids = frozenset()  # it does not stop, though the estimate hopes so
    engine.add(*reqs)
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    for req in reqs:
        expected = undisturbed(make_req("x", req.origin_input_ids, max_new_tokens=40))
        assert engine.tokens(req.rid) == expected


def test_a_request_that_fills_the_memory_alone_is_served() -> None:
    for radix in (True, False):
        engine = Engine(pages=8, page_size=4, radix=radix)
        req = make_req("a", [1] * 20, max_new_tokens=12)
        engine.add(req)
        engine.drain()
        assert engine.tokens("a") == undisturbed(req)


def test_the_last_one_that_cannot_go_on_ends_with_an_error_and_the_engine_lives() -> None:
    engine = Engine(pages=8, page_size=4)
    engine.add(make_req("a", [1] * 8, max_new_tokens=20))
    engine.step()
    stolen = engine.memory.alloc_pages(engine.memory.allocator.free_pages)
    # The thief owns no page officially, so the invariant is looked at only afterwards.
    errors = [error for _ in range(3) for error in engine.scheduler.step().errors]
    ((rid, error),) = errors
    assert rid == "a"
    assert isinstance(error, OutOfMemoryError)
    engine.memory.free_pages(stolen)
    engine.scheduler.check_invariant()
    engine.add(make_req("b", [2] * 4))
    engine.drain()
    assert engine.tokens("b") == undisturbed(make_req("b", [2] * 4))


class Thief(SchedulerRole):
    """Owns pages of its own, as tickets do."""

    def __init__(self) -> None:
        self.stolen: list[int] = []

    def page_owners(self) -> list[tuple[OwnerKind, list[int]]]:
        return [("in_use", self.stolen)]


def test_a_half_done_prompt_gives_way_to_the_last_one_running() -> None:
    thief = Thief()
    engine = Engine(pages=24, page_size=4, role=thief)
    first = make_req("first", [1] * 8, max_new_tokens=6)
    second = make_req("second", [2] * 40, max_new_tokens=6)
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.step()
    thief.stolen = engine.memory.alloc_pages(engine.memory.allocator.free_pages)
    engine.step()
    assert len(engine.tokens("first")) == 2
    assert engine.scheduler.chunked_req is None
    assert list(engine.scheduler.waiting_queue) == [second]
    engine.memory.free_pages(thief.stolen)
    thief.stolen = []
    engine.drain()
    assert engine.tokens("first") == undisturbed(first)
    assert engine.tokens("second") == undisturbed(second)


def test_the_last_one_running_waits_for_pages_that_transfers_keep() -> None:
    thief = Thief()
    engine = Engine(pages=8, page_size=4, role=thief)
    req = make_req("a", [1] * 8, max_new_tokens=6)
    engine.add(req)
    engine.step()
    thief.stolen = engine.memory.alloc_pages(6)
    assert not engine.step().ran
    assert not engine.errors
    engine.memory.free_pages(thief.stolen)
    thief.stolen = []
    engine.drain()
    assert engine.tokens("a") == undisturbed(req)


def test_requests_wait_for_a_row() -> None:
    engine = Engine(rows=2, max_running_requests=8)
    engine.add(*(make_req(rid, [1], max_new_tokens=5) for rid in "abcd"))
    engine.step()
    assert len(engine.scheduler.waiting_queue) == 2
    engine.drain()
    assert sorted(engine.released) == list("abcd")


def test_stop_tokens_end_of_sequence_and_ignore_eos() -> None:
    prompt = next([a, b] for a in range(VOCAB) for b in range(VOCAB) if next_token([a, b]) == EOS)
    engine = Engine()
    engine.add(make_req("stops", prompt, ignore_eos=False, max_new_tokens=6))
    engine.add(make_req("goes on", prompt, ignore_eos=True, max_new_tokens=6))
    second = undisturbed(make_req("x", prompt, max_new_tokens=6))[1]
    engine.add(make_req("own", prompt, max_new_tokens=6, stop_token_ids=frozenset({second})))
    engine.drain()
    assert engine.tokens("stops") == [EOS]
    (only,) = engine.outputs["stops"]
    assert (only.finish_reason, only.stop_token) == (FinishReason.STOP, EOS)
    assert len(engine.tokens("goes on")) == 6
    assert engine.outputs["own"][-1].stop_token == second
    assert len(engine.tokens("own")) == 2


def test_the_contexts_end_is_a_length_finish() -> None:
    engine = Engine(pages=64)
    engine.add(make_req("a", [1] * (CONTEXT - 3), max_new_tokens=50))
    engine.drain()
    assert len(engine.tokens("a")) == 3
    assert engine.outputs["a"][-1].finish_reason is FinishReason.LENGTH


def test_a_replay_goes_on_where_it_was_with_absolute_indices() -> None:
    whole = undisturbed(make_req("x", [5] * 6, max_new_tokens=9))
    engine = Engine()
    engine.add(make_req("a", [5] * 6, max_new_tokens=9, prior=whole[:4]))
    engine.drain()
    assert engine.tokens("a") == whole[4:]
    assert engine.outputs["a"][0].index == 4


@pytest.mark.parametrize(
    ("prompt", "new", "prior", "message"),
    [
        ([], 1, [], "empty"),
        ([VOCAB], 1, [], f"token id {VOCAB}"),
        ([1, -1], 1, [], "token id -1"),
        ([1], 4, [1, VOCAB], f"token id {VOCAB}"),
        ([1] * CONTEXT, 1, [], "context"),
        ([1] * 30, 3, [], "KV memory of 32 tokens"),
        ([1], 2, [1, 1], "2 tokens are produced already"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    prompt: list[int], new: int, prior: list[int], message: str
) -> None:
    engine = Engine(pages=8, page_size=4)
    with pytest.raises(InvalidRequestError, match=message):
        engine.add(make_req("a", prompt, max_new_tokens=new, prior=prior))
    assert not engine.scheduler.has_work()
    engine.add(make_req("a", [1]))
    engine.drain()
    assert len(engine.tokens("a")) == 4


def test_a_live_id_is_refused_and_free_again_after_its_end() -> None:
    engine = Engine()
    engine.add(make_req("a", [1]))
    with pytest.raises(DuplicateRequestError):
        engine.add(make_req("a", [2]))
    engine.drain()
    engine.add(make_req("a", [2]))


def test_the_queue_has_a_bound() -> None:
    engine = Engine(max_queued_requests=2)
    engine.add(make_req("a", [1]), make_req("b", [1]))
    with pytest.raises(QueueFullError):
        engine.add(make_req("c", [1]))
    engine.drain()
    assert sorted(engine.released) == ["a", "b"]


@pytest.mark.parametrize("passes", range(7))
def test_an_abort_in_any_phase_frees_everything(passes: int) -> None:
    engine = Engine(max_running_requests=2)
    engine.add(make_req("first", [1] * 40, max_new_tokens=20))
    engine.add(make_req("second", [2] * 6, max_new_tokens=20))
    for _ in range(passes):
        engine.step()
    for rid in ("first", "second"):
        assert engine.scheduler.abort_request(RequestId(rid))
        assert not engine.scheduler.abort_request(RequestId(rid))
    engine.drain()
    assert sorted(engine.aborted) == sorted(engine.released) == ["first", "second"]
    assert engine.scheduler.page_counts().in_use == 0
    assert engine.scheduler.row_counts().in_use == 0
    assert not engine.scheduler.abort_request(RequestId("unknown"))


def test_an_abort_leaves_the_others_alone() -> None:
    engine = Engine()
    reqs = [make_req(rid, [ord(rid) % VOCAB] * 5, max_new_tokens=12) for rid in "abc"]
    engine.add(*reqs)
    engine.step()
    engine.step()
    engine.scheduler.abort_request(RequestId("b"))
    engine.drain()
    assert engine.tokens("a") == undisturbed(reqs[0])
    assert engine.tokens("c") == undisturbed(reqs[2])
    assert 0 < len(engine.tokens("b")) < 12


def test_the_estimate_of_growth_decays_jumps_and_resets() -> None:
    ratio = NewTokenRatio(1.0)
    assert ratio.current == pytest.approx(0.7)
    for _ in range(600):
        ratio.on_decode()
    assert ratio.current == pytest.approx(0.098)
    ratio.on_decode()
    assert ratio.current == pytest.approx(0.098)
    ratio.on_retraction(0.9)
    assert ratio.current == 0.9
    ratio.on_idle()
    assert ratio.current == pytest.approx(0.7)
    assert NewTokenRatio(10.0).current == 1.0


def test_settings_that_contradict_each_other_are_refused() -> None:
    memory = make_memory_pools(num_pages=4, page_size=4, num_rows=1, max_context_len=16)
    good = {"page_size": 4, "context_length": 16, "vocab_size": 10}
    for wrong in ({"page_size": 2}, {"context_length": 17}, {"chunked_prefill_size": 3}):
        with pytest.raises(ConfigError):
            Scheduler(SchedulerConfig(**{**good, **wrong}), StubRunner(memory), memory)

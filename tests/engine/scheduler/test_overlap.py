"""Overlap (scheduling.md section 7): the same outputs, and no page changes hands too early."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.execution.forward_batch import ForwardMode
from engine.grammar.backend import GrammarMatcher
from engine.memory.page_allocator import PageAllocator
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.role import SchedulerRole
from engine.types import RequestId
from tests.engine.scheduler.async_runner import PageTakenAwayError
from tests.engine.scheduler.drawn import SamplingRunner, wanted
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.machine.grammars import StubBackend
from tests.engine.scheduler.stub import EOS, VOCAB, Engine, make_req, next_token, undisturbed

A = RequestId("a")


def prompt_that_stops_after(outputs: int, *, length: int = 2) -> list[int]:
    """A prompt after which the stub draws end of sequence as its `outputs`-th token."""
    for n in range(VOCAB**2):
        prompt = [n % VOCAB, n // VOCAB] + [7] * (length - 2)
        req = make_req("x", prompt, max_new_tokens=outputs + 1, ignore_eos=False)
        if len(undisturbed(req)) == outputs and undisturbed(req)[-1] == EOS:
            return prompt
    raise AssertionError("no such prompt")


# ---- what overlaps


def test_a_step_is_launched_before_the_one_before_is_handled() -> None:
    engine = Engine(overlap=True)
    req = make_req("a", [1, 2, 3], max_new_tokens=6)
    engine.add(req)
    first = engine.step()
    assert (first.outputs, first.num_input_tokens, first.num_handled) == ([], 3, 0)
    assert first.ran
    second = engine.step()
    assert [output.token for output in second.outputs] == undisturbed(req)[:1]
    assert engine.device.deepest == 2
    engine.drain()
    assert engine.tokens("a") == undisturbed(req)


def test_the_last_result_is_handled_by_a_pass_that_launches_nothing() -> None:
    engine = Engine(overlap=True)
    engine.add(make_req("a", [1], max_new_tokens=2))
    engine.step()
    engine.step()
    assert engine.scheduler.has_work()
    last = engine.step()
    assert (last.num_input_tokens, last.num_handled) == (0, 1)
    assert last.ran
    assert last.outputs[0].finish_reason is FinishReason.LENGTH
    assert last.released == ["a"]
    assert not engine.scheduler.has_work()


def test_a_request_that_ends_by_length_is_not_launched_once_too_often() -> None:
    launches = []
    for overlap in (False, True):
        engine = Engine(overlap=overlap)
        engine.add(*(make_req(rid, [1], max_new_tokens=n) for rid, n in (("a", 3), ("b", 7))))
        engine.drain()
        launches.append(engine.runner.forwards)
    assert launches[0] == launches[1]


def test_the_token_after_an_end_is_ignored_and_memory_goes_back_once_with_the_last_step() -> None:
    prompt = prompt_that_stops_after(2)
    engine = Engine(overlap=True)
    engine.add(make_req("a", prompt, ignore_eos=False, max_new_tokens=9))
    engine.add(make_req("b", [3], max_new_tokens=9))
    engine.step()
    engine.step()
    req = engine.scheduler.find_request(A)
    assert req is not None
    ended = engine.step()  # launches the third step, handles the second
    assert [o.finish_reason for o in ended.outputs if o.rid == "a"] == [FinishReason.STOP]
    assert req.phase is RequestPhase.ENDING
    assert req.pages
    assert ended.released == []
    assert not engine.scheduler.abort_request(A)
    after = engine.step()
    assert after.released == ["a"]
    assert [o.rid for o in after.outputs] == ["b"]
    assert engine.tokens("a")[-1] == EOS
    engine.drain()
    assert engine.runner.forwards[2] == (ForwardMode.DECODE, [1, 1])
    assert engine.runner.forwards[3] == (ForwardMode.DECODE, [1])
    assert engine.released == ["a", "b"]


def test_the_kv_of_the_ending_token_may_be_cached_but_never_of_one_that_nobody_knows() -> None:
    # Page size 1: every token is a page of its own, so one too many would show in the tree.
    prompt = prompt_that_stops_after(2)
    engine = Engine(overlap=True, page_size=1, pages=64)
    req = make_req("a", prompt, ignore_eos=False, max_new_tokens=9)
    engine.add(req)
    engine.drain()
    known = prompt + undisturbed(make_req("a", prompt, ignore_eos=False, max_new_tokens=9))
    assert engine.memory.tree_cache.total_pages() == len(known)
    assert len(engine.memory.tree_cache.match_prefix(known).pages) == len(known)


def test_the_tree_lends_no_page_that_a_launched_step_still_writes() -> None:
    engine = Engine(overlap=True)
    req = make_req("a", [1] * 7, max_new_tokens=9)
    engine.add(req)
    engine.step()
    engine.step()  # the step that fills the second page has been launched
    assert req.kv_committed_len == 8
    assert len(engine.memory.tree_cache.match_prefix([1] * 7 + req.output_ids).pages) == 1
    engine.drain()
    assert len(engine.memory.tree_cache.match_prefix([1] * 7 + req.output_ids).pages) == 3


# ---- whatever else happens meanwhile


@pytest.mark.parametrize("passes", range(8))
def test_an_abort_in_any_phase_frees_everything_when_no_step_touches_it(passes: int) -> None:
    engine = Engine(max_running_requests=2, overlap=True)
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


def test_an_aborted_request_keeps_its_pages_while_its_step_runs() -> None:
    engine = Engine(overlap=True)
    engine.add(make_req("a", [1] * 8, max_new_tokens=20), make_req("b", [2], max_new_tokens=20))
    engine.step()
    engine.step()
    assert engine.scheduler.abort_request(A)
    passed = engine.step()
    assert passed.aborted == ["a"]
    assert "a" not in [output.rid for output in passed.outputs]
    assert passed.released == ["a"]
    engine.drain()
    assert len(engine.tokens("b")) == 20


def test_memory_that_runs_short_retracts_with_every_token_known() -> None:
    engine = Engine(
        pages=16, page_size=4, chunked_prefill_size=None, conservativeness=0.01, overlap=True
    )
    reqs = [make_req(f"{i}", [i] * 8, max_new_tokens=40, ignore_eos=False) for i in range(1, 4)]
    for req in reqs:
        req.stop_token_ids = frozenset()  # it does not stop, though the estimate hopes so
    engine.add(*reqs)
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    for req in reqs:
        expected = undisturbed(make_req("x", req.origin_input_ids, max_new_tokens=40))
        assert engine.tokens(req.rid) == expected


def test_a_retraction_is_not_needed_where_the_outstanding_step_ends_somebody() -> None:
    prompt = prompt_that_stops_after(5, length=4)
    engine = Engine(pages=6, page_size=4, radix=False, conservativeness=0.01, overlap=True)
    engine.add(make_req("a", prompt, max_new_tokens=12, ignore_eos=False))
    other = make_req("b", [3] * 4, max_new_tokens=12, ignore_eos=False)
    other.stop_token_ids = frozenset()
    engine.add(other)
    engine.drain()
    assert engine.scheduler.num_retractions == 0
    assert engine.tokens("b") == undisturbed(make_req("b", [3] * 4, max_new_tokens=12))


def test_mixed_chunks_take_tokens_that_are_still_on_the_device() -> None:
    engine = Engine(mixed=True, overlap=True)
    engine.add(make_req("a", [1] * 4, max_new_tokens=12))
    engine.step()
    engine.step()
    engine.add(make_req("b", [2] * 40, max_new_tokens=4))
    engine.drain()
    assert engine.modes.count(ForwardMode.MIXED) == 3 + 1
    assert engine.tokens("a") == undisturbed(make_req("a", [1] * 4, max_new_tokens=12))
    assert engine.tokens("b") == undisturbed(make_req("b", [2] * 40, max_new_tokens=4))


def test_a_chunk_is_told_to_the_role_while_the_next_one_runs() -> None:
    class Watching(FakePrefillRole):
        launched_ahead: list[int]

        def on_extend_result(self, req: Req, **result: Any) -> None:
            super().on_extend_result(req, **result)
            self.launched_ahead.append(req.kv_committed_len - req.kv_ready_len)
            assert engine.runner.kv_token[slots_of(req)].tolist() == req.token_ids(req.kv_ready_len)

    def slots_of(req: Req) -> list[int]:
        pages = engine.scheduler.request_pages(req)
        return [page * 4 + offset for page in pages for offset in range(4)][: req.kv_ready_len]

    role = Watching()
    role.launched_ahead = []
    engine = Engine(role=role, overlap=True)
    req = make_req("a", [1] * 40, max_new_tokens=9)
    engine.add(req)
    for _ in range(4):
        engine.step()
    assert role.extends == [("a", 16, False), ("a", 32, False), ("a", 40, True)]
    assert role.launched_ahead == [16, 8, 0]
    assert engine.scheduler.transferring == {"a": req}
    assert engine.scheduler.request_pages(req) == req.pages
    assert engine.tokens("a") == undisturbed(req)[:1]
    role.sending.clear()
    engine.scheduler.release_request(req)
    engine.drain()
    assert engine.released == ["a"]


def test_a_chunk_that_was_aborted_under_way_is_never_lent_by_a_prefill_worker() -> None:
    # Its role was not told of these pages, so nothing vouches for them.
    role = FakePrefillRole()
    engine = Engine(role=role, overlap=True)
    req = make_req("a", [1] * 40)
    engine.add(req)
    engine.step()
    engine.step()
    engine.scheduler.abort_request(A)
    engine.step()
    engine.step()
    told = role.extends[-1][1]
    role.sending.clear()
    engine.scheduler.release_request(req)
    engine.drain()
    assert told == 16
    assert len(engine.memory.tree_cache.match_prefix([1] * 40).pages) * 4 <= told


def test_a_prebuilt_request_joins_and_continues_from_the_second_token() -> None:
    engine = Engine(overlap=True)
    other = make_req("other", [9] * 5, max_new_tokens=12)
    engine.add(other)
    engine.step()
    engine.step()
    req = make_req("a", [1, 2, 3, 4, 5], max_new_tokens=6)
    expected = undisturbed(req)
    pages = engine.memory.alloc_pages(2)
    for position in range(5):
        slot = pages[position // 4] * 4 + position % 4
        engine.runner.kv_token[slot] = position + 1
        engine.runner.kv_position[slot] = position
    engine.scheduler.add_prebuilt(req, pages, expected[0])
    engine.drain()
    assert engine.tokens("a") == expected[1:]
    assert engine.tokens("other") == undisturbed(other)


class Anything(GrammarMatcher):
    """A grammar that allows all; what matters here is when its masks are asked for."""

    is_complete = False

    def __init__(self) -> None:
        self.backend = StubBackend()
        self.backend.fill_masks = self.fill_masks  # type: ignore[method-assign]
        self.known = 0
        self.known_at_each_draw: list[int] = []

    def advance(self, token: int) -> None:
        self.known += 1

    def fill_masks(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        self.known_at_each_draw.append(self.known)
        masks.fill_(-1)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_draw_under_a_grammar_waits_for_the_token_before_and_the_layers_do_not(
    mixed: bool,
) -> None:
    engine = Engine(overlap=True, mixed=mixed)
    grammar = Anything()
    req = make_req("a", [1, 2, 3], max_new_tokens=6)
    engine.add(req, make_req("b", [4, 5], max_new_tokens=9))
    req.grammar = grammar
    engine.step()
    engine.add(make_req("late", [6] * 20, max_new_tokens=2))
    engine.drain()
    assert grammar.known_at_each_draw == list(range(6))
    assert engine.device.deepest == 2
    assert [len(engine.tokens(rid)) for rid in ("a", "b", "late")] == [6, 9, 2]


def test_sampled_requests_draw_alike() -> None:
    everything: dict[str, Any] = {
        "temperature": 0.8,
        "min_p": 0.02,
        "seed": 11,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.6,
        "logit_bias": {3: 2.0, 9: -100.0},
        "min_tokens": 10,
        "stop_token_ids": frozenset({5}),
    }
    seen = []
    for overlap in (False, True):
        engine = Engine(runner=SamplingRunner, overlap=overlap, late=False)
        requests = [
            wanted([2, 4, 6], rid="plain", max_new_tokens=14, ignore_eos=True),
            wanted([1] * 20, rid="edited", max_new_tokens=20, **everything),
            wanted([3] * 20, rid="told", max_new_tokens=5, logprobs=True, top_logprobs=3,
                   prompt_logprobs=2),
        ]  # fmt: skip
        engine.add(*(request.req() for request in requests))
        engine.drain()
        assert engine.tokens("edited") == requests[1].tokens()
        seen.append(engine.outputs)
    assert seen[0] == seen[1]


@given(seed=st.integers(0, 2**32), page_size=st.sampled_from([1, 4]), mixed=st.booleans())
@settings(max_examples=100)
def test_everything_is_the_same_with_overlap_and_without(
    seed: int, page_size: int, mixed: bool
) -> None:
    """Tokens, endings and log probabilities of the same arrivals; a request's own pace may differ,
    as nobody promises that."""
    seen = []
    for overlap in (False, True):
        rng = random.Random(seed)
        engine = Engine(
            pages=96 // page_size,
            page_size=page_size,
            mixed=mixed,
            max_running_requests=4,
            conservativeness=0.02,
            overlap=overlap,
            late=False,
        )
        todo = [
            make_req(
                f"r{n}",
                [3] * rng.choice([0, 8, 20])
                + [rng.randrange(2) for _ in range(rng.choice([1, 9]))],
                max_new_tokens=rng.choice([1, 2, 12, 30]),
                ignore_eos=rng.random() < 0.5,
                seed=n % 3,
                logprobs=rng.random() < 0.2,
            )
            for n in range(8)
        ]
        while todo or engine.scheduler.has_work():
            if todo and rng.random() < 0.4:
                engine.add(todo.pop())
            engine.step()
        assert not engine.errors
        seen.append(engine.outputs)
    assert seen[0] == seen[1]


# ---- the guards, each taken away


@contextmanager
def without(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, stand_in: Any
) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stand_in)
        yield


def crowd(engine: Engine) -> None:
    """Requests that end by a token, with little memory for those that wait."""
    for n in range(6):
        prompt = prompt_that_stops_after(1 + n % 4, length=9)
        engine.add(make_req(f"r{n}", prompt, max_new_tokens=9, ignore_eos=False))
        engine.add(make_req(f"s{n}", prompt, max_new_tokens=9))
    engine.drain()


def twins(engine: Engine) -> None:
    """The same prompt twice in one step: the tree takes the pages of the first only."""
    engine.add(*(make_req(rid, [5] * 9, max_new_tokens=9) for rid in "ab"))
    engine.drain()


def test_pages_of_the_ended_stay_until_their_last_step_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd(Engine(pages=14, page_size=4, overlap=True, radix=False))

    end_at_once = RequestLifecycle._end

    def careless(self: RequestLifecycle, req: Req) -> None:
        launched, req.in_flight = req.in_flight, 0
        end_at_once(self, req)
        req.in_flight = launched

    with (
        without(monkeypatch, RequestLifecycle, "_end", careless),
        pytest.raises(PageTakenAwayError),
    ):
        crowd(Engine(pages=14, page_size=4, overlap=True, radix=False))


def test_pages_that_the_trees_replace_stay_until_the_last_step_that_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twins(Engine(chunked_prefill_size=None, overlap=True))

    @contextmanager
    def free_at_once(self: PageAllocator, parked: list[int] | None) -> Iterator[None]:
        yield

    with (
        without(monkeypatch, PageAllocator, "parking", free_at_once),
        pytest.raises(PageTakenAwayError),
    ):
        twins(Engine(chunked_prefill_size=None, overlap=True))


def test_an_abort_by_the_role_between_launch_and_result_is_settled_cleanly() -> None:
    class Fussy(SchedulerRole):
        def on_extend_result(
            self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
        ) -> None:
            self.scheduler.abort_request(req.rid)

    for length in (8, 40):
        engine = Engine(role=Fussy(), overlap=True)
        engine.add(make_req("a", [1] * length))
        engine.drain()
        assert engine.aborted == engine.released == ["a"]


def test_the_others_of_a_batch_may_be_aborted_when_their_next_step_runs_already() -> None:
    class Jealous(SchedulerRole):
        def on_extend_result(
            self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
        ) -> None:
            for other in "abc":
                if other != req.rid:
                    self.scheduler.abort_request(RequestId(other))

    # KV of tokens that are never known is under way; with pages of one token it would be cached.
    engine = Engine(role=Jealous(), overlap=True, page_size=1, pages=64)
    engine.add(*(make_req(rid, [n + 1] * 4) for n, rid in enumerate("abc")))
    engine.drain()
    assert sorted(engine.aborted) == ["b", "c"]
    assert list(engine.outputs) == ["a"]
    assert sorted(engine.released) == ["a", "b", "c"]
    assert len(engine.memory.tree_cache.match_prefix([2] * 4 + list(range(VOCAB))).pages) == 4


def test_the_stub_itself_draws_what_is_undisturbed() -> None:
    assert undisturbed(make_req("x", [1, 2], max_new_tokens=1)) == [next_token([1, 2])]

"""SPLIT_PREFILL: a prompt's step a few layers at a time, with decode steps in between."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.execution.forward_batch import ForwardMode
from engine.memory.pools import make_memory_pools
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from tests.engine.scheduler.drawn import SamplingRunner, wanted
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.stub import (
    CONTEXT,
    NUM_LAYERS,
    VOCAB,
    Engine,
    StubRunner,
    make_req,
    undisturbed,
)

A, B = RequestId("a"), RequestId("b")


def running_and_split(**settings_: Any) -> tuple[Engine, Req, Req]:
    """`a` decodes, and the first part of `b`'s only step has been launched."""
    engine = Engine(split=2, **settings_)
    a, b = make_req("a", [1] * 4, max_new_tokens=20), make_req("b", [2] * 12, max_new_tokens=6)
    engine.add(a)
    while engine.scheduler.running_batch.is_empty():
        engine.step()
    engine.runner.parts.clear()
    engine.add(b)
    engine.step()
    return engine, a, b


@pytest.mark.parametrize("overlap", [False, True])
def test_running_requests_decode_between_the_parts(overlap: bool) -> None:
    engine, a, b = running_and_split(overlap=overlap)
    before = len(a.output_ids)
    while not b.output_ids:
        engine.step()
    assert engine.runner.parts == [(0, 2), (2, 4), (4, 5)]
    # One step after each part; with overlap the one after the last is under way as well.
    assert len(a.output_ids) - before in ((2,) if not overlap else (2, 3))
    engine.drain()
    assert engine.tokens("a") == undisturbed(a)
    assert engine.tokens("b") == undisturbed(b)


def test_nothing_is_split_where_one_part_holds_all_layers_or_none_is_wanted() -> None:
    for layers in (0, NUM_LAYERS, 100):
        engine = Engine(split=layers)
        engine.add(make_req("a", [1] * 40))
        engine.drain()
        assert engine.runner.parts == []


def test_a_runner_that_computes_steps_whole_is_refused() -> None:
    class Whole:
        forward = StubRunner.forward

    memory = make_memory_pools(num_pages=4, page_size=4, num_rows=1, max_context_len=16)
    good: dict[str, Any] = {"page_size": 4, "context_length": 16, "vocab_size": 10}
    with pytest.raises(ConfigError, match="Whole computes all layers"):
        Scheduler(SchedulerConfig(split_prefill_layers=1, **good), Whole(), memory)
    with pytest.raises(ConfigError, match="must not be negative"):
        SchedulerConfig(split_prefill_layers=-1, **good)


def test_steps_are_not_mixed_while_prompts_are_split() -> None:
    engine = Engine(split=2, mixed=True)
    engine.add(make_req("a", [1] * 4, max_new_tokens=12))
    engine.step()
    engine.step()
    engine.add(make_req("b", [2] * 40, max_new_tokens=4))
    engine.drain()
    assert ForwardMode.MIXED not in engine.modes
    assert engine.tokens("b") == undisturbed(make_req("b", [2] * 40, max_new_tokens=4))


def test_prompts_that_come_meanwhile_wait_for_the_last_part() -> None:
    engine, _, b = running_and_split()
    c = make_req("c", [2] * 12, max_new_tokens=3)
    engine.add(c)
    while not b.output_ids:
        engine.step()
        assert not c.pages
    engine.drain()
    assert engine.tokens("c") == undisturbed(c)
    assert c.cached_tokens == 8  # and find what it computed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("passes", range(8))
def test_an_abort_at_any_part_frees_everything(passes: int, overlap: bool) -> None:
    engine, a, _ = running_and_split(overlap=overlap)
    for _ in range(passes):
        engine.step()
    engine.scheduler.abort_request(B)
    engine.drain()
    assert engine.released.count("b") == 1
    assert engine.tokens("a") == undisturbed(a)
    assert engine.scheduler.page_counts().in_use == 0


def test_a_batch_that_nobody_waits_for_is_dropped_and_its_kv_is_not_lent() -> None:
    engine, a, _ = running_and_split()
    engine.scheduler.abort_request(B)
    engine.step()
    assert engine.scheduler.find_request(B) is None
    assert engine.runner.split is None
    assert engine.memory.tree_cache.match_prefix([2] * 12).pages == []
    engine.drain()
    assert engine.runner.parts == [(0, 2)]
    assert engine.tokens("a") == undisturbed(a)


def test_one_of_two_that_is_aborted_keeps_its_pages_to_the_last_part() -> None:
    engine = Engine(split=1)
    engine.add(make_req("a", [1] * 6), make_req("b", [2] * 6))
    engine.step()
    engine.scheduler.abort_request(B)
    for _ in range(NUM_LAYERS - 2):
        engine.step()
        assert engine.scheduler.page_counts().in_use == 4
    engine.drain()
    assert engine.aborted == ["b"]
    assert engine.tokens("a") == undisturbed(make_req("a", [1] * 6))


def test_the_last_one_running_waits_for_the_split_prompt_rather_than_fail() -> None:
    engine = Engine(split=1, pages=9, page_size=4, radix=False, conservativeness=0.01)
    a = make_req("a", [1] * 7, max_new_tokens=16, ignore_eos=False)
    b = make_req("b", [2] * 15, max_new_tokens=4, ignore_eos=False)
    for req in (a, b):
        req.stop_token_ids = frozenset()
    engine.add(a)
    for _ in range(NUM_LAYERS + 2):
        engine.step()
    engine.add(b)
    engine.drain()
    assert not engine.errors
    for req in (a, b):
        twin = make_req("x", req.origin_input_ids, max_new_tokens=req.max_new_tokens)
        assert engine.tokens(req.rid) == undisturbed(twin)


class LayerWatcher(FakePrefillRole):
    """A prefill worker whose finished layers could leave early."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, range, int, int]] = []

    def on_layers_done(self, req: Req, *, layers: range, start: int, end: int) -> None:
        assert len(req.pages) * self.scheduler.page_size >= end
        assert req.kv_ready_len <= start  # the extend itself is not done
        self.seen.append((req.rid, layers, start, end))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefill_role_hears_of_each_part_before_the_extend_is_done(overlap: bool) -> None:
    role = LayerWatcher()
    engine = Engine(role=role, split=2, overlap=overlap)
    req = make_req("a", [1] * 20, max_new_tokens=9)
    engine.add(req)
    while A not in engine.scheduler.transferring:
        engine.step()
    parts = [range(2), range(2, 4), range(4, 5)]
    assert role.seen == [
        *(("a", layers, 0, 16) for layers in parts),
        *(("a", layers, 16, 20) for layers in parts),
    ]
    assert role.extends == [("a", 16, False), ("a", 20, True)]
    assert engine.tokens("a") == undisturbed(req)[:1]
    role.sending.clear()
    engine.scheduler.release_request(req)
    engine.drain()


def test_a_part_launched_ahead_is_told_only_when_it_has_ended() -> None:
    class Counting(LayerWatcher):
        def on_layers_done(self, req: Req, *, layers: range, start: int, end: int) -> None:
            super().on_layers_done(req, layers=layers, start=start, end=end)
            assert engine.runner.parts[-1] == (layers.start, layers.stop)

    engine = Engine(role=Counting(), split=1, overlap=True)
    engine.add(make_req("a", [1] * 8))
    for _ in range(NUM_LAYERS):
        engine.step()
    assert engine.device.deepest == 2


def test_a_role_may_abort_when_a_part_is_done() -> None:
    class Fussy(SchedulerRole):
        def on_layers_done(self, req: Req, *, layers: range, start: int, end: int) -> None:
            if layers.stop == 3:
                self.scheduler.abort_request(req.rid)

    for overlap in (False, True):
        engine = Engine(role=Fussy(), split=3, overlap=overlap)
        engine.add(make_req("a", [1] * 8))
        engine.drain()
        assert engine.aborted == engine.released == ["a"]


def test_prompt_log_probabilities_come_with_the_last_part() -> None:
    seen = []
    for split in (0, 2):
        engine = Engine(runner=SamplingRunner, split=split)
        engine.add(
            wanted([3] * 20, max_new_tokens=5, logprobs=True, top_logprobs=3, prompt_logprobs=2)
            .req()
        )  # fmt: skip
        engine.drain()
        seen.append(engine.outputs)
    assert seen[0] == seen[1]


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4, 16]),
    memory_tokens=st.sampled_from([64, 96, 256]),
    layers=st.integers(1, NUM_LAYERS),
    overlap=st.booleans(),
    radix=st.booleans(),
    abort_share=st.sampled_from([0.0, 0.0, 0.1]),
)
@settings(max_examples=100)
def test_random_traffic_is_exact_and_balanced(
    seed: int,
    page_size: int,
    memory_tokens: int,
    layers: int,
    overlap: bool,
    radix: bool,
    abort_share: float,
) -> None:
    rng = random.Random(seed)
    engine = Engine(
        pages=memory_tokens // page_size,
        page_size=page_size,
        radix=radix,
        chunked_prefill_size=rng.choice([16, 32, None]),
        max_prefill_tokens=48,
        max_running_requests=4,
        conservativeness=0.02,
        split=layers,
        overlap=overlap,
    )
    todo = []
    for n in range(9):
        shared = [3] * rng.choice([0, 8, 20, 33])
        prompt = shared + [rng.randrange(2) for _ in range(rng.choice([1, 9, 17]))]
        room = min(memory_tokens, CONTEXT) - len(prompt)
        todo.append(
            make_req(
                f"r{n}",
                prompt,
                max_new_tokens=min(rng.choice([1, 2, 12, 40]), room),
                ignore_eos=rng.random() < 0.5,
                seed=n % 3,
            )
        )
    accepted, aborted, passes = list(todo), set(), 0
    while todo or engine.scheduler.has_work():
        passes += 1
        assert passes < 3000
        if todo and rng.random() < 0.3:
            engine.add(todo.pop())
        if rng.random() < abort_share:
            rid = RequestId(f"r{rng.randrange(9)}")
            if engine.scheduler.abort_request(rid):
                aborted.add(rid)
        engine.step()
    assert not engine.errors
    assert sorted(engine.released) == sorted(req.rid for req in accepted)
    for req in accepted:
        tokens = engine.tokens(req.rid)
        assert all(0 <= token < VOCAB for token in tokens)
        if req.rid in aborted:
            assert tokens == undisturbed(req)[: len(tokens)]
            continue
        assert tokens == undisturbed(req)
        assert engine.outputs[req.rid][-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    counts = engine.scheduler.page_counts()
    assert (counts.in_use, counts.held) == (0, 0)
    assert engine.memory.tree_cache.protected_size() == 0

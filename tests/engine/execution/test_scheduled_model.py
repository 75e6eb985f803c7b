"""Overlap and split prefill with a real model in float32: the tokens of each request run alone."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.execution.model_runner import ModelRunner
from engine.memory.pools import MemoryPools
from tests.engine.execution.harness import Harness
from tests.engine.execution.scheduled import ScheduledModel, one_by_one, random_asks
from tests.engine.scheduler.async_runner import AsyncRunner

MakeRunner = Callable[[str], ModelRunner]

SETTINGS: dict[str, dict[str, Any]] = {
    "overlap": {"enable_overlap": True},
    "overlap, mixed": {"enable_overlap": True, "enable_mixed_chunk": True},
    "overlap, without a tree": {"enable_overlap": True, "radix": False},
    "split": {"split_prefill_layers": 1},
    "split, overlap": {"split_prefill_layers": 1, "enable_overlap": True},
}


def late(model: ModelRunner, memory: MemoryPools) -> AsyncRunner:
    # Penalties count drawn tokens in place, which placeholders cannot do.
    return AsyncRunner(model, memory, late=False)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3"])
def test_tokens_are_those_of_each_request_alone(kind: str, runner: MakeRunner) -> None:
    model = runner(kind)
    for seed in range(2):
        asks = random_asks(seed, 8)
        expected = one_by_one(model, asks)
        for name, settings in SETTINGS.items():
            behind = late if settings.get("enable_overlap") else (lambda model, _: model)
            engine = ScheduledModel(
                model, behind=behind, chunked_prefill_size=32, rows=4, **settings
            )
            assert engine.run(asks, seed=seed) == expected, f"{kind}, seed {seed}: {name}"


def test_a_device_that_is_as_late_as_can_be_draws_the_same(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    asks = [ask for ask in random_asks(7, 12) if "presence_penalty" not in ask.params]
    expected = one_by_one(model, asks)
    for split in (0, 1):
        engine = ScheduledModel(
            model,
            behind=AsyncRunner,
            chunked_prefill_size=32,
            rows=4,
            enable_overlap=True,
            split_prefill_layers=split,
        )
        assert engine.run(asks, seed=7) == expected


def test_parts_of_a_step_leave_what_the_whole_leaves_whoever_runs_in_between(
    runner: MakeRunner,
) -> None:
    model = runner("qwen3")
    drawn, written = [], []
    for split in (False, True):
        model.kv_pool.data.zero_()
        harness = Harness(model.kv_pool)
        other = harness.row(list(range(1, 20)))
        model.forward(harness.extend((other, 18)))
        batch = harness.extend((harness.row(list(range(30, 70))), 40))
        between = harness.decode(other)
        if split:
            assert model.forward_split(batch, 0, 1).next_token_ids.shape == (0,)
            model.forward(between)
            drawn.append(model.forward_split(batch, 1, 2).next_token_ids.tolist())
        else:
            model.forward(between)
            drawn.append(model.forward(batch).next_token_ids.tolist())
        written.append(model.kv_pool.data.clone())
    assert drawn[0] == drawn[1]
    assert bool((written[0] == written[1]).all())


def test_a_part_out_of_order_is_refused(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    harness = Harness(model.kv_pool)
    batch = harness.extend((harness.row([5, 6]), 2))
    with pytest.raises(ValueError, match="layer 1 does not follow"):
        model.forward_split(batch, 1, 2)
    model.forward_split(batch, 0, 1)
    model.drop_split()
    with pytest.raises(ValueError, match="layer 1 does not follow"):
        model.forward_split(batch, 1, 2)

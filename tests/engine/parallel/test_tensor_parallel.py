"""Two ranks draw what one draws, and what `transformers` draws, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from engine.execution.model_runner import ModelRunner
from engine.memory.pools import MemoryPools
from engine.parallel.group import ALONE, TensorGroup
from tests.checkpoints import KINDS, random_prompt, reference_model, write_checkpoint, write_config
from tests.engine.execution.scheduled import Ask, ScheduledModel, one_by_one, random_asks
from tests.engine.parallel.ranks import Ranks, load, running_ranks
from tests.engine.scheduler.async_runner import AsyncRunner

MEMORY = {"page_size": 16, "max_total_tokens": 128 * 16}

SETTINGS: dict[str, dict[str, Any]] = {
    "chunked": {},
    "without a tree": {"radix": False},
    "mixed": {"enable_mixed_chunk": True},
    "overlap, mixed": {"enable_overlap": True, "enable_mixed_chunk": True},
    "split, overlap": {"split_prefill_layers": 1, "enable_overlap": True},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with running_ranks(2, tmp_path_factory.mktemp("ranks")) as two:
        yield two
    torch.set_num_threads(before)


def checkpoint(directory: Path, kind: str) -> Path:
    if kind != "llama-mqa":
        return write_checkpoint(directory, kind)
    # One KV head for two ranks: each holds it.
    config, _ = KINDS["llama-gqa"]()
    config.num_key_value_heads = 1
    write_config(directory, config)
    return directory


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mqa", "llama-biases", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, kind)
    runner, leading = ranks.load(model, **MEMORY)
    asks = [
        Ask(random_prompt(length, seed=length), {"max_new_tokens": 12, "ignore_eos": True})
        for length in (1, 15, 16, 17, 70)
    ]
    engine = ScheduledModel(runner, behind=lambda *_: leading, chunked_prefill_size=32, rows=4)
    reference = reference_model(model)
    for ask, tokens in zip(asks, engine.run(asks), strict=True):
        ids = ask.prompt + tokens
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0]
        assert logits[len(ask.prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_every_way_of_scheduling_draws_what_one_rank_draws(ranks: Ranks, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama-gqa")
    runner, leading = ranks.load(model, **MEMORY)
    asks = random_asks(3, 10)
    expected = one_by_one(load(model, ALONE, **MEMORY), asks)

    def behind(_: ModelRunner, memory: MemoryPools) -> Any:
        return leading

    def late(_: ModelRunner, memory: MemoryPools) -> Any:
        return AsyncRunner(leading, memory, late=False)

    for name, settings in SETTINGS.items():
        made = late if settings.get("enable_overlap") else behind
        engine = ScheduledModel(runner, behind=made, chunked_prefill_size=32, rows=4, **settings)
        assert engine.run(asks, seed=5) == expected, name


def test_requests_that_were_retracted_draw_what_one_rank_draws(
    ranks: Ranks, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path, "llama-gqa")
    few = {"page_size": 16, "max_total_tokens": 12 * 16}
    runner, leading = ranks.load(model, **few)
    asks = [
        # Without ignore_eos: who may end early is admitted in the hope that some do.
        Ask(random_prompt(20 + n, seed=n), {"max_new_tokens": 60})
        for n in range(6)
    ]
    engine = ScheduledModel(
        runner, behind=lambda *_: leading, rows=6, schedule_conservativeness=0.01
    )
    assert engine.run(asks) == one_by_one(load(model, ALONE, **MEMORY), asks)
    assert engine.scheduler.num_retractions > 0


def test_log_probabilities_of_prompts_are_those_of_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "qwen3")
    asks = [Ask(random_prompt(40, seed=9), {"logprobs": True, "prompt_logprobs": 2})]
    runner, leading = ranks.load(model, **MEMORY)
    found = []
    for engine in (
        ScheduledModel(runner, behind=lambda *_: leading, chunked_prefill_size=32),
        ScheduledModel(load(model, ALONE, **MEMORY), chunked_prefill_size=32),
    ):
        engine.run(asks)
        first = engine.outputs["r0"][0]
        assert first.prompt is not None
        found.append([token.logprob for token in first.prompt if token.logprob is not None])
    assert len(found[0]) == 39
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_captured_steps_are_given_back_before_the_group_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL would wait for them for ever."""
    done: list[str] = []

    class Steps:
        def release(self) -> None:
            done.append("released")

    monkeypatch.setattr(distributed, "destroy_process_group", lambda: done.append("ended"))
    group, kept, forgotten = TensorGroup(0, 2), Steps(), Steps()
    group.replays(kept)
    group.replays(forgotten)
    del forgotten
    group.leave()
    assert done == ["released", "ended"]

"""The largest steps are run, down to the sampler, in one page, and what they take is counted."""

from collections.abc import Callable

import pytest
import torch

from engine.execution.decode_graphs import ladder
from engine.execution.forward_batch import ForwardBatch, ForwardMode, ForwardResult
from engine.execution.model_runner import ModelRunner
from engine.execution.step_memory import (
    GRAPH_BYTES,
    LargestStep,
    graphs_bytes,
    peak_activations,
)
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig


class Watched:
    """A runner that notes its steps; a meter that says how many there were since it began."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.steps: list[ForwardBatch] = []
        self.results: list[ForwardResult] = []

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model_config

    @property
    def kv_pool(self) -> PageMajorKVPool:
        return self.runner.kv_pool

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        self.steps.append(batch)
        self.results.append(self.runner.forward(batch))
        return self.results[-1]

    def begin(self) -> None:
        self.steps.clear()

    def peak_bytes(self) -> int:
        return len(self.steps)


@pytest.mark.parametrize(("tokens", "rows"), [(300, 5), (70, 64), (9, 1)])
def test_the_largest_steps_are_run_whole(
    tokens: int, rows: int, runner: Callable[[str], ModelRunner]
) -> None:
    watched = Watched(runner("llama-gqa"))
    counted = peak_activations(watched, LargestStep(tokens=tokens, rows=rows), watched)
    assert counted == len(watched.steps) == 3
    decode, extend, judged = watched.steps
    assert decode.forward_mode is ForwardMode.DECODE
    assert len(decode.seq_lens_cpu) == rows
    for step in (extend, judged):
        assert sum(step.extend_lens) == tokens
        assert len(step.extend_lens) <= max(rows, 1)
    assert judged.prompt_targets is not None
    assert len(judged.prompt_targets.target_ids_cpu) == tokens
    last = watched.results[-1]
    assert last.prompt is not None
    assert last.prompt.chosen.shape == (tokens,)
    assert not torch.any(watched.kv_pool.data[1:])  # all of it in one page


def test_captured_steps_are_counted_by_their_number_and_their_logits(
    runner: Callable[[str], ModelRunner],
) -> None:
    config = runner("llama-gqa").model_config
    assert graphs_bytes(config, max_batch=0, page_size=16) == 0
    tables = 8 * -(-config.context_length // 16) * 4
    expected = 8 * config.vocab_size * 4 + tables + GRAPH_BYTES * len(ladder(8))
    assert graphs_bytes(config, max_batch=8, page_size=16) == expected

"""A step that runs out of memory: computed in parts, or the end of its own requests alone.

Memory that runs out is injected where it would: in the layers, by the number of tokens they see.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine.errors import EngineError, StepMemoryError
from engine.execution.forward_batch import ForwardBatch
from engine.execution.model_runner import ModelRunner
from engine.execution.smaller_steps import LEAST_TOKENS, cut
from engine.scheduler.step_result import StepResult
from tests.checkpoints import random_prompt
from tests.engine.execution.harness import Harness
from tests.engine.execution.scheduled import Ask, ScheduledModel


class Memory:
    """Lets the layers of a runner compute `tokens` at a time, and counts what did not fit."""

    def __init__(self, model: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 10**9
        self.refused = 0
        self._run_layers = model.decoder.run_layers
        monkeypatch.setattr(model.decoder, "run_layers", self.run_layers)

    def run_layers(self, layers: range, state: Any, positions: torch.Tensor, *rest: Any) -> Any:
        if positions.shape[0] > self.tokens:
            self.refused += 1
            raise torch.OutOfMemoryError("injected")
        return self._run_layers(layers, state, positions, *rest)


@pytest.fixture
def model(runner: Callable[[str], ModelRunner]) -> ModelRunner:
    return runner("llama-gqa")


@pytest.fixture
def memory(model: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    memory = Memory(model, monkeypatch)
    yield memory
    assert memory.refused  # or the test tested nothing


def lengths(batch: ForwardBatch, limit: int) -> list[list[int]]:
    return [part.extend_lens for part in cut(batch, limit)]


def test_a_step_is_cut_in_order(model: ModelRunner) -> None:
    harness = Harness(model.kv_pool)
    rows = [harness.row(random_prompt(40, seed=n)) for n in range(3)]
    harness.extend((rows[1], 10))
    batch = harness.extend((rows[0], 5), (rows[1], 20), (rows[2], 3))
    assert lengths(batch, 28) == [[5, 20, 3]]
    assert lengths(batch, 12) == [[5, 7], [12], [1, 3]]
    middle = list(cut(batch, 12))[1]
    assert (middle.extend_prefix_lens, middle.seq_lens_cpu) == ([17], [29])
    assert middle.positions.tolist() == list(range(17, 29))
    assert torch.equal(middle.out_cache_loc, batch.out_cache_loc[12:24])


def test_parts_draw_and_write_what_the_whole_would(model: ModelRunner, memory: Memory) -> None:
    drawn, written = [], []
    for fits in (10**9, 40):
        memory.tokens = fits
        model.kv_pool.data.zero_()
        harness = Harness(model.kv_pool)
        rows = [harness.row(random_prompt(60, seed=n)) for n in range(3)]
        first = model.forward(harness.extend(*((row, 50) for row in rows)))
        then = model.forward(harness.decode(*rows))
        drawn.append(torch.cat((first.next_token_ids, then.next_token_ids)))
        written.append(model.kv_pool.data.clone())
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(written[1], written[0], atol=1e-5, rtol=1e-4)


def test_what_fits_in_no_part_is_an_error_that_names_the_settings(
    model: ModelRunner, memory: Memory
) -> None:
    memory.tokens = LEAST_TOKENS - 1
    harness = Harness(model.kv_pool)
    batch = harness.extend((harness.row(random_prompt(90, seed=1)), 90))
    with pytest.raises(StepMemoryError, match=r"step of 90 tokens of 1 requests .* --chunked-pre"):
        model.forward(batch)


def run(engine: ScheduledModel, after_pass: Callable[[int], None]) -> dict[str, EngineError]:
    """Until nothing is left; the errors that requests ended with."""
    errors: dict[str, EngineError] = {}
    passes = 0
    while engine.scheduler.has_work():
        result: StepResult = engine.scheduler.step()
        errors |= dict(result.errors)
        for output in result.outputs:
            engine.outputs.setdefault(output.rid, []).append(output)
        engine.scheduler.check_invariant()
        passes += 1
        after_pass(passes)
    return errors


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_overlap": True},
        {"enable_overlap": True, "enable_mixed_chunk": True},
        {"enable_overlap": True, "split_prefill_layers": 1},
    ],
    ids=["plain", "overlap", "mixed", "split"],
)
def test_only_the_requests_of_that_batch_end_and_the_engine_serves_on(
    settings: dict[str, Any], model: ModelRunner, memory: Memory
) -> None:
    """A prompt that never fits ends; those who decode beside it, and all who come later, get the
    tokens that they would have got."""
    small = [Ask(random_prompt(12, seed=n), {"max_new_tokens": 12}) for n in range(2)]
    late = Ask(random_prompt(14, seed=8), {"max_new_tokens": 6})
    huge = Ask(random_prompt(100, seed=9), {"max_new_tokens": 3})
    expected = {
        name: ScheduledModel(model, radix=False).run([ask])[0]
        for name, ask in {"r0": small[0], "r1": small[1], "r3": late}.items()
    }
    engine = ScheduledModel(model, rows=8, chunked_prefill_size=64, **settings)
    for number, ask in enumerate(small):
        engine.scheduler.add_request(ask.req(number))

    def after_pass(passes: int) -> None:
        if passes == 4:
            memory.tokens = LEAST_TOKENS - 1
            engine.scheduler.add_request(huge.req(2))

    errors = run(engine, after_pass)
    memory.tokens = 10**9
    engine.scheduler.add_request(late.req(3))
    assert run(engine, lambda passes: None) == {}
    beside = {"r0", "r1"} if settings.get("enable_mixed_chunk") else set()
    assert {"r2"} <= set(errors) <= {"r2"} | beside
    assert all(isinstance(error, StepMemoryError) for error in errors.values())
    for name, tokens in expected.items():
        got = [output.token for output in engine.outputs[name]]
        assert got == (tokens[: len(got)] if name in errors else tokens), name
    assert "r2" not in engine.outputs
    counts = engine.scheduler.page_counts()
    assert (counts.in_use, counts.held) == (0, 0)
    # What was never computed is in no tree: the same prompt again is computed, and right.
    again = ScheduledModel(model, radix=False).run([huge])[0]
    engine.scheduler.add_request(huge.req(4))
    run(engine, lambda passes: None)
    assert [output.token for output in engine.outputs["r4"]] == again


def test_a_decode_step_that_never_fits_ends_who_decodes(model: ModelRunner, memory: Memory) -> None:
    engine = ScheduledModel(model, rows=8, enable_overlap=True)
    for n in range(3):
        ask = Ask(random_prompt(10, seed=n), {"max_new_tokens": 20, "ignore_eos": True})
        engine.scheduler.add_request(ask.req(n))

    def after_pass(passes: int) -> None:
        if passes == 6:
            memory.tokens = 0

    errors = run(engine, after_pass)
    assert set(errors) == {"r0", "r1", "r2"}
    assert all(len(outputs) >= 4 for outputs in engine.outputs.values())
    memory.tokens = 10**9
    late = Ask(random_prompt(10, seed=0), {"max_new_tokens": 20, "ignore_eos": True})
    engine.scheduler.add_request(late.req(9))
    assert run(engine, lambda passes: None) == {}
    tokens = [output.token for output in engine.outputs["r9"]]
    before = [output.token for output in engine.outputs["r0"]]
    assert tokens[: len(before)] == before
    assert len(tokens) == 20

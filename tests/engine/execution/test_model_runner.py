"""Logits through scattered pages, against `transformers` in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.execution.forward_batch import ForwardMode
from engine.execution.model_runner import ModelRunner
from tests.checkpoints import KINDS, random_prompt
from tests.engine.execution.conftest import PAGE_SIZE
from tests.engine.execution.harness import Harness

MakeRunner = Callable[[str], ModelRunner]
Reference = Callable[[str, list[int]], torch.Tensor]

KIND_NAMES = sorted(KINDS)
LENGTHS = [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE + 5]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_whole_prompts_of_many_lengths_in_one_batch(
    kind: str, runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner(kind)
    harness = Harness(model.kv_pool)
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    rows = [harness.row(prompt) for prompt in prompts]
    logits = model.forward_logits(harness.extend(*((row, len(row.tokens)) for row in rows)))
    assert logits.dtype == torch.float32
    for actual, prompt in zip(logits, prompts, strict=True):
        assert_close(actual, reference_logits(kind, prompt)[-1])


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_prompt_in_chunks_then_token_by_token(
    kind: str, runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner(kind)
    harness = Harness(model.kv_pool)
    tokens = random_prompt(70, seed=1)
    expected = reference_logits(kind, tokens)
    row = harness.row(tokens)
    for chunk in (2 * PAGE_SIZE, PAGE_SIZE, 1, 9):
        logits = model.forward_logits(harness.extend((row, chunk)))
        assert_close(logits[0], expected[row.computed - 1])
    while row.computed < len(tokens):
        logits = model.forward_logits(harness.decode(row))
        assert_close(logits[0], expected[row.computed - 1])


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mha-tied", "qwen3"])
def test_decode_of_requests_of_very_different_lengths(
    kind: str, runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner(kind)
    harness = Harness(model.kv_pool)
    prompts = [random_prompt(length, seed=length) for length in (3, 200, 17, 90, 33, 64, 5)]
    rows = [harness.row(prompt) for prompt in prompts]
    model.forward_logits(harness.extend(*((row, len(row.tokens) - 2) for row in rows)))
    for back in (2, 1):
        logits = model.forward_logits(harness.decode(*rows))
        for actual, prompt in zip(logits, prompts, strict=True):
            assert_close(actual, reference_logits(kind, prompt)[-back])


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2"])
def test_mixed_batches_of_chunks_and_decode_rows(
    kind: str, runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner(kind)
    harness = Harness(model.kv_pool)
    prompts = [random_prompt(length, seed=length) for length in (30, 50, 40, 7)]
    decoding, chunked, fresh, late = (harness.row(prompt) for prompt in prompts)
    model.forward_logits(harness.extend((decoding, 29), (chunked, 32), (late, 6)))
    batch = harness.extend(
        (chunked, 18), (decoding, 1), (fresh, 40), (late, 1), mode=ForwardMode.MIXED
    )
    logits = model.forward_logits(batch)
    order = (prompts[1], prompts[0], prompts[2], prompts[3])
    for actual, prompt in zip(logits, order, strict=True):
        assert_close(actual, reference_logits(kind, prompt)[-1])


def test_prompts_longer_than_a_block_of_queries(
    runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner("llama-gqa")
    harness = Harness(model.kv_pool)
    prompts = [random_prompt(900, seed=1), random_prompt(700, seed=2)]
    whole, chunked = (harness.row(prompt) for prompt in prompts)
    model.forward_logits(harness.extend((chunked, 48)))
    logits = model.forward_logits(harness.extend((whole, 900), (chunked, 652)))
    for actual, prompt in zip(logits, prompts, strict=True):
        assert_close(actual, reference_logits("llama-gqa", prompt)[-1])


def test_a_request_gives_the_same_alone_and_in_a_batch(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    harness = Harness(model.kv_pool)
    prompt = random_prompt(40, seed=3)
    alone, together = harness.row(prompt), harness.row(prompt)
    others = [harness.row(random_prompt(n, seed=n)) for n in (4, 80, 21)]
    expected = model.forward_logits(harness.extend((alone, 40)))
    batch = harness.extend((others[0], 4), (together, 40), (others[1], 80), (others[2], 21))
    assert_close(model.forward_logits(batch)[1], expected[0])


def test_nothing_is_written_outside_the_requests_own_slots(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    model.kv_pool.data.fill_(0.0)
    harness = Harness(model.kv_pool)
    row = harness.row(random_prompt(PAGE_SIZE + 3, seed=1))
    model.forward_logits(harness.extend((row, PAGE_SIZE + 3)))
    written = model.kv_pool.data.abs().sum(dim=(1, 2, 4, 5)) > 0
    expected = torch.zeros_like(written)
    expected[row.pages[0]] = True
    expected[row.pages[1], :3] = True
    assert torch.equal(written, expected)


def test_forward_draws_the_most_likely_token(
    runner: MakeRunner, reference_logits: Reference
) -> None:
    model = runner("qwen2")
    harness = Harness(model.kv_pool)
    prompt = random_prompt(20, seed=4)
    result = model.forward(harness.extend((harness.row(prompt), 20)))
    assert result.next_token_ids.tolist() == [int(reference_logits("qwen2", prompt)[-1].argmax())]
    assert result.logprobs is None


def test_results_may_be_changed_in_place(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    harness = Harness(model.kv_pool)
    result = model.forward(harness.extend((harness.row([5, 6]), 2)))
    result.next_token_ids.add_(1)


def test_a_batch_without_a_forward_is_refused(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    harness = Harness(model.kv_pool)
    batch = harness.extend((harness.row([5]), 1), mode=ForwardMode.PREBUILT)
    with pytest.raises(ValueError, match="PREBUILT"):
        model.forward(batch)


def test_a_prompts_step_tells_when_its_layers_are_done_and_computes_the_same(
    runner: MakeRunner,
) -> None:
    shared = runner("llama-gqa")
    prompt = random_prompt(40, seed=3)
    results = []
    for marks in (False, True):
        model = ModelRunner(shared.decoder, kv_pool=shared.kv_pool, attention=shared.attention)
        if marks:
            model.mark_layers()
        harness = Harness(model.kv_pool)
        row = harness.row(prompt)
        results.append(model.forward(harness.extend((row, len(prompt) - 1))))
        assert not model.forward(harness.decode(row)).layers_done
    plain, told = results
    assert plain.layers_done == ()
    assert told.next_token_ids.tolist() == plain.next_token_ids.tolist()
    layers = shared.num_layers
    assert [done.layers for done in told.layers_done] == [*range(layers - 2, 0, -2)[:1], layers]


class Summing:
    """Ops whose products come with the residual's sum, as on a GPU for prompts."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self.sums = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear_onto(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        self.sums += 1
        return None, residual + self._ops.linear(x, weight, bias)


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-biases"])
def test_products_may_come_with_the_residuals_sum(
    kind: str, runner: MakeRunner, reference_logits: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner(kind)
    ops = Summing(model.decoder._ops)
    monkeypatch.setattr(model.decoder, "_ops", ops)
    harness = Harness(model.kv_pool)
    prompt = random_prompt(40, seed=3)
    logits = model.forward_logits(harness.extend((harness.row(prompt), 40)))
    assert_close(logits[0], reference_logits(kind, prompt)[-1])
    assert ops.sums == 2 * model.num_layers
    whole = harness.extend((harness.row(prompt), 40))
    for layer in range(model.num_layers):
        result = model.forward_split(whole, layer, layer + 1)
    assert result.next_token_ids.tolist() == logits.argmax(-1).tolist()

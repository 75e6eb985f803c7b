"""Edits of logits against `transformers`' own processors, or plain numpy where it has none."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from engine.execution.forward_batch import ForwardResult, SamplingBatch
from engine.execution.logit_edits import LogitBias, LogitEdits, NotYet, Penalties
from engine.execution.sampler import Sampler, most_likely, token_logprobs
from tests.engine.execution.harness import sampling_batch

CPU = torch.device("cpu")
VOCAB = 50


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def penalties(
    rows: list[int],
    *,
    prompts: list[list[int]],
    outputs: list[list[int]],
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> Penalties:
    in_prompt = torch.zeros(len(rows), VOCAB, dtype=torch.bool)
    counts = torch.zeros(len(rows), VOCAB, dtype=torch.int32)
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        in_prompt[i, prompt] = True
        for token in output:
            counts[i, token] += 1
    shape = (len(rows), 1)
    return Penalties(
        rows=int64(*rows),
        repetition=torch.full(shape, repetition),
        presence=torch.full(shape, presence),
        frequency=torch.full(shape, frequency),
        in_prompt=in_prompt,
        output_counts=counts,
    )


def apply(logits: torch.Tensor, position: int = 0, **edits: Any) -> torch.Tensor:
    return LogitEdits(**edits).apply(logits, torch.full((logits.shape[0],), position))


@pytest.mark.parametrize("penalty", [0.3, 1.0, 1.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(3)
    prompts, outputs = [[1, 2, 2, 40], [7]], [[3, 3, 9], []]
    edited = apply(
        logits,
        penalties=penalties([0, 2], prompts=prompts, outputs=outputs, repetition=penalty),
    )
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row, prompt, output in zip((0, 2), prompts, outputs, strict=True):
        expected = processor(torch.tensor([prompt + output]), logits[row : row + 1].clone())
        torch.testing.assert_close(edited[row : row + 1], expected, atol=0, rtol=0)
    assert torch.equal(edited[1], logits[1])


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = random_logits(1)
    edited = apply(
        logits,
        penalties=penalties(
            [0], prompts=[[4, 4, 5]], outputs=[[5, 6, 6, 6]], presence=0.5, frequency=-0.25
        ),
    )
    expected = logits.clone()
    expected[0, 5] += -0.5 + 0.25
    expected[0, 6] += -0.5 + 3 * 0.25
    torch.testing.assert_close(edited, expected)


def test_logit_bias_is_that_of_transformers() -> None:
    logits = random_logits(2)
    bias = LogitBias(
        rows=int64(1, 1, 0), token_ids=int64(3, 40, 3), values=torch.tensor([5.0, -100.0, 2.5])
    )
    edited = apply(logits, bias=bias)
    for row, wanted in ((0, {(3,): 2.5}), (1, {(3,): 5.0, (40,): -100.0})):
        processor = SequenceBiasLogitsProcessor(wanted)
        expected = processor(torch.tensor([[1]]), logits[row : row + 1].clone())
        torch.testing.assert_close(edited[row : row + 1], expected, atol=0, rtol=0)


@pytest.mark.parametrize("produced", [0, 3, 4, 5])
def test_ending_tokens_are_held_back_as_transformers_does(produced: int) -> None:
    logits, prompt_len, least = random_logits(2), 6, 4
    first = prompt_len + least
    not_yet = NotYet(rows=int64(1, 1), token_ids=int64(0, 7), before=int64(first, first))
    edited = apply(logits, prompt_len + produced, not_yet=not_yet)
    processor = MinNewTokensLengthLogitsProcessor(prompt_len, least, [0, 7], device="cpu")
    tokens = torch.zeros(1, prompt_len + produced, dtype=torch.int64)
    assert torch.equal(edited[1:], processor(tokens, logits[1:].clone()))
    assert torch.equal(edited[0], logits[0])


def reference_edits(
    logits: np.ndarray,
    *,
    bias: dict[int, float],
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    held_back: list[int],
) -> np.ndarray:
    """The documented order, token by token, in float32."""
    edited = logits.astype(np.float32).copy()
    for token, value in bias.items():
        edited[token] += np.float32(value)
    for token in {*prompt, *output}:
        penalty = np.float32(repetition)
        edited[token] = edited[token] / penalty if edited[token] > 0 else edited[token] * penalty
    for token in set(output):
        edited[token] -= np.float32(presence)
        edited[token] -= np.float32(frequency) * np.float32(output.count(token))
    edited[held_back] = -np.inf
    return edited


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=8),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    repetition=st.floats(0.125, 8, width=32),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    held_back=st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=4),
)
def test_all_edits_together_keep_their_order(seed: int, **wanted: Any) -> None:
    logits = random_logits(1, seed=seed)
    bias, held_back = wanted["bias"], wanted["held_back"]
    edited = apply(
        logits,
        bias=LogitBias(
            rows=int64(*[0] * len(bias)),
            token_ids=int64(*bias),
            values=torch.tensor(list(bias.values()), dtype=torch.float32),
        ),
        penalties=penalties(
            [0],
            prompts=[wanted["prompt"]],
            outputs=[wanted["output"]],
            repetition=wanted["repetition"],
            presence=wanted["presence"],
            frequency=wanted["frequency"],
        ),
        not_yet=NotYet(
            rows=int64(*[0] * len(held_back)),
            token_ids=int64(*held_back),
            before=int64(*[1] * len(held_back)),
        ),
    )
    expected = reference_edits(logits[0].numpy(), **wanted)
    np.testing.assert_allclose(edited[0].numpy(), expected, rtol=1e-6, atol=1e-5)


def sample(logits: torch.Tensor, rows: list[dict[str, float]], **more: Any) -> ForwardResult:
    return Sampler().sample(logits, sampling_batch(rows, device=CPU, **more))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float, temperature: float) -> None:
    draws = 3000
    logits = random_logits(1, vocab=12, seed=4) / 2
    rows = [
        {"temperature": temperature, "min_p": min_p, "seed": n, "position": n} for n in range(draws)
    ]
    drawn = set(sample(logits.expand(draws, -1), rows).next_token_ids.tolist())
    warped: Any = MinPLogitsWarper(min_p)(torch.tensor([[1]]), logits / temperature)
    kept = set(torch.isfinite(warped[0]).nonzero()[:, 0].tolist())
    assert drawn <= kept
    # Those that chance hardly misses in so many draws.
    probabilities = torch.softmax(warped[0], -1)
    assert {token for token in kept if probabilities[token] > 0.005} <= drawn


def test_min_p_of_one_row_leaves_the_others() -> None:
    logits = torch.zeros(2, 1000)
    logits[:, 3] = 1.0
    drawn = {
        tuple(
            sample(
                logits,
                [{"temperature": 1.0, "min_p": 1.0, "seed": n}, {"temperature": 1.0, "seed": n}],
            ).next_token_ids.tolist()
        )
        for n in range(20)
    }
    assert {first for first, _ in drawn} == {3}
    assert len({second for _, second in drawn}) > 10


def test_greedy_and_sampled_rows_see_the_edits_and_logprobs_do_not() -> None:
    logits = random_logits(2)
    best = logits.argmax(-1).tolist()
    bias = LogitBias(rows=int64(0, 1), token_ids=int64(*best), values=torch.tensor([-100.0] * 2))
    result = sample(
        logits,
        [{"top_logprobs": 2}, {"temperature": 0.01, "top_logprobs": 2}],
        logprobs=True,
        edits=LogitEdits(bias=bias),
    )
    second = logits.topk(2).indices[:, 1].tolist()
    assert result.next_token_ids.tolist() == second
    expected = torch.log_softmax(logits, -1)
    assert result.logprobs is not None
    torch.testing.assert_close(result.logprobs, expected[[0, 1], second])
    assert result.top is not None
    assert result.top.top_ids.tolist() == [[b, s] for b, s in zip(best, second, strict=True)]
    torch.testing.assert_close(result.top.top, expected.gather(-1, result.top.top_ids))


def test_alternatives_are_computed_for_those_who_ask() -> None:
    logits = random_logits(4)
    result = sample(logits, [{}, {"top_logprobs": 3}, {}, {"top_logprobs": 20}])
    assert result.top is not None
    assert result.top.top_ids.shape == (2, 20)
    expected = torch.log_softmax(logits, -1).topk(20)
    torch.testing.assert_close(result.top.top, expected.values[[1, 3]])
    assert result.top.top_ids[0, 0] == result.next_token_ids[1]
    assert sample(logits, [{}] * 4).top is None


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1e-30, 2.0, 7.25]), min_size=1),
    count=st.integers(0, 20),
)
def test_the_most_likely_come_first_and_ties_go_to_the_lowest_id(
    values: list[float], count: int
) -> None:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert most_likely(torch.tensor([values]), count).tolist() == [order[:count]]


def test_logprobs_of_given_tokens_are_those_of_the_softmax() -> None:
    logits = random_logits(5)
    judged = token_logprobs(logits, int64(4, 3, 2, 1, 0), 0)
    expected = torch.log_softmax(logits, -1)[range(5), [4, 3, 2, 1, 0]]
    torch.testing.assert_close(judged.chosen, expected)
    assert judged.top_ids.shape == (5, 0)


def everything(device: torch.device) -> tuple[torch.Tensor, SamplingBatch]:
    """Logits and a batch that asks for all there is."""
    edits = LogitEdits(
        bias=LogitBias(rows=int64(0), token_ids=int64(3), values=torch.ones(1)),
        penalties=penalties([1], prompts=[[1]], outputs=[[2, 2]], repetition=1.5, presence=0.5),
        not_yet=NotYet(rows=int64(2), token_ids=int64(0), before=int64(9)),
    )
    rows = [{"temperature": 0.9, "min_p": 0.1, "top_p": 0.9}, {"top_k": 5}, {"top_logprobs": 20}]
    batch = sampling_batch(rows, device=device, logprobs=True, edits=on_device(edits, device))
    return random_logits(3).to(device), batch


def on_device(edits: Any, device: torch.device) -> Any:
    """The same dataclass of tensors elsewhere."""
    moved = {
        field.name: value.to(device)
        if isinstance(value, torch.Tensor)
        else on_device(value, device)
        for field in fields(edits)
        if (value := getattr(edits, field.name)) is not None
    }
    return type(edits)(**moved)


def test_nothing_in_a_draw_depends_on_a_value_that_the_host_must_wait_for() -> None:
    """Meta tensors have no values: whoever asks for one fails."""
    meta = torch.device("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=meta).item()
    logits, batch = everything(meta)
    result = Sampler().sample(logits, batch)
    assert result.next_token_ids.shape == (3,)
    assert result.top is not None
    assert result.top.top_ids.shape == (1, 20)

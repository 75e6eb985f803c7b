"""Deterministic mode on a CPU, compared bit for bit; test_gpu_deterministic.py does so on CUDA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.execution.attention import create_attention
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.execution.row_sums import row_cumsum, row_logsumexp, row_softmax, row_sum
from engine.execution.sampler import Sampler
from engine.model_config import ModelConfig
from tests.checkpoints import random_prompt
from tests.engine.execution.harness import sampling_batch
from tests.engine.execution.same_tokens import (
    after_a_handover,
    after_a_prefix_hit,
    alone,
    among,
    kv_of,
)
from tests.engine.execution.scheduled import Ask

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 7}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> ModelRunner:
    directory = checkpoint("llama-gqa")
    return load_model_runner(
        ModelConfig.from_directory(directory),
        model_path=str(directory),
        device=torch.device("cpu"),
        dtype=request.param,
        page_size=16,
        max_total_tokens=128 * 16,
        deterministic=True,
    )


def ask(number: int, length: int, new_tokens: int = 8) -> Ask:
    params: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "logprobs": True}
    return Ask(random_prompt(length, seed=number), params | (SAMPLED if number % 2 else {}))


@pytest.mark.parametrize("number", [0, 1], ids=["greedy", "sampled"])
def test_a_request_draws_the_same_alone_and_among_strangers(
    number: int, model: ModelRunner
) -> None:
    mine = ask(number, 40)
    strangers = [ask(10 + n, 3 + 9 * n, 2 + n) for n in range(4)]
    expected = alone(model, mine)
    assert len(expected) == 8
    assert all(logprob is not None for _, logprob in expected)
    mixed = {"enable_mixed_chunk": True, "enable_overlap": True}
    assert among(model, mine, strangers, chunk=16, seed=1) == expected
    assert among(model, mine, strangers, chunk=512, seed=2, **mixed) == expected


def test_chunks_and_prefix_hits_change_nothing(model: ModelRunner) -> None:
    mine = ask(1, 50)
    expected = alone(model, mine)
    assert alone(model, mine, chunk=16) == expected
    computed, cached = after_a_prefix_hit(model, mine)
    assert computed == cached == expected


def test_a_replay_at_any_token_goes_on_with_the_same(model: ModelRunner) -> None:
    mine = ask(1, 20)
    expected = alone(model, mine)
    tokens = [token for token, _ in expected]
    for known in range(len(tokens)):
        assert alone(model, mine, prior=tokens[:known]) == expected[known:], known


def test_a_handover_at_any_token_changes_nothing(model: ModelRunner) -> None:
    mine = ask(1, 20)
    expected = alone(model, mine)
    tokens = [token for token, _ in expected]
    for known in range(len(tokens) - 1):
        found = after_a_handover(model, mine, prior=tokens[:known])
        assert found == expected[known:], known


def test_kv_of_decode_steps_is_that_of_a_prompt(model: ModelRunner) -> None:
    tokens = random_prompt(50, seed=5)
    whole = kv_of(model, tokens, [], seed=1)
    assert torch.equal(kv_of(model, tokens, [17, 33], seed=2), whole)
    assert torch.equal(kv_of(model, tokens, list(range(30, 50)), seed=3), whole)


def test_a_step_in_parts_computes_the_same(model: ModelRunner) -> None:
    from tests.engine.execution.harness import Harness

    drawn = []
    for parts in ([(0, model.num_layers)], [(n, n + 1) for n in range(model.num_layers)]):
        harness = Harness(model.kv_pool)
        batch = harness.extend((harness.row(random_prompt(30, seed=1)), 30))
        for first, last in parts:
            result = model.forward_split(batch, first, last)
        drawn.append(result.next_token_ids.tolist())
    assert drawn[0] == drawn[1]


def test_sums_of_a_row_are_those_of_the_row_alone_and_right() -> None:
    logits = torch.randn(23, 1001) * 8
    for function in (row_sum, row_logsumexp, row_softmax, row_cumsum):
        together = function(logits.softmax(-1) if function is row_cumsum else logits)
        for row in range(23):
            one = logits[row : row + 1].clone()
            single = function(one.softmax(-1) if function is row_cumsum else one)
            if function is not row_cumsum:
                assert torch.equal(together[row], single[0]), function
    exact = logits.double()
    torch.testing.assert_close(
        row_logsumexp(logits)[:, 0].double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(
        row_softmax(logits).double(), exact.softmax(-1), rtol=1e-4, atol=1e-9
    )
    probabilities = exact.softmax(-1).float()
    torch.testing.assert_close(
        row_cumsum(probabilities), probabilities.double().cumsum(-1), rtol=0, atol=1e-9
    )


def test_what_is_drawn_in_deterministic_mode_is_what_is_drawn_without() -> None:
    logits = torch.randn(40, 500) * 3
    rows: list[dict[str, float]] = [
        {"temperature": 0.8, "top_p": 0.7, "top_k": 30 * (n % 2), "seed": n} for n in range(40)
    ]
    batch = sampling_batch(rows, device=torch.device("cpu"), logprobs=True)
    plain, exact = (
        Sampler().sample(logits, batch),
        Sampler(deterministic=True).sample(logits, batch),
    )
    assert plain.next_token_ids.tolist() == exact.next_token_ids.tolist()
    assert plain.logprobs is not None
    assert exact.logprobs is not None
    torch.testing.assert_close(plain.logprobs, exact.logprobs)


def test_a_gpu_without_kernels_for_it_is_refused_with_the_reason(model: ModelRunner) -> None:
    from types import SimpleNamespace

    pool: Any = SimpleNamespace(device=torch.device("cuda"), compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match="deterministic mode cannot be had on this GPU: "):
        create_attention(model.model_config, pool, deterministic=True)

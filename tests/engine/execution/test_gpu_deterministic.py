"""On a CUDA device: deterministic mode with its own kernels, compared bit for bit."""

from typing import Any

import pytest
import torch

from engine.execution.invariant_attention import InvariantAttention
from engine.execution.model_runner import ModelRunner
from engine.models.fused_ops import flashinfer_installed
from engine.models.invariant_ops import _TILES, invariant_linear
from engine.models.rotary_store import triton_installed
from tests.checkpoints import random_prompt
from tests.engine.execution.same_tokens import (
    after_a_handover,
    after_a_prefix_hit,
    alone,
    among,
    kv_of,
)
from tests.engine.execution.scheduled import Ask
from tests.engine.execution.trained import closeness, forced, load_tiny, random_texts, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not triton_installed(), reason="triton is not installed"),
]
needs_flashinfer = pytest.mark.skipif(
    not flashinfer_installed(), reason="flashinfer-python is not installed"
)

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 7}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "depth"), [(6144, 4096), (4096, 14_336), (131, 320)])
def test_a_products_rows_do_not_depend_on_their_number_or_its_tiles(
    columns: int, depth: int, bias: bool
) -> None:
    x = torch.randn(700, depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, depth, device="cuda", dtype=torch.bfloat16)
    added = torch.randn(columns, device="cuda", dtype=torch.bfloat16) if bias else None
    whole = invariant_linear(x, weight, added)
    expected = x.double() @ weight.double().t()
    if added is not None:
        expected = expected + added.double()
    assert float((whole.double() - expected).norm() / expected.norm()) < 5e-3
    for tiles in _TILES:
        for first, count in ((0, 1), (5, 2), (63, 64), (100, 65), (17, 600)):
            part = invariant_linear(x[first : first + count], weight, added, tiles)
            assert torch.equal(part, whole[first : first + count]), (tiles, first, count)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "graphs"])
def model(request: pytest.FixtureRequest) -> ModelRunner:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    runner = load_tiny(
        "cuda",
        torch.bfloat16,
        deterministic=True,
        graphs_up_to=80 if request.param else 0,
        tokens=131_072,
    )
    assert isinstance(runner.attention, InvariantAttention)
    return runner


def ask(number: int, length: int, new_tokens: int = 24) -> Ask:
    params: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "logprobs": True}
    text = random_texts(1, length)[0]
    return Ask(text, params | (SAMPLED if number % 2 else {}))


@pytest.mark.parametrize("number", [0, 1], ids=["greedy", "sampled"])
def test_a_request_draws_the_same_alone_and_among_64_strangers(
    number: int, model: ModelRunner
) -> None:
    mine = ask(number, 700)
    strangers = [ask(10 + n, 5 + 7 * n, 3 + n) for n in range(64)]
    expected = alone(model, mine)
    assert len(expected) == 24
    for chunk, settings in (
        (512, {}),
        (8192, {"enable_overlap": True}),
        (512, {"enable_mixed_chunk": True, "enable_overlap": True}),
    ):
        got = among(model, mine, strangers, chunk=chunk, seed=chunk, **settings)
        assert got == expected, (chunk, settings)


def test_chunks_and_prefix_hits_change_nothing(model: ModelRunner) -> None:
    mine = ask(1, 1400)
    expected = alone(model, mine)
    for chunk in (64, 512, 8192):
        assert alone(model, mine, chunk=chunk) == expected, chunk
    computed, cached = after_a_prefix_hit(model, mine)
    assert computed == cached == expected


def test_a_replay_at_any_token_goes_on_with_the_same(model: ModelRunner) -> None:
    mine = ask(1, 300)
    expected = alone(model, mine)
    tokens = [token for token, _ in expected]
    for known in range(len(tokens)):
        assert alone(model, mine, prior=tokens[:known]) == expected[known:], known


def test_a_handover_at_any_token_changes_nothing(model: ModelRunner) -> None:
    mine = ask(1, 300)
    expected = alone(model, mine)
    tokens = [token for token, _ in expected]
    for known in range(len(tokens) - 1):
        found = after_a_handover(model, mine, prior=tokens[:known])
        assert found == expected[known:], known


def test_kv_of_decode_steps_is_that_of_a_prompt(model: ModelRunner) -> None:
    tokens = random_prompt(900, seed=5)
    whole = kv_of(model, tokens, [], seed=1)
    assert torch.equal(kv_of(model, tokens, [17, 33, 512], seed=2), whole)
    assert torch.equal(kv_of(model, tokens, list(range(800, 900)), seed=3), whole)


def test_its_logits_are_close_to_float32(model: ModelRunner) -> None:
    texts = random_texts(24, 160)
    expected = forced(reference(), texts, prompt=120, chunk=120)
    actual = forced(model, texts, prompt=120, chunk=50)
    closeness(actual, expected).check(agreement=0.98)

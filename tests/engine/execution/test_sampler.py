"""Drawing tokens: what is kept, how often, and that noise hangs on (seed, position) alone."""

import numpy as np
import pytest
import torch

from engine.execution.noise import gumbel_noise
from engine.execution.sampler import Sampler, kept_tokens
from tests.engine.execution.harness import sampling_batch

CPU = torch.device("cpu")

CHI_SQUARE_999 = {3: 16.27, 5: 20.52, 9: 27.88, 63: 103.44}
"""Degrees of freedom → the value that chance exceeds once in a thousand."""


def draw(logits: torch.Tensor, rows: list[dict[str, float]]) -> list[int]:
    result = Sampler().sample(logits, sampling_batch(rows, device=CPU))
    tokens: list[int] = result.next_token_ids.tolist()
    return tokens


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_most_likely_token() -> None:
    logits = random_logits(4, 50)
    assert draw(logits, [{}] * 4) == logits.argmax(-1).tolist()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 40)
    logits[0, [7, 30]] = 1.0
    assert draw(logits, [{}, {}]) == [7, 0]
    # In a batch with a sampled row, too, and under top_k = 1.
    rows = [{}, {"temperature": 1.0, "top_k": 1}]
    assert draw(logits[[0, 0]], rows) == [7, 7]


def test_logits_are_left_unchanged() -> None:
    logits = random_logits(2, 30)
    before = logits.clone()
    draw(logits, [{"temperature": 0.7, "top_k": 5, "top_p": 0.8}, {}])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_over_positions(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    count = 20_000
    rows = [{"temperature": temperature, "seed": 3, "position": n} for n in range(count)]
    counts = np.bincount(draw(logits.expand(count, -1), rows), minlength=6)
    expected = torch.softmax(logits / temperature, -1).numpy()
    assert chi_square(counts, expected) < CHI_SQUARE_999[5]


def test_draws_follow_the_distribution_over_seeds() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 20_000
    rows = [{"temperature": 1.0, "seed": n, "position": 17} for n in range(count)]
    counts = np.bincount(draw(logits.expand(count, -1), rows), minlength=4)
    assert chi_square(counts, torch.softmax(logits, -1).numpy()) < CHI_SQUARE_999[3]


def test_all_tokens_of_a_large_vocabulary_are_drawn_alike() -> None:
    vocab, count = 64 * 50, 3000
    rows = [{"temperature": 1.0, "seed": 99, "position": n} for n in range(count)]
    tokens = []
    for start in range(0, count, 500):
        tokens += draw(torch.zeros(500, vocab), rows[start : start + 500])
    counts = np.bincount(np.array(tokens) // 50, minlength=64)
    assert chi_square(counts, np.full(64, 1 / 64)) < CHI_SQUARE_999[63]


def test_consecutive_positions_draw_independently() -> None:
    count = 20_000
    rows = [{"temperature": 1.0, "seed": 5, "position": n} for n in range(count)]
    tokens = np.array(draw(torch.zeros(count, 2), rows))
    pairs = np.bincount(tokens[:-1] * 2 + tokens[1:], minlength=4)
    assert chi_square(pairs, np.full(4, 0.25)) < CHI_SQUARE_999[3]


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([1, 2]), torch.tensor([3, 4]), 50_000).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - np.pi**2 / 6) < 0.03


def test_noise_is_the_same_arithmetic_as_on_any_other_device() -> None:
    """SplitMix64 in plain Python, against the wrapped tensor arithmetic."""

    def mix(x: int) -> int:
        mask = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden, seed, position = 0x9E3779B97F4A7C15, 2**64 - 12345, 77
    stream = mix(mix((seed + golden) % 2**64) ^ position)
    expected = []
    for token in range(100):
        bits = mix((stream + (token + 1) * golden) % 2**64) >> 33
        expected.append(-np.log(-np.log1p(-(bits + 0.5) / 2**31)))
    noise = gumbel_noise(torch.tensor([seed - 2**64]), torch.tensor([position]), 100)
    np.testing.assert_allclose(noise[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_same_seed_and_position_draw_the_same_alone_and_in_any_batch() -> None:
    logits = random_logits(1, 200)
    mine = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 2**64 - 1, "position": 12}
    alone = draw(logits, [mine])
    others = random_logits(3, 200, seed=1)
    batch = torch.cat((others[:2], logits, others[2:]))
    rows = [{}, {"temperature": 1.5, "seed": 4}, mine, {"temperature": 0.3, "top_p": 0.5}]
    assert draw(batch, rows)[2] == alone[0]
    # Truncation in the batch, or none, must not move a row that asks for none.
    plain = {"temperature": 0.9, "seed": 8, "position": 3}
    assert (
        draw(batch, [{}, {}, plain, {"temperature": 1.0, "top_k": 2}])[2]
        == draw(logits, [plain])[0]
    )


def test_another_seed_or_position_draws_another_token() -> None:
    logits = torch.zeros(1, 100_000)
    drawn = {
        draw(logits, [{"temperature": 1.0, "seed": seed, "position": position}])[0]
        for seed in (0, 1, 2**63, 2**64 - 1)
        for position in (0, 1, 4096)
    }
    assert len(drawn) == 12


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(3, 100)
    for temperature in (1e-6, 1e-30):
        rows = [{"temperature": temperature, "seed": n} for n in range(3)]
        assert draw(logits, rows) == logits.argmax(-1).tolist()


def reference_kept(row: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Top-k, then top-p over the rest renormalised; the token that crosses p is kept."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if top_k:
        order = order[:top_k]
    weights = np.exp(row[order].astype(np.float64) - row.max())
    weights /= weights.sum()
    kept, total = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.add(token)
        total += weight
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_kept_tokens_equal_a_plain_reference(top_k: int, top_p: float) -> None:
    scaled = random_logits(8, 60, seed=top_k)
    rows = [{"temperature": 1.0, "top_k": top_k, "top_p": top_p}] * 8
    if not top_k and top_p == 1.0:
        rows = [*rows[:7], {"temperature": 1.0, "top_k": 3, "top_p": 0.5}]
    kept = kept_tokens(scaled, sampling_batch(rows, device=CPU))
    for row, values in enumerate(scaled.numpy()):
        expected = reference_kept(values, int(rows[row]["top_k"]), rows[row]["top_p"])
        assert set(kept[row].nonzero()[:, 0].tolist()) == expected


def test_top_p_keeps_the_token_that_crosses() -> None:
    scaled = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, expected in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3)):
        sampling = sampling_batch([{"temperature": 1.0, "top_p": top_p}], device=CPU)
        assert int(kept_tokens(scaled, sampling).sum()) == expected


def test_only_kept_tokens_are_drawn() -> None:
    logits = random_logits(1, 60).expand(500, -1)
    rows = [{"temperature": 3.0, "top_k": 6, "top_p": 0.9, "seed": n} for n in range(500)]
    allowed = reference_kept(logits[0].numpy() / 3.0, 6, 0.9)
    assert set(draw(logits, rows)) == allowed


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = random_logits(3, 80)
    rows = [{}, {"temperature": 0.2, "seed": 1}, {"temperature": 2.0, "top_k": 4, "seed": 2}]
    result = Sampler().sample(logits, sampling_batch(rows, device=CPU, logprobs=True))
    expected = torch.log_softmax(logits, -1)[torch.arange(3), result.next_token_ids]
    assert result.logprobs is not None
    assert result.logprobs.dtype == torch.float32
    torch.testing.assert_close(result.logprobs, expected, atol=1e-5, rtol=0)

"""The fixed-seed workload: the same lengths, arrivals and token ids for every engine under test.

`bench/workloads.py` holds the same numbers for engines that are measured without Baton; a test
compares the two.
"""

from collections.abc import Iterator, Sequence

import numpy as np

INPUT_MEDIAN, INPUT_SIGMA, INPUT_RANGE = 800, 0.8, (32, 6000)
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_RANGE = 180, 0.7, (8, 1000)
ARRIVALS_STREAM, TOKENS_STREAM, BLOCK_STREAM = 1000, 7, 11
BLOCK_TOKENS = 512
"""Tokens for which one hash id of a Mooncake trace stands."""


def mix(count: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Input and output lengths in tokens, log-normal and clipped."""
    rng = np.random.default_rng(seed)
    inputs = _lognormal(rng, count, INPUT_MEDIAN, INPUT_SIGMA, INPUT_RANGE)
    return inputs, _lognormal(rng, count, OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_RANGE)


def poisson(rate: float, *, duration_s: float, seed: int = 0) -> list[float]:
    """Arrivals in seconds, all below the duration.

    Args:
        rate: requests a second.
    """
    rng = np.random.default_rng([seed, round(rate * ARRIVALS_STREAM)])
    gaps = rng.exponential(1.0 / rate, int(rate * duration_s * 2) + 64)
    arrivals = np.cumsum(gaps)
    return [float(at) for at in arrivals[arrivals < duration_s]]


def token_ids(lengths: Sequence[int], *, vocab_size: int, seed: int = 0) -> Iterator[list[int]]:
    """One list of random token ids for each length, made as it is taken."""
    rng = np.random.default_rng([seed, TOKENS_STREAM])
    for length in lengths:
        yield rng.integers(0, vocab_size, length).tolist()


def block_token_ids(
    hash_ids: Sequence[int], length: int, *, vocab_size: int, seed: int = 0
) -> list[int]:
    """Token ids of a prompt whose blocks a trace names: equal hash ids give equal blocks."""
    ids: list[int] = []
    for hash_id in hash_ids:
        rng = np.random.default_rng([seed, BLOCK_STREAM, hash_id])
        ids += rng.integers(0, vocab_size, BLOCK_TOKENS).tolist()
    return ids[:length]


def _lognormal(
    rng: np.random.Generator, count: int, median: int, sigma: float, limits: tuple[int, int]
) -> list[int]:
    lengths = rng.lognormal(np.log(median), sigma, count)
    return [int(length) for length in np.clip(lengths, *limits).astype(int)]

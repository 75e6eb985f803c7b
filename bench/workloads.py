"""Workload shapes shared by every engine under test (numpy only)."""

import numpy as np

VOCAB = 128000  # stay below Llama-3's special tokens


def _logn(rng, n, median, sigma, lo, hi):
    return np.clip(rng.lognormal(np.log(median), sigma, n), lo, hi).astype(int)


def mix(n=512, seed=0):
    """-> (input lengths, output lengths), lists of int."""
    rng = np.random.default_rng(seed)
    i = _logn(rng, n, 800, 0.8, 32, 6000)
    o = _logn(rng, n, 180, 0.7, 8, 1000)
    return i.tolist(), o.tolist()


def poisson(rate, duration=60.0, seed=0):
    """-> list of (arrival s, input length, output length), arrivals < duration."""
    rng = np.random.default_rng([seed, round(rate * 1000)])
    t = np.cumsum(rng.exponential(1.0 / rate, int(rate * duration * 2) + 64))
    t = t[t < duration]
    i, o = mix(len(t), seed)
    return list(zip(t.tolist(), i, o, strict=True))


def tokens(lengths, seed=0):
    """-> one list of random token ids for each length."""
    rng = np.random.default_rng([seed, 7])
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]

"""Sampling noise as a function of (seed, position, token id), and of nothing else.

A request that is replayed on another worker, joins another batch, or hits the prefix cache must
draw the same tokens. So no generator has state: the noise of a token id is one output of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose stream is chosen by seed and position. The
arithmetic is on 64-bit integers that wrap, bit-equal on every device.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [b, vocab_size] float32 for `seed` [b] and `position` [b], both int64
    (the bits of unsigned values).

    The argmax over tokens of log-probability plus this noise is a draw from the distribution.
    """
    stream = _finalise(_finalise(seed + _GOLDEN) ^ position)
    ids = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=seed.device)
    bits = _finalise(stream[:, None] + ids * _GOLDEN)
    # 31 bits, as small numbers: where the uniform is near 0 the exponential is small and the
    # noise large, and there float32 has digits to spare. That is the end that wins the argmax.
    uniform = (_shift(bits, 33).to(torch.float32) + 0.5).mul_(2.0**-31)
    exponential = uniform.clamp_(max=_LARGEST_BELOW_ONE).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _finalise(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

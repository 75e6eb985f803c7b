"""Rotary position embedding: its settings, and the table of cosines and sines.

Every kind that is listed here is a fixed function of the position. Kinds whose frequencies depend
on the length of the sequence at hand (dynamic, longrope) would make cached KV wrong when a
sequence grows, so they are refused by name in `model_config`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Which angle a position turns each pair of a head's dimensions by."""

    theta: float
    """Base of the geometric series of wavelengths."""

    kind: RopeKind = "default"

    factor: float = 1.0
    """How many times longer than the original context the model reads (all but default)."""

    original_context_length: int = 0
    """Tokens of the context before stretching (llama3, yarn)."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / this are stretched by the whole factor."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / this are left alone."""

    attention_factor: float = 1.0
    """yarn: multiplies cosines and sines."""

    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original context stay."""

    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched by the whole factor."""

    truncate: bool = True
    """yarn: round the two limits above to whole dimensions."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a token for each pair of dimensions: [head_dim / 2] float32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, plain, head_dim)


def cos_sin_table(
    rope: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> torch.Tensor:
    """[positions, head_dim] float32: cosines in the first half of a row, sines in the second.

    float32 whatever the model's dtype: bfloat16 cannot tell neighbouring angles apart.
    """
    frequencies = inverse_frequencies(rope, head_dim).to(device)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """The factor that yarn prescribes where the checkpoint names none (arXiv 2309.00071, 3.4)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves stretched, short ones kept, a linear blend between (Llama 3.1 model card)."""
    turns = rope.original_context_length * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _mix(plain / rope.factor, plain, blend.clamp(0.0, 1.0))


def _yarn(rope: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """NTK by parts (arXiv 2309.00071, 3.2): a linear ramp over the dimensions' indices."""

    def dimension_that_turns(turns: float) -> float:
        wavelength = rope.original_context_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_that_turns(rope.beta_fast), dimension_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 1e-3)
    stretched = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    return _mix(plain, plain / rope.factor, stretched.clamp(0.0, 1.0))


def _mix(start: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return start * (1 - weight) + end * weight

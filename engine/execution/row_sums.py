"""Sums over the vocabulary in an order that depends on nothing but its size.

A library's reduction chooses how to split a row by the number of rows, so the same logits get
another log probability in another batch. Halving adds elements pairwise: bit-equal on every device.
"""

import torch

_FIXED_POINT = 2.0**40
"""Probabilities as integers add up the same in any order; 2^-40 is far below what float32 tells."""


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, [..., 1]."""
    width = values.shape[-1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        folded = values[..., :half].clone()
        folded[..., : width - half] += values[..., half:width]
        values, width = folded, half
    return values


def row_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """[..., 1]; -inf is a probability of 0, and at least one element is finite."""
    greatest = logits.amax(dim=-1, keepdim=True)
    return greatest + row_sum((logits - greatest).exp()).log()


def row_softmax(logits: torch.Tensor) -> torch.Tensor:
    """As torch.softmax over the last dimension, for rows with a finite element."""
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return weights / row_sum(weights)


def row_cumsum(probabilities: torch.Tensor) -> torch.Tensor:
    """Running sums of probabilities over the last dimension, rounded to 2^-40, as float64."""
    fixed = (probabilities.double() * _FIXED_POINT).round().to(torch.int64)
    return fixed.cumsum(dim=-1).double() / _FIXED_POINT

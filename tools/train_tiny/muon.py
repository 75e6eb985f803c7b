"""Muon for the matrices inside the layers: momentum, orthogonalised.

The method is Keller Jordan's (2024), with the update scaled to the RMS of AdamW's as in "Muon is
Scalable for LLM Training" (2025), so that one learning rate serves both optimisers. Matrices of one
shape are stacked and orthogonalised together: a layer's matrices are too small to fill a GPU alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; they push singular values towards 1 fast, not exactly."""

NEWTON_SCHULZ_STEPS = 5

UPDATE_RMS = 0.2
"""RMS of an update at learning rate 1: about what AdamW makes."""


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, to `g` [count, rows, columns]; bfloat16 on a
    GPU, where it is fast enough and exact enough."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if g.is_cuda:
        x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    orthogonal: Tensor = (x.mT if tall else x).float()
    return orthogonal


class Muon:
    """Steps a list of matrices, grouped by shape."""

    def __init__(
        self, weights: Sequence[Tensor], *, momentum: float, weight_decay: float, compiled: bool
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = sorted({tuple(w.shape) for w in weights})
        self._groups = [[w for w in weights if tuple(w.shape) == shape] for shape in shapes]
        self._momenta = [torch.zeros_like(torch.stack(group)) for group in self._groups]
        self._update = torch.compile(_update, dynamic=False) if compiled else _update

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix from its `.grad`."""
        for group, momenta in zip(self._groups, self._momenta, strict=True):
            grads = torch.stack([w.grad for w in group if w.grad is not None])
            update = self._update(grads, momenta, self.momentum)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-lr)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The momenta, one stack a shape."""
        return {"momenta": self._momenta}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Copy saved momenta into place."""
        for mine, saved in zip(self._momenta, state["momenta"], strict=True):
            mine.copy_(saved)


def _update(grads: Tensor, momenta: Tensor, momentum: float) -> Tensor:
    momenta.lerp_(grads, 1 - momentum)
    direction = torch.lerp(grads, momenta, momentum)
    scale = UPDATE_RMS * max(grads.shape[-2:]) ** 0.5
    update: Tensor = orthogonalise(direction) * scale
    return update

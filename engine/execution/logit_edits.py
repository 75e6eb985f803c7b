"""What requests do to their logits before a token is drawn.

In this order: logit bias, repetition penalty (tokens of prompt and output), presence and frequency
penalty (tokens of the output), the tokens that may not come yet, and last what grammars forbid.
Everything is a tensor on the logits' device, so nothing here waits for it.
"""

from dataclasses import dataclass

import torch

from engine.execution.token_mask import TokenMask


@dataclass(frozen=True, slots=True)
class LogitBias:
    """`n` entries over all requests; no (row, token) comes twice."""

    rows: torch.Tensor
    """[n] int64; places in the batch."""
    token_ids: torch.Tensor
    """[n] int64."""
    values: torch.Tensor
    """[n] float32; added."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of the `r` requests that have any."""

    rows: torch.Tensor
    """[r] int64; places in the batch."""
    repetition: torch.Tensor
    """[r, 1] float32; 1 changes nothing."""
    presence: torch.Tensor
    """[r, 1] float32."""
    frequency: torch.Tensor
    """[r, 1] float32."""
    in_prompt: torch.Tensor
    """[r, vocab] bool."""
    output_counts: torch.Tensor
    """[r, vocab] int32; how often the output holds each token."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """`n` entries: tokens that end an output and may not be drawn before a position."""

    rows: torch.Tensor
    """[n] int64; places in the batch."""
    token_ids: torch.Tensor
    """[n] int64."""
    before: torch.Tensor
    """[n] int64; absolute position from which on the token may be drawn."""


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """All edits of a batch."""

    bias: LogitBias | None = None
    penalties: Penalties | None = None
    not_yet: NotYet | None = None
    mask: TokenMask | None = None

    def apply(self, logits: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Edited copy of `logits` [b, vocab] float32, for drawing the tokens at `position` [b]."""
        edited = logits.clone()
        if self.bias is not None:
            where = (self.bias.rows, self.bias.token_ids)
            edited[where] = edited[where] + self.bias.values
        if self.penalties is not None:
            rows = self.penalties.rows
            edited[rows] = penalised(edited[rows], self.penalties)
        if self.not_yet is not None:
            where = (self.not_yet.rows, self.not_yet.token_ids)
            early = position[self.not_yet.rows] < self.not_yet.before
            edited[where] = edited[where].masked_fill(early, float("-inf"))
        if self.mask is not None:
            self.mask.apply(edited)
        return edited


def penalised(logits: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """`logits` [r, vocab] of the requests that `penalties` lists, with these applied."""
    present = penalties.output_counts > 0
    penalty = penalties.repetition
    repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(present | penalties.in_prompt, repeated, logits)
    logits = logits - penalties.presence * present
    return logits.sub_(penalties.frequency * penalties.output_counts)

"""The logit edits of a batch, kept while its members stay.

All of it follows from a request's prompt and output, so it is the same for a first token, after a
handover, a replay or a retraction. What depends on the output counts the tokens that have been
inputs: the token drawn last joins the counts when it becomes one (`count`), on the device. A batch
in which nobody asks for edits holds no tensor here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.errors import EngineError
from engine.execution.device import to_device
from engine.execution.logit_edits import LogitBias, LogitEdits, NotYet, Penalties
from engine.scheduler.req import Req

_EXTREME = 1e30
"""Repetition penalties are kept within this and its inverse, beyond which float32 overflows; more
extreme ones draw the same tokens."""


@dataclass(frozen=True, slots=True)
class _TokenEdits:
    """Edits of one request that concern single tokens."""

    bias: tuple[tuple[int, float], ...] = ()
    not_yet: tuple[int, ...] = ()
    before: int = 0
    """Absolute position from which on the tokens `not_yet` may be drawn."""
    held_draws: int = 0
    """Draws until then; afterwards nothing is left to hold back."""

    def after(self, draws: int) -> _TokenEdits:
        if self.held_draws > draws:
            return replace(self, held_draws=self.held_draws - draws)
        return replace(self, not_yet=(), before=0, held_draws=0) if self.not_yet else self


_NONE = _TokenEdits()


class EditState:
    """One row a request, in the batch's order."""

    def __init__(
        self,
        tokens: list[_TokenEdits],
        penalties: Penalties | None,
        penalty_rows: list[int],
        device: torch.device,
    ) -> None:
        self._tokens = tokens
        self._penalties = penalties
        self._penalty_rows = penalty_rows
        """The rows of `penalties`, on the host."""
        self._device = device
        self._held_draws = max((edits.held_draws for edits in tokens), default=0)
        self._draws = 0
        """Since this state was made."""
        self._make_edits()

    def _make_edits(self) -> None:
        bias, penalties, not_yet = self._bias(), self._penalties, self._not_yet()
        self.edits: LogitEdits | None = None
        """For the next draw; None: nobody asks for any."""
        if bias is not None or penalties is not None or not_yet is not None:
            self.edits = LogitEdits(bias=bias, penalties=penalties, not_yet=not_yet)

    @classmethod
    def of(cls, reqs: Sequence[Req], device: torch.device, *, vocab_size: int) -> EditState:
        """For requests whose tokens so far are inputs of this step or of earlier ones.
        `vocab_size`: width of the logits."""
        # What a chunk draws that is not its prompt's last is thrown away.
        tokens = [_token_edits(req) if req.prompt_done else _NONE for req in reqs]
        rows = [
            row
            for row, req in enumerate(reqs)
            if req.prompt_done and req.sampling_params.has_penalties
        ]
        penalties = _penalties(reqs, rows, device, vocab_size) if rows else None
        return cls(tokens, penalties, rows, device)

    def count(self, drawn: torch.Tensor) -> None:
        """`drawn` [b] int64, the tokens drawn last, are inputs now."""
        if self._penalties is not None:
            tokens = drawn[self._penalties.rows][:, None]
            ones = torch.ones_like(tokens, dtype=torch.int32)
            self._penalties.output_counts.scatter_add_(1, tokens, ones)
        self._draws += 1
        if self._draws == self._held_draws:
            # Nobody pays for what holds nothing back any more.
            self._tokens = self._tokens_now()
            self._make_edits()

    def _tokens_now(self) -> list[_TokenEdits]:
        return [edits.after(self._draws) for edits in self._tokens]

    def filter(self, keep: list[int]) -> EditState:
        """The rows `keep`."""
        now = self._tokens_now()
        tokens = [now[row] for row in keep]
        place = {row: i for i, row in enumerate(self._penalty_rows)}
        kept = [(new, place[old]) for new, old in enumerate(keep) if old in place]
        if self._penalties is None or not kept:
            return EditState(tokens, None, [], self._device)
        rows = [new for new, _ in kept]
        chosen = self._int64([old for _, old in kept])
        old = self._penalties
        penalties = Penalties(
            rows=self._int64(rows),
            repetition=old.repetition[chosen],
            presence=old.presence[chosen],
            frequency=old.frequency[chosen],
            in_prompt=old.in_prompt[chosen],
            output_counts=old.output_counts[chosen],
        )
        return EditState(tokens, penalties, rows, self._device)

    def merge(self, other: EditState) -> EditState:
        """These rows, then those of `other`."""
        tokens = self._tokens_now() + other._tokens_now()
        shifted = [len(self._tokens) + row for row in other._penalty_rows]
        rows = self._penalty_rows + shifted
        mine, theirs = self._penalties, other._penalties
        if theirs is not None:
            theirs = replace(theirs, rows=self._int64(shifted))
        if mine is None or theirs is None:
            return EditState(tokens, mine or theirs, rows, self._device)
        penalties = Penalties(
            rows=torch.cat([mine.rows, theirs.rows]),
            repetition=torch.cat([mine.repetition, theirs.repetition]),
            presence=torch.cat([mine.presence, theirs.presence]),
            frequency=torch.cat([mine.frequency, theirs.frequency]),
            in_prompt=torch.cat([mine.in_prompt, theirs.in_prompt]),
            output_counts=torch.cat([mine.output_counts, theirs.output_counts]),
        )
        return EditState(tokens, penalties, rows, self._device)

    def _bias(self) -> LogitBias | None:
        entries = [
            (row, token, value)
            for row, edits in enumerate(self._tokens)
            for token, value in edits.bias
        ]
        if not entries:
            return None
        rows, token_ids, values = zip(*entries, strict=True)
        return LogitBias(
            rows=self._int64(rows),
            token_ids=self._int64(token_ids),
            values=to_device(values, self._device, torch.float32),
        )

    def _not_yet(self) -> NotYet | None:
        entries = [
            (row, token, edits.before)
            for row, edits in enumerate(self._tokens)
            for token in edits.not_yet
        ]
        if not entries:
            return None
        rows, token_ids, before = zip(*entries, strict=True)
        return NotYet(
            rows=self._int64(rows), token_ids=self._int64(token_ids), before=self._int64(before)
        )

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return to_device(values, self._device)


def _token_edits(req: Req) -> _TokenEdits:
    params = req.sampling_params
    bias = tuple(params.logit_bias.items())
    # The request's own bound was lowered to what positions reach.
    least = min(params.min_tokens, req.max_new_tokens)
    held_draws = least - len(req.output_ids)
    if held_draws <= 0 or not req.ending_token_ids or req.grammar is not None:
        # A grammar's own mask holds endings back, as far as it leaves anything else.
        return _TokenEdits(bias=bias) if bias else _NONE
    return _TokenEdits(
        bias=bias,
        not_yet=tuple(sorted(req.ending_token_ids)),
        before=req.prompt_len + least,
        held_draws=held_draws,
    )


def _penalties(
    reqs: Sequence[Req], rows: list[int], device: torch.device, vocab_size: int
) -> Penalties:
    """Counts from nothing, for the requests at `rows`."""
    if vocab_size < 1:
        raise EngineError("a batch with penalties must know the vocabulary's size")
    chosen = [reqs[row] for row in rows]
    params = [req.sampling_params for req in chosen]

    def column(values: list[float]) -> torch.Tensor:
        return to_device(values, device, torch.float32)[:, None]

    def places(token_lists: list[list[int]]) -> torch.Tensor:
        flat = [i * vocab_size + token for i, ids in enumerate(token_lists) for token in ids]
        return to_device(flat, device)

    in_prompt = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    in_prompt.view(-1).index_fill_(0, places([req.origin_input_ids for req in chosen]), True)
    counts = torch.zeros(len(rows), vocab_size, dtype=torch.int32, device=device)
    outputs = places([req.output_ids for req in chosen])
    counts.view(-1).scatter_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))
    return Penalties(
        rows=to_device(rows, device),
        repetition=column([min(max(p.repetition_penalty, 1 / _EXTREME), _EXTREME) for p in params]),
        presence=column([p.presence_penalty for p in params]),
        frequency=column([p.frequency_penalty for p in params]),
        in_prompt=in_prompt,
        output_counts=counts,
    )

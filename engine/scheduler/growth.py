"""What running requests may still produce, summed once and kept up while they decode.

Every pass with somebody waiting asks for this sum; at 256 running requests, adding it up anew took
a third of the pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduler.config import CLIP_MAX_NEW_TOKENS
from engine.scheduler.req import Req


@dataclass(slots=True)
class Growth:
    """Tokens that some requests may still produce, each counted up to the clip."""

    certain: int = 0
    """Of those with ignore_eos: they will."""
    expected: int = 0
    """Of the others: a share of it, as experience says (`NewTokenRatio`)."""
    _certain_rows: int = 0
    _expected_rows: int = 0
    _steps_left: int = 0
    """Steps for which each row's part sinks by one a step."""

    @classmethod
    def of(cls, reqs: Iterable[Req]) -> Growth:
        growth = cls()
        steps = CLIP_MAX_NEW_TOKENS
        for req in reqs:
            left = req.max_new_tokens - len(req.output_ids)
            if left <= 0:
                continue
            if left > CLIP_MAX_NEW_TOKENS:
                left, steps = CLIP_MAX_NEW_TOKENS, 0
            if left < steps:
                steps = left
            if req.sampling_params.ignore_eos:
                growth.certain += left
                growth._certain_rows += 1
            else:
                growth.expected += left
                growth._expected_rows += 1
        growth._steps_left = steps
        return growth

    def tokens(self, new_token_ratio: float) -> float:
        """How many of them are counted as needed."""
        return self.certain + self.expected * new_token_ratio

    def after_a_token_each(self) -> Growth | None:
        """The same requests one token later; None: they must be added up anew."""
        if self._steps_left <= 0:
            return None
        self._steps_left -= 1
        self.certain -= self._certain_rows
        self.expected -= self._expected_rows
        return self

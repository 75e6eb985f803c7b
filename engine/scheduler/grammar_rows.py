"""The grammars of a batch's requests, as the mask of its next draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.execution.device import to_device
from engine.execution.token_mask import TokenMask
from engine.grammar.backend import GrammarMatcher
from engine.scheduler.req import Req


class GrammarRows:
    """One row a request, in the batch's order; a batch without grammars holds no tensor here."""

    def __init__(self, matchers: list[GrammarMatcher | None], device: torch.device) -> None:
        self._matchers = matchers
        self._device = device
        rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
        self.mask: TokenMask | None = None
        """For the next draw; None: nobody has a grammar."""
        if rows:
            self.mask = TokenMask(rows=to_device(rows, device), masks=self._masks)

    @classmethod
    def of(cls, reqs: Sequence[Req], device: torch.device) -> GrammarRows:
        # What a chunk draws that is not its prompt's last is thrown away.
        return cls([req.grammar if req.prompt_done else None for req in reqs], device)

    def filter(self, keep: list[int]) -> GrammarRows:
        """The rows `keep`."""
        return GrammarRows([self._matchers[row] for row in keep], self._device)

    def merge(self, other: GrammarRows) -> GrammarRows:
        """These rows, then those of `other`."""
        return GrammarRows(self._matchers + other._matchers, self._device)

    def _masks(self) -> torch.Tensor:
        matchers = [matcher for matcher in self._matchers if matcher is not None]
        backend = matchers[0].backend
        return backend.buffer.upload(
            len(matchers),
            backend.mask_words,
            lambda masks: backend.fill_masks(matchers, masks),
            self._device,
        )

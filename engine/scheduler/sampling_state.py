"""Sampling parameters of a batch as device tensors, kept while the batch's members stay.

From step to step only the position advances, and the counts of requests with penalties; a decode
step builds no tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from engine.execution.device import to_device
from engine.execution.forward_batch import SamplingBatch
from engine.execution.logit_edits import LogitEdits
from engine.scheduler.edit_state import EditState
from engine.scheduler.grammar_rows import GrammarRows
from engine.scheduler.logprobs import top_rows
from engine.scheduler.req import Req


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What one request asks of the sampler."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    logprobs: bool
    top_logprobs: int


class SamplingState:
    """One row a request, in the batch's order."""

    def __init__(
        self,
        *,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        top_k: torch.Tensor,
        min_p: torch.Tensor,
        seed: torch.Tensor,
        wishes: list[_Wishes],
        edits: EditState,
        grammars: GrammarRows,
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._min_p = min_p
        self._seed = seed
        self._wishes = wishes
        self._edits = edits
        self._grammars = grammars
        self._all_greedy = all(w.greedy for w in wishes)
        self._any_top_k = any(w.top_k for w in wishes)
        self._any_top_p = any(w.top_p for w in wishes)
        self._any_min_p = any(w.min_p for w in wishes)
        self.any_logprobs = any(w.logprobs for w in wishes)
        self.top = top_rows([w.top_logprobs for w in wishes], temperature.device)
        """Who wants alternatives beside the token that is drawn next."""

    @classmethod
    def of(cls, reqs: Sequence[Req], device: torch.device, *, vocab_size: int) -> SamplingState:
        """`vocab_size`: width of the logits."""
        params = [req.sampling_params for req in reqs]
        seeds = [p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params]

        def column(values: list[float]) -> torch.Tensor:
            return to_device(values, device, torch.float32)

        return cls(
            temperature=column([p.temperature for p in params]),
            top_p=column([p.top_p for p in params]),
            top_k=to_device([p.top_k for p in params], device),
            min_p=column([p.min_p for p in params]),
            seed=to_device(seeds, device),
            wishes=[
                _Wishes(
                    greedy=p.is_greedy,
                    top_k=p.top_k > 0,
                    top_p=p.top_p < 1,
                    min_p=p.min_p > 0,
                    logprobs=p.wants_logprobs,
                    top_logprobs=p.top_logprobs,
                )
                for p in params
            ],
            edits=EditState.of(reqs, device, vocab_size=vocab_size),
            grammars=GrammarRows.of(reqs, device),
        )

    def filter(self, keep: list[int], keep_on_device: torch.Tensor) -> SamplingState:
        """The rows `keep`; `keep_on_device` is the same as [k] int64."""
        return SamplingState(
            temperature=self._temperature[keep_on_device],
            top_p=self._top_p[keep_on_device],
            top_k=self._top_k[keep_on_device],
            min_p=self._min_p[keep_on_device],
            seed=self._seed[keep_on_device],
            wishes=[self._wishes[i] for i in keep],
            edits=self._edits.filter(keep),
            grammars=self._grammars.filter(keep),
        )

    def merge(self, other: SamplingState) -> SamplingState:
        """These rows, then those of `other`."""
        return SamplingState(
            temperature=torch.cat([self._temperature, other._temperature]),
            top_p=torch.cat([self._top_p, other._top_p]),
            top_k=torch.cat([self._top_k, other._top_k]),
            min_p=torch.cat([self._min_p, other._min_p]),
            seed=torch.cat([self._seed, other._seed]),
            wishes=self._wishes + other._wishes,
            edits=self._edits.merge(other._edits),
            grammars=self._grammars.merge(other._grammars),
        )

    def count(self, drawn: torch.Tensor) -> None:
        """`drawn` [b] int64, the tokens drawn last, are inputs of the next step."""
        self._edits.count(drawn)

    def at(
        self, position: torch.Tensor, tokens_known: Callable[[], None] | None = None
    ) -> SamplingBatch:
        """The batch for drawing tokens at `position` ([b] int64, absolute). `tokens_known` is
        called before the masks of grammars are computed, which depend on the tokens drawn last;
        None: all of them are known."""
        edits, mask = self._edits.edits, self._grammars.mask
        if mask is not None:
            if tokens_known is not None:
                mask = mask.after(tokens_known)
            edits = replace(edits or LogitEdits(), mask=mask)
        return SamplingBatch(
            temperature=self._temperature,
            top_p=self._top_p,
            top_k=self._top_k,
            min_p=self._min_p if self._any_min_p else None,
            seed=self._seed,
            position=position,
            all_greedy=self._all_greedy,
            any_top_k=self._any_top_k,
            any_top_p=self._any_top_p,
            any_logprobs=self.any_logprobs,
            edits=edits,
            top=self.top,
        )

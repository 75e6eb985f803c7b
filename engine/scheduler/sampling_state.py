"""Sampling parameters of a batch as device tensors, kept while the batch's members stay.

Only the position advances from step to step, so a decode step builds no tensor here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.execution.forward_batch import SamplingBatch
from engine.scheduler.req import Req


@dataclass(frozen=True, slots=True)
class _Flags:
    """What one request asks of the sampler."""

    greedy: bool
    top_k: bool
    top_p: bool
    logprobs: bool


class SamplingState:
    """One row a request, in the batch's order."""

    def __init__(
        self,
        *,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        top_k: torch.Tensor,
        seed: torch.Tensor,
        flags: list[_Flags],
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._seed = seed
        self._flags = flags
        self._all_greedy = all(f.greedy for f in flags)
        self._any_top_k = any(f.top_k for f in flags)
        self._any_top_p = any(f.top_p for f in flags)
        self.any_logprobs = any(f.logprobs for f in flags)

    @classmethod
    def of(cls, reqs: Sequence[Req], device: torch.device) -> SamplingState:
        params = [req.sampling_params for req in reqs]
        seeds = [p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params]
        return cls(
            temperature=torch.tensor(
                [p.temperature for p in params], dtype=torch.float32, device=device
            ),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            seed=torch.tensor(seeds, dtype=torch.int64, device=device),
            flags=[
                _Flags(
                    greedy=p.is_greedy, top_k=p.top_k > 0, top_p=p.top_p < 1, logprobs=p.logprobs
                )
                for p in params
            ],
        )

    def filter(self, keep: list[int], keep_on_device: torch.Tensor) -> SamplingState:
        """The rows `keep`; `keep_on_device` is the same as [k] int64."""
        return SamplingState(
            temperature=self._temperature[keep_on_device],
            top_p=self._top_p[keep_on_device],
            top_k=self._top_k[keep_on_device],
            seed=self._seed[keep_on_device],
            flags=[self._flags[i] for i in keep],
        )

    def merge(self, other: SamplingState) -> SamplingState:
        """These rows, then those of `other`."""
        return SamplingState(
            temperature=torch.cat([self._temperature, other._temperature]),
            top_p=torch.cat([self._top_p, other._top_p]),
            top_k=torch.cat([self._top_k, other._top_k]),
            seed=torch.cat([self._seed, other._seed]),
            flags=self._flags + other._flags,
        )

    def at(self, position: torch.Tensor) -> SamplingBatch:
        """The batch for drawing tokens at `position` ([b] int64, absolute)."""
        return SamplingBatch(
            temperature=self._temperature,
            top_p=self._top_p,
            top_k=self._top_k,
            seed=self._seed,
            position=position,
            all_greedy=self._all_greedy,
            any_top_k=self._any_top_k,
            any_top_p=self._any_top_p,
            any_logprobs=self.any_logprobs,
        )

"""Log probabilities beyond the drawn token's own: who wants them, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.execution.device import to_device
from engine.execution.forward_batch import PromptTargets, TokenLogprobs, TopRows

if TYPE_CHECKING:
    from engine.scheduler.req import Req

Alternatives = tuple[tuple[int, float], ...]
"""(token id, natural-log probability) of the most likely tokens, most likely first."""


class PromptToken(NamedTuple):
    """One token of a prompt, judged by the model's unmodified distribution after those before."""

    token: int
    logprob: float | None
    """None for the first: nothing comes before it."""
    top: Alternatives


def top_rows(counts: Sequence[int], device: torch.device) -> TopRows | None:
    """Who wants alternatives beside a token; `counts`: how many each request wants."""
    rows = [row for row, count in enumerate(counts) if count > 0]
    if not rows:
        return None
    return TopRows(
        rows=rows,
        rows_on_device=to_device(rows, device),
        count=max(counts),
    )


def prompt_targets(
    reqs: Sequence[Req],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    device: torch.device,
) -> PromptTargets | None:
    """Prompt tokens that this extend's inputs judge; an input judges the token after it."""
    if not any(req.wants_prompt_logprobs for req in reqs):
        return None
    inputs: list[int] = []
    target_ids: list[int] = []
    counts: list[int] = []
    top, offset = 0, 0
    for req, prefix, extend in zip(reqs, prefix_lens, extend_lens, strict=True):
        targets: list[int] = []
        if req.wants_prompt_logprobs:
            targets = req.origin_input_ids[prefix + 1 : prefix + extend + 1]
            top = max(top, req.sampling_params.prompt_logprobs or 0)
        inputs += range(offset, offset + len(targets))
        target_ids += targets
        counts.append(len(targets))
        offset += extend
    if not target_ids:
        return None
    return PromptTargets(
        inputs=to_device(inputs, device),
        target_ids=to_device(target_ids, device),
        target_ids_cpu=target_ids,
        counts=counts,
        top=top,
    )


def read_top(
    reqs: Sequence[Req], wanted: TopRows | None, top: TokenLogprobs | None
) -> dict[int, Alternatives]:
    """Row → alternatives, for the rows that want any; `top` on the host."""
    if wanted is None or top is None:
        return {}
    found = _alternatives(top)
    return {
        row: found[i][: reqs[row].sampling_params.top_logprobs] for i, row in enumerate(wanted.rows)
    }


def take_prompt_logprobs(
    reqs: Sequence[Req], targets: PromptTargets | None, judged: TokenLogprobs | None
) -> None:
    """Gives each request the prompt tokens that this extend judged; `judged` on the host."""
    for req in reqs:
        if req.wants_prompt_logprobs and not req.prompt_tokens:
            req.prompt_tokens.append(PromptToken(req.origin_input_ids[0], None, ()))
    if targets is None or judged is None:
        return
    ids = targets.target_ids_cpu
    chosen: list[float] = judged.chosen.tolist()
    found = _alternatives(judged)
    start = 0
    for req, count in zip(reqs, targets.counts, strict=True):
        wanted = req.sampling_params.prompt_logprobs or 0
        req.prompt_tokens += [
            PromptToken(ids[i], chosen[i], found[i][:wanted]) for i in range(start, start + count)
        ]
        start += count


def _alternatives(top: TokenLogprobs) -> list[Alternatives]:
    return [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(top.top_ids.tolist(), top.top.tolist(), strict=True)
    ]

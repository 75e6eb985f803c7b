"""Draws one token a request from its logits, without waiting for the device."""

import torch

from engine.execution.forward_batch import ForwardResult, SamplingBatch, TokenLogprobs
from engine.execution.noise import gumbel_noise
from engine.execution.row_sums import row_cumsum, row_logsumexp, row_softmax

_LEAST_TEMPERATURE = 1e-20
"""Divides without overflow to NaN; any smaller temperature draws the same tokens."""


class Sampler:
    """Edits of the logits first; then greedy, or temperature, top-k, top-p, min-p and the
    Gumbel-max draw.

    Order and meaning follow common usage: top-k keeps the k most likely tokens; top-p, over what
    is left and renormalised, keeps the smallest set of most likely tokens whose probability
    reaches p, the token that crosses it included; min-p drops what is less likely than that part
    of the most likely token. Ties go to the lowest token id throughout.

    `deterministic`: a request's token and log probabilities are the same, bit for bit, whatever
    batch it is drawn in.
    """

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def sample(self, logits: torch.Tensor, sampling: SamplingBatch) -> ForwardResult:
        """Tokens for `logits` [b, vocab] float32, which are left unchanged.

        Logprobs are natural logarithms under the softmax of the logits as they are: neither edits,
        temperature nor truncation change them.
        """
        edited = logits
        if sampling.edits is not None:
            edited = sampling.edits.apply(logits, sampling.position)
        tokens = torch.argmax(edited, dim=-1)
        if not sampling.all_greedy:
            drawn = self._draw(edited, sampling)
            tokens = torch.where(sampling.temperature == 0, tokens, drawn)
        logprobs = None
        if sampling.any_logprobs:
            chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
            logprobs = chosen - logsumexp(logits, self._deterministic).squeeze(-1)
        top = None
        if sampling.top is not None:
            rows = sampling.top.rows_on_device
            top = token_logprobs(
                logits.index_select(0, rows),
                tokens.index_select(0, rows),
                sampling.top.count,
                deterministic=self._deterministic,
            )
        return ForwardResult(next_token_ids=tokens, logprobs=logprobs, top=top)

    def _draw(self, logits: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
        temperature = sampling.temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]
        # From the largest down, so that a tiny temperature gives 0 and -inf, never inf - inf.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        unlikely = None
        if sampling.min_p is not None:
            # The largest is 0 here and stays: neither top-k nor top-p drops it.
            unlikely = scaled < sampling.min_p.log()[:, None]
        if sampling.any_top_k or sampling.any_top_p:
            kept = kept_tokens(scaled, sampling, deterministic=self._deterministic)
            scaled = scaled.masked_fill_(~kept, float("-inf"))
        if unlikely is not None:
            scaled = scaled.masked_fill_(unlikely, float("-inf"))
        noise = gumbel_noise(sampling.seed, sampling.position, logits.shape[-1])
        return torch.argmax(scaled.add_(noise), dim=-1)


def kept_tokens(
    scaled: torch.Tensor, sampling: SamplingBatch, *, deterministic: bool = False
) -> torch.Tensor:
    """[b, vocab] bool: what top-k and top-p leave of `scaled` [b, vocab], the logits divided by
    temperature. Never empty."""
    ordered, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.any_top_k:
        ranks = torch.arange(ordered.shape[-1], device=ordered.device)
        top_k = sampling.top_k[:, None]
        kept = (ranks < top_k) | (top_k == 0)
        ordered = ordered.masked_fill(~kept, float("-inf"))
    if sampling.any_top_p:
        if deterministic:
            probabilities = row_softmax(ordered)
            before = row_cumsum(probabilities) - probabilities
        else:
            probabilities = torch.softmax(ordered, dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
        top_p = sampling.top_p[:, None]
        # A p of 1 keeps all, whatever the rounding of the sum; the first token always stays.
        kept = kept & ((before < top_p) | (top_p >= 1.0))
        kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(-1, ids, kept)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int, *, deterministic: bool = False
) -> TokenLogprobs:
    """Log probabilities of `tokens` [n] and of the `count` most likely ones under the softmax of
    `logits` [n, vocab] float32."""
    total = logsumexp(logits, deterministic)
    ids = most_likely(logits, count)
    return TokenLogprobs(
        chosen=(logits.gather(-1, tokens[:, None]) - total).squeeze(-1),
        top_ids=ids,
        top=logits.gather(-1, ids) - total,
    )


def logsumexp(logits: torch.Tensor, deterministic: bool) -> torch.Tensor:
    """[n, 1] for `logits` [n, vocab]."""
    if deterministic:
        return row_logsumexp(logits)
    return torch.logsumexp(logits, dim=-1, keepdim=True)


def most_likely(logits: torch.Tensor, count: int) -> torch.Tensor:
    """[n, count] int64: ids of the largest of `logits` [n, vocab] float32, largest first.

    Ties go to the lowest id, which topk on the logits does not promise: bfloat16 models tie often,
    and the first one named must be the one that greedy draws.
    """
    count = min(count, logits.shape[-1])
    if count == 0:
        return torch.empty(logits.shape[0], 0, dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are a tie
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    ids = torch.arange(logits.shape[-1], device=logits.device)
    keys = (rising.to(torch.int64) << 32) - ids
    return torch.topk(keys, count, dim=-1).indices

"""Draws one token a request from its logits, without waiting for the device."""

import torch

from engine.execution.forward_batch import ForwardResult, SamplingBatch
from engine.execution.noise import gumbel_noise

_LEAST_TEMPERATURE = 1e-20
"""Divides without overflow to NaN; any smaller temperature draws the same tokens."""


class Sampler:
    """Greedy, or temperature, then top-k, then top-p, then the Gumbel-max draw.

    Order and meaning follow common usage: top-k keeps the k most likely tokens; top-p, over what
    is left and renormalised, keeps the smallest set of most likely tokens whose probability
    reaches p, the token that crosses it included. Ties go to the lowest token id throughout.
    """

    def sample(self, logits: torch.Tensor, sampling: SamplingBatch) -> ForwardResult:
        """Tokens for `logits` [b, vocab] float32, which are left unchanged.

        Logprobs are natural logarithms under the softmax of the logits as they are: neither
        temperature nor truncation changes them.
        """
        tokens = torch.argmax(logits, dim=-1)
        if not sampling.all_greedy:
            drawn = self._draw(logits, sampling)
            tokens = torch.where(sampling.temperature == 0, tokens, drawn)
        logprobs = None
        if sampling.any_logprobs:
            chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
            logprobs = chosen - torch.logsumexp(logits, dim=-1)
        return ForwardResult(next_token_ids=tokens, logprobs=logprobs)

    def _draw(self, logits: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
        temperature = sampling.temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]
        # From the largest down, so that a tiny temperature gives 0 and -inf, never inf - inf.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        if sampling.any_top_k or sampling.any_top_p:
            scaled = scaled.masked_fill_(~kept_tokens(scaled, sampling), float("-inf"))
        noise = gumbel_noise(sampling.seed, sampling.position, logits.shape[-1])
        return torch.argmax(scaled.add_(noise), dim=-1)


def kept_tokens(scaled: torch.Tensor, sampling: SamplingBatch) -> torch.Tensor:
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
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        top_p = sampling.top_p[:, None]
        # A p of 1 keeps all, whatever the rounding of the sum; the first token always stays.
        kept = kept & ((before < top_p) | (top_p >= 1.0))
        kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(-1, ids, kept)

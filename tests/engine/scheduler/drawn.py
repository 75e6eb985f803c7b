"""A stub whose tokens are drawn by the real sampler, and the same draws written down plainly.

Logits are a function of all tokens so far, read from the stub's KV; what a request asks of them
(bias, penalties, tokens held back, min-p) is done once by the engine's tensors and once here, token
by token from prompt and output.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

import numpy as np
import torch

from engine.execution.forward_batch import ForwardBatch, ForwardResult
from engine.execution.noise import gumbel_noise
from engine.execution.sampler import Sampler, token_logprobs
from engine.sampling_params import SamplingParams
from engine.scheduler.req import Req
from engine.types import RequestId
from tests.engine.scheduler.stub import CONTEXT, EOS, VOCAB, StubRunner


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """[VOCAB] float32; end of sequence is likely, so that holding it back shows."""
    digest = hashlib.blake2b(bytes(tokens), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    logits = torch.randn(VOCAB, generator=generator) * 2
    logits[EOS] += 2.5
    return logits


class SamplingRunner(StubRunner):
    """Draws as `ModelRunner` does."""

    def draw(self, batch: ForwardBatch, histories: list[list[int]]) -> ForwardResult:
        logits = torch.stack([logits_after(tokens) for tokens in histories])
        result = Sampler().sample(logits, batch.sampling)
        targets = batch.prompt_targets
        if targets is None:
            return result
        assert len(targets.counts) == len(histories)
        inputs = [
            tokens[: position + 1]
            for tokens, prefix, extend in zip(
                histories, batch.extend_prefix_lens, batch.extend_lens, strict=True
            )
            for position in range(prefix, prefix + extend)
        ]
        judges = torch.stack([logits_after(inputs[i]) for i in targets.inputs.tolist()])
        judged = token_logprobs(judges, targets.target_ids, targets.top)
        return with_changes(result, prompt=judged)


@dataclass(frozen=True)
class Wanted:
    """A request that each engine makes for itself."""

    prompt: list[int]
    params: SamplingParams
    rid: str = "r"

    def req(self, prior: Sequence[int] = ()) -> Req:
        return Req(
            RequestId(self.rid),
            self.prompt,
            self.params,
            eos_token_ids=[EOS],
            prior_output_ids=prior,
        )

    def tokens(self) -> list[int]:
        """All outputs."""
        outputs: list[int] = []
        ends = self.params.stop_token_ids | (set() if self.params.ignore_eos else {EOS})
        while True:
            outputs.append(self._draw(outputs))
            if (
                outputs[-1] in ends
                or len(outputs) == self.params.max_new_tokens
                or len(self.prompt) + len(outputs) == CONTEXT
                or self.is_complete(outputs)
            ):
                return outputs

    def is_complete(self, outputs: Sequence[int]) -> bool:
        """Whether a grammar lets nothing follow."""
        return False

    def forbid(self, edited: np.ndarray, outputs: Sequence[int]) -> None:
        """Takes away what a grammar does not allow, in place."""

    def _draw(self, outputs: list[int]) -> int:
        params = self.params
        edited = logits_after(self.prompt + outputs).numpy().copy()
        for token, bias in params.logit_bias.items():
            edited[token] += np.float32(bias)
        penalty = np.float32(params.repetition_penalty)
        for token in {*self.prompt, *outputs}:
            positive = edited[token] > 0
            edited[token] = edited[token] / penalty if positive else edited[token] * penalty
        for token in set(outputs):
            edited[token] -= np.float32(params.presence_penalty)
            edited[token] -= np.float32(params.frequency_penalty) * outputs.count(token)
        if len(outputs) < params.min_tokens:
            edited[[EOS, *params.stop_token_ids]] = -np.inf
        self.forbid(edited, outputs)
        if params.temperature == 0:
            return int(edited.argmax())
        scaled = (edited - edited.max()) / np.float32(params.temperature)
        if params.min_p:
            scaled[np.exp(scaled) < params.min_p] = -np.inf
        position = torch.tensor([len(self.prompt) + len(outputs)])
        noise = gumbel_noise(torch.tensor([params.seed]), position, VOCAB)[0].numpy()
        return int((scaled + noise).argmax())


def wanted(prompt: list[int], *, rid: str = "r", **params: Any) -> Wanted:
    return Wanted(prompt, SamplingParams(**{"max_new_tokens": 12, **params}), rid)

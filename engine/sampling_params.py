"""How a request's tokens are drawn: complete and validated, no default left open."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import InvalidRequestError
from engine.grammar.spec import Grammar

MAX_SEED = 2**64 - 1
MAX_ALTERNATIVES = 20
"""Most likely tokens that may be reported beside a token."""

MAX_LOGIT_BIAS_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request.

    Noise is a function of (seed, absolute position) alone, so the same request draws the same
    tokens in any batch, after a prefix hit, and when it is replayed on another worker.
    """

    max_new_tokens: int
    """Tokens to produce in all, >= 1; tokens of an earlier attempt count."""

    temperature: float = 0.0
    """0 is greedy; finite, >= 0."""

    top_p: float = 1.0
    """Smallest set of most likely tokens whose probability reaches this; 0 < top_p <= 1."""

    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""

    seed: int = 0
    """Unsigned 64-bit; drawn by the router where the client gave none."""

    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the output, besides the model's end-of-sequence tokens."""

    ignore_eos: bool = False
    """Generate past the model's end-of-sequence tokens (stop_token_ids still stop)."""

    logprobs: bool = False
    """Report each produced token's natural-log probability under the unmodified distribution."""

    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one, at the given temperature;
    0 <= min_p <= 1."""

    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens that prompt or output
    hold; finite, > 0."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output holds; -2 to 2."""

    frequency_penalty: float = 0.0
    """Subtracted once for each time the output holds the token; -2 to 2."""

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token id → what is added to its logit, -100 to 100."""

    min_tokens: int = 0
    """No end-of-sequence or stop token is drawn before this many tokens; at most
    max_new_tokens."""

    top_logprobs: int = 0
    """Most likely tokens to report beside each produced one, 0 to 20; above 0 implies logprobs."""

    prompt_logprobs: int | None = None
    """Report the prompt's tokens too, with this many alternatives each (0 to 20); None: do not."""

    grammar: Grammar | None = None
    """What the output must look like; None: anything. Tokens that would leave it are not drawn,
    tokens that end the output only where it is complete."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, not {self.max_new_tokens}")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InvalidRequestError(
                f"temperature must be finite and not negative, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise InvalidRequestError(f"top_k must not be negative, not {self.top_k}")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError(f"seed must be an unsigned 64-bit integer, not {self.seed}")
        self._check_edits()
        for name, count in (
            ("top_logprobs", self.top_logprobs),
            ("prompt_logprobs", self.prompt_logprobs or 0),
        ):
            if not 0 <= count <= MAX_ALTERNATIVES:
                raise InvalidRequestError(f"{name} must be 0 to {MAX_ALTERNATIVES}, not {count}")

    def _check_edits(self) -> None:
        if not 0 <= self.min_p <= 1:
            raise InvalidRequestError(f"min_p must be in [0, 1], not {self.min_p}")
        if not math.isfinite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise InvalidRequestError(
                f"repetition_penalty must be finite and above 0, not {self.repetition_penalty}"
            )
        for name, penalty in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ):
            if not -2 <= penalty <= 2:
                raise InvalidRequestError(f"{name} must be in [-2, 2], not {penalty}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS_TOKENS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries, more than {MAX_LOGIT_BIAS_TOKENS}"
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequestError(
                    f"logit_bias of token {token} must be in [-100, 100], not {bias}"
                )
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise InvalidRequestError(
                f"min_tokens must be 0 to max_tokens ({self.max_new_tokens}), not {self.min_tokens}"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs or self.top_logprobs > 0

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on which tokens were there before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

"""How a request's tokens are drawn: complete and validated, no default left open."""

import math
from dataclasses import dataclass

from engine.errors import InvalidRequestError

MAX_SEED = 2**64 - 1


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

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

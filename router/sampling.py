"""A client's sampling fields: each within its range or refused by name, every default resolved."""

import math
import secrets
from typing import TypedDict

from protos.baton.v1 import worker_pb2
from router.fleet import ModelFacts
from router.request import MAX_INT64, RequestSpec, check_token_ids, invalid

MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS_TOKENS = 1024
MAX_LOGIT_BIAS = 100.0
MAX_ALTERNATIVES = 20
"""Most likely tokens that may be reported beside a token."""
MAX_PROMPT_ALTERNATIVES = 750_000
"""Log probabilities of one prompt; they travel in one message of some 16 bytes for each."""
MAX_UINT64 = 2**64 - 1
SEED_BITS = 53
"""Drawn seeds are integers that every JSON reader keeps exactly."""


class _Range(TypedDict):
    default: float
    low: float
    high: float


PENALTY = _Range(default=0.0, low=-2.0, high=2.0)


def resolve_sampling(
    spec: RequestSpec, *, prompt_tokens: int, model: ModelFacts
) -> worker_pb2.ResolvedSampling:
    """Checks the sampling fields and fills in the defaults.

    Raises:
        BatonError: INVALID_ARGUMENT, naming the field and the bound.
    """
    temperature = 1.0 if spec.temperature is None else spec.temperature
    if not math.isfinite(temperature) or temperature < 0:
        raise invalid(
            f"temperature must be a finite number of at least 0, not {temperature}", "temperature"
        )
    top_p = 1.0 if spec.top_p is None else spec.top_p
    if not 0 < top_p <= 1:
        raise invalid(f"top_p must be above 0 and at most 1, not {top_p}", "top_p")
    top_k = 0 if spec.top_k is None else spec.top_k
    if not 0 <= top_k <= MAX_INT64:
        raise invalid(f"top_k must not be negative nor above 2^63 - 1, not {top_k}", "top_k")
    seed = secrets.randbits(SEED_BITS) if spec.seed is None else spec.seed
    if not 0 <= seed <= MAX_UINT64:
        raise invalid(f"seed must be between 0 and 2^64 - 1, not {seed}", "seed")
    if len(spec.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid(
            f"stop_token_ids has {len(spec.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} "
            "are taken",
            "stop_token_ids",
        )
    check_token_ids(spec.stop_token_ids, model=model, param="stop_token_ids")
    top_logprobs = _alternatives(spec.top_logprobs, "top_logprobs") or 0
    max_tokens = _max_tokens(spec, prompt_tokens=prompt_tokens, model=model)
    return worker_pb2.ResolvedSampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
        stop_token_ids=spec.stop_token_ids,
        ignore_eos=bool(spec.ignore_eos),
        logprobs=bool(spec.logprobs) or top_logprobs > 0,
        min_p=_within(spec.min_p, "min_p", default=0.0, low=0.0, high=1.0),
        repetition_penalty=_repetition_penalty(spec),
        presence_penalty=_within(spec.presence_penalty, "presence_penalty", **PENALTY),
        frequency_penalty=_within(spec.frequency_penalty, "frequency_penalty", **PENALTY),
        logit_bias=_logit_bias(spec, model=model),
        top_logprobs=top_logprobs,
        min_tokens=_min_tokens(spec, max_tokens=max_tokens),
        prompt_logprobs=_prompt_logprobs(spec, prompt_tokens=prompt_tokens),
        grammar=spec.grammar,
    )


def _within(value: float | None, param: str, *, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise invalid(f"{param} must be between {low:g} and {high:g}, not {value}", param)
    return value


def _repetition_penalty(spec: RequestSpec) -> float:
    value = 1.0 if spec.repetition_penalty is None else spec.repetition_penalty
    if not math.isfinite(value) or value <= 0:
        raise invalid(
            f"repetition_penalty must be a finite number above 0, not {value}",
            "repetition_penalty",
        )
    return value


def _logit_bias(spec: RequestSpec, *, model: ModelFacts) -> dict[int, float]:
    bias = dict(spec.logit_bias)
    if len(bias) > MAX_LOGIT_BIAS_TOKENS:
        raise invalid(
            f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS_TOKENS} are taken",
            "logit_bias",
        )
    check_token_ids(list(bias), model=model, param="logit_bias")
    for token_id, value in bias.items():
        if not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:
            raise invalid(
                f"logit_bias of token {token_id} must be between {-MAX_LOGIT_BIAS:g} and "
                f"{MAX_LOGIT_BIAS:g}, not {value}",
                "logit_bias",
            )
    return bias


def _alternatives(value: int | None, param: str) -> int | None:
    if value is not None and not 0 <= value <= MAX_ALTERNATIVES:
        raise invalid(f"{param} must be between 0 and {MAX_ALTERNATIVES}, not {value}", param)
    return value


def _prompt_logprobs(spec: RequestSpec, *, prompt_tokens: int) -> int | None:
    wanted = _alternatives(spec.prompt_logprobs, "prompt_logprobs")
    if wanted is not None and prompt_tokens * (wanted + 1) > MAX_PROMPT_ALTERNATIVES:
        raise invalid(
            f"prompt_logprobs {wanted} of {prompt_tokens} prompt tokens are more than the "
            f"{MAX_PROMPT_ALTERNATIVES} values that one answer carries; ask for fewer alternatives",
            "prompt_logprobs",
        )
    return wanted


def _min_tokens(spec: RequestSpec, *, max_tokens: int) -> int:
    value = 0 if spec.min_tokens is None else spec.min_tokens
    if not 0 <= value <= max_tokens:
        raise invalid(
            f"min_tokens must be between 0 and max_tokens, which is {max_tokens}, not {value}",
            "min_tokens",
        )
    return value


def _max_tokens(spec: RequestSpec, *, prompt_tokens: int, model: ModelFacts) -> int:
    memory, role = model.memory_for(prompt_tokens)
    bounds = [
        (limit - prompt_tokens, what)
        for limit, what in (
            (model.context_length, f"the model's context of {model.context_length} tokens"),
            (memory, f"the {memory} tokens that the memory of an empty {role} worker holds"),
        )
        if limit
    ]
    room, what = min(bounds, default=(MAX_INT64, "every bound"))
    if spec.max_tokens is None:
        return room if spec.default_max_tokens is None else min(room, spec.default_max_tokens)
    if spec.max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, not {spec.max_tokens}", "max_tokens")
    if spec.max_tokens > room:
        raise invalid(
            f"the prompt's {prompt_tokens} tokens and max_tokens {spec.max_tokens} together exceed "
            f"{what}; ask for at most {room}",
            "max_tokens",
        )
    return spec.max_tokens

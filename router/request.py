"""What a client asked for, checked, with every default resolved."""

import math
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from protos.baton.v1 import worker_pb2
from protos.errors import BatonError, ErrorCode
from router.fleet import ModelFacts

MAX_REQUEST_ID_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_UINT64 = 2**64 - 1
MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1
SEED_BITS = 53
"""Drawn seeds are integers that every JSON reader keeps exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """A request as a door understood it. None means that the client did not say."""

    prompt: str | Sequence[int]
    request_id: str = ""
    model: str = ""
    temperature: float | None = None
    """Absent: 1."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    """Absent: what fits."""
    default_max_tokens: int | None = None
    """For a door with a default of its own: used where max_tokens is absent, as far as it fits."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    priority: int = 0
    timeout_s: float | None = None
    """The client's own deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request that may be sent to workers."""

    request_id: str
    model: str
    prompt_ids: list[int]
    sampling: worker_pb2.ResolvedSampling
    priority: int
    arrived_at: float
    """Seconds, monotonic."""
    deadline: float
    """Seconds, monotonic."""

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    @property
    def total_tokens(self) -> int:
        """The longest that prompt and output can become."""
        return len(self.prompt_ids) + self.max_tokens


def check_request_id(request_id: str) -> str:
    """The id, or a drawn one for an empty one."""
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise _invalid(
            f"request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARACTERS} "
            "are taken",
            "request_id",
        )
    return request_id or uuid.uuid4().hex


def resolve_sampling(
    spec: RequestSpec, *, prompt_tokens: int, model: ModelFacts
) -> worker_pb2.ResolvedSampling:
    """Checks the sampling fields and fills in the defaults.

    Raises:
        BatonError: INVALID_ARGUMENT, naming the field and the bound.
    """
    temperature = 1.0 if spec.temperature is None else spec.temperature
    if not math.isfinite(temperature) or temperature < 0:
        raise _invalid(
            f"temperature must be a finite number of at least 0, not {temperature}", "temperature"
        )
    top_p = 1.0 if spec.top_p is None else spec.top_p
    if not 0 < top_p <= 1:
        raise _invalid(f"top_p must be above 0 and at most 1, not {top_p}", "top_p")
    top_k = 0 if spec.top_k is None else spec.top_k
    if not 0 <= top_k <= MAX_INT64:
        raise _invalid(f"top_k must not be negative nor above 2^63 - 1, not {top_k}", "top_k")
    seed = secrets.randbits(SEED_BITS) if spec.seed is None else spec.seed
    if not 0 <= seed <= MAX_UINT64:
        raise _invalid(f"seed must be between 0 and 2^64 - 1, not {seed}", "seed")
    if len(spec.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid(
            f"stop_token_ids has {len(spec.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} "
            "are taken",
            "stop_token_ids",
        )
    check_token_ids(spec.stop_token_ids, model=model, param="stop_token_ids")
    return worker_pb2.ResolvedSampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=_max_tokens(spec, prompt_tokens=prompt_tokens, model=model),
        stop_token_ids=spec.stop_token_ids,
        ignore_eos=bool(spec.ignore_eos),
        logprobs=bool(spec.logprobs),
    )


def check_priority(priority: int) -> int:
    if not MIN_INT64 <= priority <= MAX_INT64:
        raise _invalid(f"priority must fit 64 bits, not {priority}", "priority")
    return priority


def check_prompt(ids: Sequence[int], *, model: ModelFacts) -> None:
    """Raises BatonError (INVALID_ARGUMENT) for a prompt that can never be served."""
    if not ids:
        raise _invalid("the prompt is empty: send at least one token", "prompt")
    check_token_ids(ids, model=model, param="prompt")
    if model.context_length and len(ids) >= model.context_length:
        raise _invalid(
            f"the prompt has {len(ids)} tokens; the model's context of {model.context_length} "
            "must also hold one token of output",
            "prompt",
        )
    for limit, name in (
        (model.prefill_capacity_tokens, "prefill"),
        (model.decode_capacity_tokens, "decode"),
    ):
        if limit and len(ids) + 1 > limit:
            raise _invalid(
                f"the prompt has {len(ids)} tokens; with one token of output it exceeds the "
                f"{limit} tokens that the memory of an empty {name} worker holds",
                "prompt",
            )


def check_token_ids(ids: Sequence[int], *, model: ModelFacts, param: str) -> None:
    """Raises BatonError (INVALID_ARGUMENT) unless each is an id of the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= model.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise _invalid(
            f"{param} contains token id {wrong}; ids of this model are 0 to {model.vocab_size - 1}",
            param,
        )


def _max_tokens(spec: RequestSpec, *, prompt_tokens: int, model: ModelFacts) -> int:
    bounds = [
        (limit - prompt_tokens, what)
        for limit, what in (
            (model.context_length, f"the model's context of {model.context_length} tokens"),
            (
                model.decode_capacity_tokens,
                f"the {model.decode_capacity_tokens} tokens that the memory of an empty decode "
                "worker holds",
            ),
        )
        if limit
    ]
    room, what = min(bounds, default=(MAX_INT64, "every bound"))
    if spec.max_tokens is None:
        return room if spec.default_max_tokens is None else min(room, spec.default_max_tokens)
    if spec.max_tokens < 1:
        raise _invalid(f"max_tokens must be at least 1, not {spec.max_tokens}", "max_tokens")
    if spec.max_tokens > room:
        raise _invalid(
            f"the prompt's {prompt_tokens} tokens and max_tokens {spec.max_tokens} together exceed "
            f"{what}; ask for at most {room}",
            "max_tokens",
        )
    return spec.max_tokens


def _invalid(message: str, param: str) -> BatonError:
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param=param)

"""What a client asked for, checked, with every default resolved."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.errors import BatonError, ErrorCode
from router.callers import ANYBODY, Caller
from router.fleet import ModelFacts

MAX_REQUEST_ID_CHARACTERS = 256
MAX_CACHE_SALT_CHARACTERS = 256
MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What a door knows of a request besides what it asks for."""

    at: float = field(default_factory=time.monotonic)
    """When all of it was here: time.monotonic() seconds. Its time to first token counts from
    then."""
    request_id: str = ""
    """The client's name of it, where its protocol has a place for one beside the request."""
    operation: str = "text_completion"
    """As OpenTelemetry's GenAI conventions call it."""
    traceparent: str = ""
    """W3C trace context of the client, checked; empty: none."""


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
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → what is added to its logit."""
    top_logprobs: int | None = None
    """Above 0 it implies logprobs."""
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    """Absent: none; 0: of the prompt's own tokens, without alternatives."""
    cache_salt: str = ""
    grammar: inference_pb2.Grammar | None = None
    """What the output must look like; its size and form are checked."""
    stop: Sequence[str] = ()
    """Texts that end the output; found by the router."""
    skip_special_tokens: bool | None = None
    """Absent: true."""
    whole: bool = False
    """Nobody looks at the output before its end."""
    priority: int = 0
    timeout_s: float | None = None
    """The client's own deadline."""
    arrival: Arrival = field(default_factory=Arrival)
    caller: Caller = ANYBODY
    """Whose request it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request that may be sent to workers."""

    request_id: str
    model: str
    prompt_ids: list[int]
    sampling: worker_pb2.ResolvedSampling
    priority: int
    cache_salt: str
    caller: Caller = ANYBODY
    """Whose it is."""
    arrived_at: float
    """Seconds, monotonic."""
    deadline: float
    """Seconds, monotonic."""
    stop: tuple[str, ...] = ()
    """Texts that end the output."""
    skip_special_tokens: bool = True
    """Special tokens have no text."""
    whole: bool = False
    """Tokens leave together, at the end, as far as the bound on waiting ones allows."""
    traceparent: str = ""
    """W3C trace context that workers are told; empty: none."""

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
        raise invalid(
            f"request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_CHARACTERS} "
            "are taken",
            "request_id",
        )
    return request_id or uuid.uuid4().hex


def check_priority(priority: int) -> int:
    if not MIN_INT64 <= priority <= MAX_INT64:
        raise invalid(f"priority must fit 64 bits, not {priority}", "priority")
    return priority


def check_cache_salt(salt: str) -> str:
    if len(salt) > MAX_CACHE_SALT_CHARACTERS:
        raise invalid(
            f"cache_salt has {len(salt)} characters; at most {MAX_CACHE_SALT_CHARACTERS} are taken",
            "cache_salt",
        )
    try:
        salt.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"cache_salt is no text: {error.reason}", "cache_salt") from error
    return salt


def check_prompt(ids: Sequence[int], *, model: ModelFacts) -> None:
    """Raises BatonError (INVALID_ARGUMENT) for a prompt that can never be served."""
    if not ids:
        raise invalid("the prompt is empty: send at least one token", "prompt")
    check_token_ids(ids, model=model, param="prompt")
    if model.context_length and len(ids) >= model.context_length:
        raise invalid(
            f"the prompt has {len(ids)} tokens; the model's context of {model.context_length} "
            "must also hold one token of output",
            "prompt",
        )
    if len(ids) + 1 <= model.unified_capacity_tokens:
        return
    limits = [(model.prefill_capacity_tokens, "prefill"), (model.decode_capacity_tokens, "decode")]
    if not any(limit for limit, _ in limits):
        limits = [(model.unified_capacity_tokens, "unified")]
    for limit, name in limits:
        if limit and len(ids) + 1 > limit:
            raise invalid(
                f"the prompt has {len(ids)} tokens; with one token of output it exceeds the "
                f"{limit} tokens that the memory of an empty {name} worker holds",
                "prompt",
            )


def check_token_ids(ids: Sequence[int], *, model: ModelFacts, param: str) -> None:
    """Raises BatonError (INVALID_ARGUMENT) unless each is an id of the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= model.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise invalid(
            f"{param} contains token id {wrong}; ids of this model are 0 to {model.vocab_size - 1}",
            param,
        )


def invalid(message: str, param: str) -> BatonError:
    """The client's error, naming the field at fault."""
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param=param)

"""What POST /v1/completions takes. Each field is honoured or refused by name, none is ignored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from protos.errors import BatonError, ErrorCode
from router.request import RequestSpec

DEFAULT_MAX_TOKENS = 16
"""OpenAI's for this endpoint."""


def _only(*values: object) -> Any:
    return WithJsonSchema({"enum": [*values, None], "default": None})


PROMPT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "maxItems": 1,
                "minItems": 1,
            },
            {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "minItems": 1,
                },
                "maxItems": 1,
                "minItems": 1,
            },
        ]
    }
)


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(
        default=None, description="Send a chunk with the usage of the whole request at the end."
    )


class CompletionRequest(BaseModel):
    """A request for one completion of one prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(default=None, description="Absent: the model served.")
    prompt: Annotated[Any, PROMPT_SCHEMA] = Field(
        description="Text, token ids, or a list of exactly one of these."
    )
    max_tokens: int | None = Field(
        default=None, json_schema_extra={"minimum": 1}, description="Absent: 16."
    )
    temperature: float | None = Field(
        default=None, json_schema_extra={"minimum": 0}, description="0 is greedy. Absent: 1."
    )
    top_p: float | None = Field(
        default=None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1}
    )
    top_k: int | None = Field(
        default=None,
        json_schema_extra={"minimum": 0},
        description="Number of most likely tokens kept; 0 keeps all.",
    )
    seed: int | None = Field(
        default=None,
        json_schema_extra={"minimum": 0, "maximum": 2**64 - 1},
        description="Absent: drawn, and told in the answer's `baton` object.",
    )
    stop_token_ids: list[int] | None = Field(
        default=None, description="Tokens that end the output, besides the model's own."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Generate past the end-of-sequence token."
    )
    logprobs: int | None = Field(
        default=None,
        json_schema_extra={"minimum": 0, "maximum": 1},
        description="0: the produced token's log probability. 1: with temperature 0 only, where "
        "the produced token is the most likely one.",
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(
        default=None, description="Add `token_ids` to each choice."
    )
    priority: int | None = Field(
        default=None, description="Smaller is more important; 0 is normal."
    )
    user: str | None = Field(default=None, description="Logged with the request.")
    n: Annotated[Any, _only(1)] = None
    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    stop: Annotated[Any, _only([])] = None
    suffix: Annotated[Any, _only("")] = None


NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "stop": ([],),
    "suffix": ("",),
}
"""Fields that are not supported, and the values at which they ask for nothing."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A checked request, and how its answer should look."""

    spec: RequestSpec
    stream: bool
    include_usage: bool
    logprobs: int | None
    return_token_ids: bool
    user: str


def parse(body: dict[str, Any]) -> Completion:
    """Raises BatonError (INVALID_ARGUMENT) naming the field at fault."""
    try:
        request = CompletionRequest.model_validate(body)
    except ValidationError as error:
        raise _field_error(error) from None
    for name, values in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise _invalid(
                f"{name} is not supported: leave it out or send {json.dumps(values[0])}", name
            )
    stream = bool(request.stream)
    if request.stream_options is not None and not stream:
        raise _invalid("stream_options is only allowed with stream: true", "stream_options")
    return Completion(
        spec=RequestSpec(
            prompt=_prompt(request.prompt),
            model=request.model or "",
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            max_tokens=request.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            stop_token_ids=request.stop_token_ids or (),
            ignore_eos=request.ignore_eos,
            logprobs=_logprobs(request) is not None,
            priority=request.priority or 0,
        ),
        stream=stream,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        logprobs=request.logprobs,
        return_token_ids=bool(request.return_token_ids),
        user=request.user or "",
    )


def _prompt(prompt: Any) -> str | Sequence[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise _invalid("prompt must be a string or a list of token ids", "prompt")
    for token_id in prompt:
        # bool is an int to Python, and 1.0 equals 1; neither is a token id.
        if type(token_id) is not int:
            if isinstance(token_id, (str, list)):
                raise _invalid("prompt must hold one prompt; send one request for each", "prompt")
            raise _invalid(f"prompt must hold integer token ids, not {token_id!r}", "prompt")
    return prompt


def _logprobs(request: CompletionRequest) -> int | None:
    wanted = request.logprobs
    if wanted is None:
        return None
    if wanted < 0 or wanted > 1:
        raise _invalid(
            f"logprobs {wanted} is not supported: 0 gives the produced token's", "logprobs"
        )
    if wanted == 1 and request.temperature != 0:
        raise _invalid(
            "logprobs 1 is supported with temperature 0 only: 0 gives the produced token's",
            "logprobs",
        )
    return wanted


def _field_error(error: ValidationError) -> BatonError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _invalid(f"unrecognized request argument: {param}", param)
    if first["type"] == "missing":
        return _invalid(f"you must provide {param}", param)
    return _invalid(f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}", param)


def _invalid(message: str, param: str) -> BatonError:
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param=param)

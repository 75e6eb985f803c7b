"""What the fields of request bodies are made of, and those that both generating doors take.

Each field is honoured or refused by name, none is ignored. Bodies are read strictly: a string is no
number, and 1 is no boolean.
"""

import copy
import json
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from protos.errors import BatonError, ErrorCode
from router.http.response_format import GrammarText, ResponseFormat, grammar_of
from router.request import RequestSpec
from router.sampling import MAX_UINT64
from router.stop_strings import MAX_STOP_CHARACTERS, check_stop

MAX_STOP = 4
"""Stop strings, as OpenAI takes them."""
MAX_CHOICES = 128
"""Choices of one request, over all its prompts."""

M = TypeVar("M", bound=BaseModel)


def refuse(why: str) -> NoReturn:
    """For validators: the field is named by where it stands."""
    raise PydanticCustomError("refused", "{why}", {"why": why})


class Only:
    """Marks a field that is not supported: it may be absent, null or ask for nothing."""

    def __init__(self, *values: object) -> None:
        """Args: values that ask for nothing."""
        self._values = values

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self._values, None]}

    def _check(self, value: Any) -> Any:
        if value is None or any(value == v and type(value) is type(v) for v in self._values):
            return value
        accepted = f" or send {json.dumps(self._values[0])}" if self._values else ""
        refuse(f"is not supported: leave it out{accepted}")


def _stop(value: Any) -> Any:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        refuse("must be a string or a list of strings")
    try:
        return check_stop(texts, most=MAX_STOP)
    except BatonError as error:
        refuse(error.message.removeprefix("stop "))  # which the field's name becomes again


def _logit_bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        refuse("must be an object: token ids as keys, numbers as values")
    bias: dict[int, float] = {}
    for key, number in value.items():
        # str.isdigit alone takes digits that int() does not.
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(MAX_UINT64))):
            refuse(f"has a key that is no token id: {key[:40]!r}")
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            refuse(f"of token {key} must be a number")
        bias[int(key)] = number
    return bias


STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
Stop = Annotated[
    Any,
    AfterValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                STOP_TEXT,
                {"type": "array", "items": STOP_TEXT, "maxItems": MAX_STOP},
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    Any,
    AfterValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,20}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]


class Strict(BaseModel):
    """A body, or a part of one, that knows all its fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AsSent(Strict):
    """A part that templates see in the very form in which the client sent it: they may show it as
    JSON, where the order of keys counts.
    """

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(value)
        made._sent = value
        return made

    @property
    def sent(self) -> dict[str, Any]:
        """A copy of what the client sent."""
        return copy.deepcopy(self._sent)


def number(
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    description: str = "",
) -> Any:
    """An optional field with the range that the document shows; the router checks it."""
    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    shown: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    return Field(default=None, json_schema_extra=shown, description=description)


def flag(description: str) -> Any:
    return Field(default=None, description=description)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = flag("Send a chunk with the usage of the whole request at the end")
    include_obfuscation: Annotated[Any, Only(False)] = Field(
        default=None, description="Padding is not sent."
    )


class GenerationFields(Strict):
    """What completions and chat completions have in common."""

    model: str | None = Field(default=None, description="Absent: the model served.")
    n: int | None = number(low=1, high=MAX_CHOICES, description="Choices for each prompt.")
    temperature: float | None = number(low=0, description="0 is greedy. Absent: 1.")
    top_p: float | None = number(above=0, high=1)
    top_k: int | None = number(low=0, description="Most likely tokens kept; 0 keeps all.")
    min_p: float | None = number(
        low=0, high=1, description="Drop tokens less likely than this times the most likely one."
    )
    presence_penalty: float | None = number(low=-2, high=2)
    frequency_penalty: float | None = number(low=-2, high=2)
    repetition_penalty: float | None = number(above=0)
    logit_bias: LogitBias = Field(default=None, description="Token id to what its logit gains.")
    seed: int | None = number(
        low=0,
        high=MAX_UINT64,
        description="Choice i of a prompt draws with seed + i. Absent: drawn, and told in `baton`.",
    )
    stop: Stop = Field(
        default=None, description="Up to 4 texts that end the output; they are no part of it."
    )
    stop_token_ids: list[int] | None = Field(
        default=None, description="Tokens that end the output, besides the model's own."
    )
    ignore_eos: bool | None = flag("Generate past the end-of-sequence token.")
    min_tokens: int | None = number(
        low=0, description="Neither a token nor a text ends the output before this many tokens."
    )
    skip_special_tokens: bool | None = flag("Leave special tokens out of the text. Absent: true.")
    response_format: ResponseFormat | None = Field(
        default=None, description="What the output looks like; what would break it is not drawn."
    )
    regex: GrammarText = Field(
        default=None, description="A regular expression that the whole output matches."
    )
    ebnf: GrammarText = Field(
        default=None, description="A grammar `root ::= ...` that the output belongs to."
    )
    stream: bool | None = flag("Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = flag("Add `token_ids` to each choice.")
    priority: int | None = Field(
        default=None,
        description="Smaller is more important; 0 is normal. Counts where the workers run with "
        "--enable-priority-scheduling.",
    )
    cache_salt: str | None = Field(
        default=None, description="Cached prefixes are shared only with requests of the same salt."
    )
    user: str | None = Field(default=None, description="Logged with the request, at level debug.")

    def spec(self, **fields: Any) -> RequestSpec:
        """The request for one choice, as the router takes it.

        Args:
            fields: what the two doors say in their own ways: prompt, max_tokens, log probabilities.

        Raises:
            BatonError: INVALID_ARGUMENT; fields that contradict one another.
        """
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed with stream: true", "stream_options")
        return RequestSpec(
            model=self.model or "",
            whole=not self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            grammar=grammar_of(self.response_format, regex=self.regex, ebnf=self.ebnf),
            **fields,
        )

    def choices(self, *, prompts: int = 1) -> int:
        """Choices for each prompt.

        Raises:
            BatonError: INVALID_ARGUMENT; none, or too many.
        """
        n = 1 if self.n is None else self.n
        if n < 1:
            raise invalid(f"n must be at least 1, not {n}", "n")
        if n * prompts > MAX_CHOICES:
            raise invalid(
                f"n {n} for {prompts} prompts makes {n * prompts} choices; at most {MAX_CHOICES} "
                "are taken",
                "n",
            )
        return n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def read_fields(model: type[M], body: dict[str, Any], *, tags: Sequence[str] = ()) -> M:
    """The body as that model.

    Args:
        model: what is expected.
        body: parsed JSON.
        tags: names of alternatives, which are no part of a field's path.

    Raises:
        BatonError: INVALID_ARGUMENT, naming the field at fault.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _field_error(error, tags) from None


def _field_error(error: ValidationError, tags: Sequence[str]) -> BatonError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = first["loc"]
    # An alternative's name follows its place in a list; elsewhere it is a field: `user` is both.
    param = ".".join(
        str(part)
        for before, part in zip((None, *place), place, strict=False)
        if not (part in tags and isinstance(before, int))
    )
    kind, message = first["type"], first["msg"]
    if kind == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {param}", param)
    if kind == "missing":
        return invalid(f"you must provide {param}", param)
    if kind == "refused":
        return invalid(f"{param} {message}", param)
    return invalid(f"{param}: {message[0].lower()}{message[1:]}", param)


def invalid(message: str, param: str) -> BatonError:
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param=param)

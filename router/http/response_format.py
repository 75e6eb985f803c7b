"""What the answer must look like: OpenAI's `response_format`, and `regex` and `ebnf` beside it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from protos.baton.v1 import inference_pb2
from router.grammar import JSON_OBJECT, GrammarKind, make_grammar, schema_text
from router.request import invalid

NAME_PATTERN = r"^[a-zA-Z0-9_\-]{1,64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _schema(value: Any) -> Any:
    if value is False:
        raise PydanticCustomError("refused", "{why}", {"why": "allows nothing: false"})
    if value is not None and value is not True and not isinstance(value, dict):
        raise PydanticCustomError("refused", "{why}", {"why": "must be an object, or true"})
    return value


class JsonSchemaFormat(_Part):
    """A JSON schema and its name."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(
        description="The client's own name for it. No effect: not shown to the model."
    )
    description: str | None = Field(default=None, description="No effect: not shown to the model.")
    schema_: Annotated[
        Any,
        AfterValidator(_schema),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"const": True}, {"type": "null"}]}),
    ] = Field(default=None, alias="schema", description="Absent: any JSON object.")
    strict: bool | None = Field(
        default=None, description="No effect: the answer is always held to the schema."
    )


class ResponseFormat(_Part):
    """The answer's form."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text: any; json_object: any JSON object; json_schema: as json_schema says."
    )
    json_schema: JsonSchemaFormat | None = Field(
        default=None, description="With type json_schema, and only then."
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "refused",
                "{why}",
                {"why": "needs json_schema with the type json_schema, and only with that"},
            )
        return self


def _checked_text(value: str | None) -> str | None:
    if value == "":
        raise PydanticCustomError("refused", "{why}", {"why": "is empty: leave it out"})
    return value


GrammarText = Annotated[str | None, AfterValidator(_checked_text)]


def grammar_of(
    response_format: ResponseFormat | None, *, regex: str | None, ebnf: str | None
) -> inference_pb2.Grammar | None:
    """The one grammar that a body asks for, if any.

    Raises:
        BatonError: INVALID_ARGUMENT; several, or one of a wrong form.
    """
    asked: list[tuple[str, GrammarKind, str]] = []
    if response_format is not None and response_format.type != "text":
        schema = response_format.json_schema.schema_ if response_format.json_schema else None
        text = JSON_OBJECT
        if isinstance(schema, dict):
            text = schema_text(schema, param="response_format")
        elif schema is True:
            text = "true"
        asked.append(("response_format", "json_schema", text))
    if regex is not None:
        asked.append(("regex", "regex", regex))
    if ebnf is not None:
        asked.append(("ebnf", "ebnf", ebnf))
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(param for param, _, _ in asked)
        raise invalid(f"{names} exclude one another: send one of them", asked[1][0])
    param, kind, text = asked[0]
    return make_grammar(kind, text, param=param)

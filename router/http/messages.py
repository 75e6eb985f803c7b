"""Messages of a chat, and the form in which a template takes them."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from router.chat_template import ChatTemplate, Message
from router.http.fields import AsSent, Only, Strict, invalid, refuse

PART_SEPARATOR = "\n"
"""Between the text parts of a message, for templates that only know strings."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


def _content(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        refuse("must be a string or a list of text parts")
    for part in value:
        if not isinstance(part, dict):
            refuse("must hold objects with type and text")
        kind = part.get("type")
        if kind != "text":
            refuse(f"of type {str(kind)[:40]!r} is not supported: this model reads text")
        if not isinstance(part.get("text"), str):
            refuse("has a text part without text")
        for name in part.keys() - {"type", "text"}:
            refuse(f"has a text part with an unrecognized field: {name[:40]}")
    return value


def _needed(value: Any) -> Any:
    if value is None:
        refuse("must be a string or a list of text parts")
    return value


_TEXT_OR_PARTS = [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]
Content = Annotated[
    Any,
    AfterValidator(_content),
    AfterValidator(_needed),
    WithJsonSchema({"anyOf": _TEXT_OR_PARTS}),
]
OptionalContent = Annotated[
    Any,
    AfterValidator(_content),
    WithJsonSchema({"anyOf": [*_TEXT_OR_PARTS, {"type": "null"}]}),
]


class SystemMessage(AsSent):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(AsSent):
    """Instructions, by their newer name: templates that do not know it see a system message."""

    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(AsSent):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


def _arguments(value: str) -> str:
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        refuse("must be a JSON object as text")
    return value


class FunctionCall(Strict):
    """A call that the model made."""

    name: str
    arguments: Annotated[
        str,
        AfterValidator(_arguments),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
    ] = Field(description="A JSON object as text.")


class ToolCall(Strict):
    """A call of a tool that the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(AsSent):
    """What the model said, or is to continue."""

    role: Literal["assistant"]
    content: OptionalContent = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None


class ToolMessage(AsSent):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]
MESSAGE_TAGS = ("system", "developer", "user", "assistant", "tool")


def for_template(messages: list[ChatMessage], template: ChatTemplate) -> list[Message]:
    """Messages in the form that this template reads.

    Raises:
        BatonError: INVALID_ARGUMENT; an assistant's message says nothing.
    """
    return [
        _for_template(message, template, param=f"messages.{place}")
        for place, message in enumerate(messages)
    ]


def _for_template(message: ChatMessage, template: ChatTemplate, *, param: str) -> Message:
    made: Message = {name: value for name, value in message.sent.items() if value is not None}
    made.pop("annotations", None)  # there are none
    content = made.get("content")
    if content is None and not made.get("tool_calls"):
        raise invalid(f"{param} must have content or tool_calls", param)
    if isinstance(content, list) and not template.reads_parts:
        made["content"] = PART_SEPARATOR.join(part["text"] for part in content)
    if made["role"] == "developer" and not template.mentions("developer"):
        made["role"] = "system"
    for call in made.get("tool_calls", ()):
        # Templates write arguments as JSON themselves.
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    if "reasoning_content" in made:
        made["thinking"] = made["reasoning_content"]  # what some templates call it
    return made

"""What each field of a request does, by the served document's names (test_every_field.py)."""

from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ m.role }},{{ m.name }},{{ (m.tool_calls or []) | tojson }},{{ m.tool_call_id }},"
    "{{ m.reasoning_content }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ mood }}{% endif %}"
)
"""Shows all that a message may hold."""


@dataclass(frozen=True)
class Effect:
    """The field, added to a body, changes the answer, what the workers are asked, or a log line."""

    value: Any
    beside: Body = field(default_factory=dict)
    """What the body holds with and without the field."""


@dataclass(frozen=True)
class Refusal:
    """The field is refused by its name."""

    value: Any
    beside: Body = field(default_factory=dict)


@dataclass(frozen=True)
class Nothing:
    """The field has no effect, and the document says so."""

    value: Any
    beside: Body = field(default_factory=dict)


Account = Effect | Refusal | Nothing

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"name": "n", "schema": {"type": "object", "maxProperties": 1}}
AS_SCHEMA = {"type": "json_schema", "json_schema": SCHEMA}

GENERATION: dict[str, Account] = {
    "model": Effect("another"),
    "n": Effect(2),
    "temperature": Effect(0.5),
    "top_p": Effect(0.5),
    "top_k": Effect(3),
    "min_p": Effect(0.5),
    "presence_penalty": Effect(1),
    "frequency_penalty": Effect(1),
    "repetition_penalty": Effect(2),
    "logit_bias": Effect({"3": 4}),
    "seed": Effect(77),
    "stop": Effect("b"),
    "stop_token_ids": Effect([7]),
    "ignore_eos": Effect(True),
    "min_tokens": Effect(2),
    "skip_special_tokens": Effect(False),
    "response_format": Effect({"type": "json_object"}),
    "regex": Effect("a"),
    "ebnf": Effect('root ::= "a"'),
    "stream": Effect(True),
    "stream_options": Effect({"include_usage": True}, {"stream": True}),
    "return_token_ids": Effect(True),
    "priority": Effect(9),
    "cache_salt": Effect("s"),
    "user": Effect("somebody"),
}
TEMPLATED: dict[str, Account] = {
    "messages": Effect([{"role": "user", "content": "yes"}]),
    "tools": Effect([TOOL]),
    "add_generation_prompt": Effect(False),
    "continue_final_message": Effect(True),
    "chat_template_kwargs": Effect({"mood": "!"}),
}
FIELDS: dict[str, dict[str, Account]] = {
    "CompletionRequest": GENERATION
    | {
        "prompt": Effect([4, 5]),
        "max_tokens": Effect(5),
        "echo": Effect(True),
        "logprobs": Effect(3),
        "best_of": Refusal(7),
        "suffix": Refusal("!"),
    },
    "ChatRequest": GENERATION
    | TEMPLATED
    | {
        "max_completion_tokens": Effect(5, {"max_tokens": None}),
        "max_tokens": Effect(5),
        "logprobs": Effect(True),
        "top_logprobs": Effect(2, {"logprobs": True}),
        "tool_choice": Effect("none", {"tools": [TOOL]}),
        "parallel_tool_calls": Nothing(False),
        "prompt_cache_key": Nothing("k"),
        "safety_identifier": Effect("somebody"),
        "modalities": Refusal(["audio"]),
        "audio": Refusal({"voice": "x"}),
        "prediction": Refusal({"type": "content", "content": "x"}),
        "reasoning_effort": Refusal("high"),
        "verbosity": Refusal("low"),
        "web_search_options": Refusal({}),
        "functions": Refusal([]),
        "function_call": Refusal("auto"),
        "store": Refusal(True),
        "metadata": Refusal({"a": "b"}),
        "service_tier": Refusal("flex"),
    },
    "TokenizePrompt": {
        "model": Effect("another"),
        "prompt": Effect("other"),
        "add_special_tokens": Effect(False),
        "return_token_strs": Effect(True),
    },
    "TokenizeMessages": TEMPLATED
    | {
        "model": Effect("another"),
        "add_special_tokens": Effect(True),
        "return_token_strs": Effect(True),
    },
    "DetokenizeRequest": {"model": Effect("another"), "tokens": Effect([9])},
    "StreamOptions": {"include_usage": Effect(True), "include_obfuscation": Refusal(True)},
    "ResponseFormat": {"type": Effect("json_object"), "json_schema": Effect(SCHEMA)},
    "JsonSchemaFormat": {
        "name": Nothing("other"),
        "description": Nothing("a ball"),
        "schema": Effect({"type": "object", "minProperties": 1}),
        "strict": Nothing(True),
    },
    "Tool": {"type": Refusal("retrieval"), "function": Effect({"name": "g"})},
    "FunctionDefinition": {
        "name": Effect("g"),
        "description": Effect("what it does"),
        "parameters": Effect({"type": "object"}),
        "strict": Refusal(True),
    },
    "SystemMessage": {
        "role": Effect("user"),
        "content": Effect("yes"),
        "name": Effect("me"),
    },
    "DeveloperMessage": {
        "role": Effect("user"),
        "content": Effect("yes"),
        "name": Effect("me"),
    },
    "UserMessage": {"role": Effect("system"), "content": Effect("yes"), "name": Effect("me")},
    "UserMessage.content": {"type": Refusal("image_url"), "text": Effect("yes")},
    "AssistantMessage": {
        "role": Effect("user"),
        "content": Effect("yes"),
        "name": Effect("me"),
        "tool_calls": Effect([CALL]),
        "reasoning_content": Effect("hm"),
        "refusal": Refusal("no"),
        "annotations": Refusal([{"type": "url_citation"}]),
        "audio": Refusal({"id": "1"}),
        "function_call": Refusal({"name": "f", "arguments": "{}"}),
    },
    "ToolMessage": {
        "role": Refusal("function"),
        "content": Effect("yes"),
        "tool_call_id": Effect("2"),
        "name": Effect("me"),
    },
    "ToolCall": {
        "id": Effect("2"),
        "type": Refusal("other"),
        "function": Effect({"name": "g", "arguments": "{}"}),
    },
    "FunctionCall": {"name": Effect("g"), "arguments": Effect('{"a": 2}')},
}
FIELDS |= {
    f"{role}.content": FIELDS["UserMessage.content"]
    for role in ("SystemMessage", "DeveloperMessage", "AssistantMessage", "ToolMessage")
}
"""By the name of the schema, or of the field whose objects have no name of their own."""

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
COMPLETE: Body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": 1}
SAY: Body = {"messages": [USER], "max_tokens": 4, "seed": 1}


def say(*messages: Body) -> Body:
    return {**SAY, "messages": [*messages]}


def with_tool(tool: Body) -> Body:
    return {**SAY, "tools": [tool]}


def with_call(call: Body) -> Body:
    return say(USER, {"role": "assistant", "tool_calls": [call]})


def with_parts(role: str, more: Body | None = None) -> tuple[Body, Any]:
    """A text part in the content of a message of that role."""
    said = {"role": role, **(more or {})}
    return {"type": "text", "text": "hi"}, lambda part: say({**said, "content": [part]})


PLACES: dict[str, tuple[str, Body, Any]] = {
    "CompletionRequest": (COMPLETION, COMPLETE, dict),
    "ChatRequest": (CHAT, SAY, dict),
    "TokenizePrompt": ("/tokenize", {"prompt": "hi"}, dict),
    "TokenizeMessages": ("/tokenize", {"messages": [USER]}, dict),
    "DetokenizeRequest": ("/detokenize", {"tokens": [1, 2]}, dict),
    "StreamOptions": (
        COMPLETION,
        {},
        lambda part: {**COMPLETE, "stream": True, "stream_options": part},
    ),
    "ResponseFormat": (
        COMPLETION,
        {"type": "text"},
        lambda part: {
            **COMPLETE,
            "response_format": {**part, "type": "json_schema"} if part.get("json_schema") else part,
        },
    ),
    "JsonSchemaFormat": (
        COMPLETION,
        SCHEMA,
        lambda part: {**COMPLETE, "response_format": {**AS_SCHEMA, "json_schema": part}},
    ),
    "Tool": (CHAT, TOOL, with_tool),
    "FunctionDefinition": (
        CHAT,
        TOOL["function"],
        lambda part: with_tool({**TOOL, "function": part}),
    ),
    "SystemMessage": (CHAT, {"role": "system", "content": "x"}, lambda part: say(part, USER)),
    "DeveloperMessage": (CHAT, {"role": "developer", "content": "x"}, lambda part: say(part, USER)),
    "UserMessage": (CHAT, USER, say),
    "AssistantMessage": (CHAT, {"role": "assistant", "content": "x"}, lambda part: say(USER, part)),
    "ToolMessage": (CHAT, {"role": "tool", "content": "x", "tool_call_id": "1"}, say),
    "ToolCall": (CHAT, CALL, with_call),
    "FunctionCall": (CHAT, CALL["function"], lambda part: with_call({**CALL, "function": part})),
    "SystemMessage.content": (CHAT, *with_parts("system")),
    "DeveloperMessage.content": (CHAT, *with_parts("developer")),
    "UserMessage.content": (CHAT, *with_parts("user")),
    "AssistantMessage.content": (CHAT, *with_parts("assistant")),
    "ToolMessage.content": (CHAT, *with_parts("tool", {"tool_call_id": "1"})),
}
"""Where a schema stands: the path, an instance without what is to be tried, and the body around."""

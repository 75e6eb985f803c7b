"""A model's own chat template: messages to the text that the model was trained on.

Templates are Jinja programs in the model's directory. They are rendered as `transformers` renders
them, so that a prompt is what training saw, and in Jinja's sandbox: a model directory is data.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protos.errors import BatonError, ErrorCode

DEFAULT, TOOL_USE = "default", "tool_use"
CONTINUE_HERE = "\ue000continue-here\ue000 "
"""Marks the end of a message that the model continues. Its last character is a space, since some
templates strip what ends a message."""
RESERVED_VARIABLES = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"]
)
"""What requests say by fields of their own."""

Message = dict[str, Any]


class ChatTemplate:
    """One template. Safe to share among threads."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            source: the Jinja text.
            special_tokens: bos_token, eos_token and the like, as the template names them.

        Raises:
            BatonError: FAILED_PRECONDITION; it is no Jinja template.
        """
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BatonError(
                ErrorCode.FAILED_PRECONDITION, f"the model's chat template is broken: {error}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: with `role` and `content`; None stands for a key that is not there.
            tools: JSON schemas of functions.
            add_generation_prompt: end with the header of the assistant's next message.
            continue_final_message: end inside the last message, which the model continues.
            variables: more that this template knows.

        Raises:
            BatonError: INVALID_ARGUMENT; the template refuses or cannot render these messages.
        """
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        if continue_final_message:
            chat[-1] = _marked(chat[-1])
        values = self._special_tokens | dict(variables or {})
        try:
            text = self._template.render(
                values,
                messages=chat,
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            # What a template does with messages that it does not expect is open-ended.
            raise _invalid(f"the model's chat template refuses these messages: {error}") from error
        return _cut(text) if continue_final_message else text

    @cached_property
    def reads_parts(self) -> bool:
        """Whether it can read content that is a list of parts, and not only a string."""
        probe = "baton-probe"
        message = {"role": "user", "content": [{"type": "text", "text": probe}]}
        try:
            text = self.render([message])
        except BatonError:
            return False
        # A template that only knows strings shows the list itself.
        return probe in text and "'type'" not in text and '"type"' not in text

    def mentions(self, word: str) -> bool:
        return word in self.source


class ChatTemplates:
    """The templates of one model, by name; most models have one, some none."""

    def __init__(
        self,
        sources: Mapping[str, str] | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        problem: str = "",
    ) -> None:
        """
        Args:
            sources: Jinja text by name.
            special_tokens: bos_token, eos_token and the like.
            problem: why there are no templates, where they could not be read.
        """
        self._problem = problem
        self._sources = dict(sources or {})
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def load(cls, directory: Path) -> "ChatTemplates":
        """From chat_template.jinja, else tokenizer_config.json, and additional_chat_templates/."""
        try:
            config = _read_object(directory / "tokenizer_config.json")
            sources = _sources(directory, config.get("chat_template"))
            names = _read_object(directory / "special_tokens_map.json") | config
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Prompts can be served all the same.
            return cls(problem=f"the chat templates in {directory} cannot be read: {error!r}")
        return cls(sources, special_tokens=_special_tokens(names))

    def choose(self, *, tools: bool) -> ChatTemplate:
        """The template for a request with or without tools.

        Raises:
            BatonError: INVALID_ARGUMENT; the model has none. FAILED_PRECONDITION; it is broken.
        """
        if self._problem:
            raise BatonError(ErrorCode.FAILED_PRECONDITION, self._problem, param="messages")
        name = TOOL_USE if tools and TOOL_USE in self._sources else DEFAULT
        source = self._sources.get(name)
        if source is None:
            raise BatonError(
                ErrorCode.INVALID_ARGUMENT,
                "this model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): send a prompt to /v1/completions",
                param="messages",
            )
        template = self._compiled.get(name)
        if template is None:
            template = ChatTemplate(source, special_tokens=self._special_tokens)
            self._compiled[name] = template
        return template


class _Generation(Extension):
    """{% generation %} marks text for training; for a prompt it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _marked(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + CONTINUE_HERE}
    if isinstance(content, list) and content:
        last = content[-1] | {"text": content[-1]["text"] + CONTINUE_HERE}
        return message | {"content": [*content[:-1], last]}
    raise _invalid("continue_final_message needs a last message with content")


def _cut(text: str) -> str:
    mark = CONTINUE_HERE.rstrip()
    if mark not in text:
        raise _invalid("the model's chat template does not show the last message's content")
    at = text.rindex(mark)
    kept = text[:at]
    # The mark's space is gone where the template strips content; then the content's own goes too.
    return kept if text[at:].startswith(CONTINUE_HERE) else kept.rstrip()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return tokens


def _sources(directory: Path, listed: Any) -> dict[str, str]:
    sources: dict[str, str] = {}
    if isinstance(listed, str):
        sources[DEFAULT] = listed
    elif isinstance(listed, list):
        sources |= {str(entry["name"]): str(entry["template"]) for entry in listed}
    elif isinstance(listed, dict):
        sources |= {name: str(template) for name, template in listed.items()}
    for file in [
        directory / "chat_template.jinja",
        *sorted(directory.glob("additional_chat_templates/*.jinja")),
    ]:
        if file.is_file():
            name = DEFAULT if file.parent == directory else file.stem
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TypeError(f"{file.name} is no JSON object")
    return value


def _invalid(message: str) -> BatonError:
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param="messages")

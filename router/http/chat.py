"""POST /v1/chat/completions: the model's own template around the messages, then as any prompt."""

import asyncio
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from protos.errors import BatonError
from router.core import Router
from router.http.answer import Answer, stop_reason
from router.http.body import read_json
from router.http.chat_request import ChatRequest, TemplateFields, Tool, parse
from router.http.choices import Choices
from router.http.key_gate import caller_of
from router.http.logprobs import TokenNames, chat_logprobs
from router.http.messages import for_template
from router.http.request_id import arrival_of, note_id
from router.http.serve import respond
from router.output import Delta
from router.tokenizer import TextCodec

logger = logging.getLogger(__name__)


async def create_chat_completion(router: Router, request: Request) -> Response:
    """Serves one request.

    Raises:
        BatonError, HttpDoorError: it failed before anything of the answer was sent.
    """
    config = router.config
    sent = await read_json(
        request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s
    )
    arrival = arrival_of(request, "chat")
    body = parse(sent)
    codec = await router.tokenizers.get(router.model(body.model or "").path)
    prompt_ids = await encode_messages(body, codec, tools=body.shown_tools)
    try:
        spec = body.spec_for(prompt_ids)
        choices = await Choices.admit(
            router,
            [spec],
            per_prompt=body.choices(),
            caller=caller_of(request),
            arrival=arrival,
        )
    except BatonError as error:
        error.param = _own_name(error.param, body)
        raise
    note_id(request, choices.id)
    logger.debug("request %s over HTTP, user %r", choices.id, body.safety_identifier or body.user)
    return await respond(
        request,
        choices,
        ChatAnswer(body, choices, fingerprint=router.system_fingerprint()),
        stream=bool(body.stream),
        write_timeout_s=config.write_timeout_s,
    )


async def encode_messages(
    body: TemplateFields,
    codec: TextCodec,
    *,
    tools: list[Tool] | None,
    add_special_tokens: bool = False,
) -> list[int]:
    """The prompt that the model's template makes. Templates write special tokens themselves.

    Raises:
        BatonError: INVALID_ARGUMENT; there is no template, or it refuses these messages.
    """
    add_generation_prompt = body.generation_prompt()
    template = codec.chat.choose(tools=bool(tools))

    def render() -> str:
        return template.render(
            for_template(body.messages, template),
            tools=[tool.sent for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
        )

    # A template is a program: no stream waits for it.
    text = await asyncio.to_thread(render)
    try:
        return await codec.encode(text, add_special_tokens=add_special_tokens)
    except BatonError as error:
        error.param = "messages"
        raise


def _own_name(param: str | None, body: ChatRequest) -> str | None:
    """The router speaks of a prompt and of max_tokens; this door of other fields."""
    if param == "prompt":
        return "messages"
    if param == "max_tokens" and body.max_tokens is None:
        return "max_completion_tokens"
    return param


class ChatAnswer(Answer):
    """The shape of chat completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, choices: Choices, *, fingerprint: str) -> None:
        super().__init__(choices, fingerprint=fingerprint, include_usage=body.include_usage)
        self._token_ids = bool(body.return_token_ids)
        self._names = TokenNames(choices.codec)
        self._with_logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._ended_by(self._choice(index, delta, message=message), delta)

    def chunk_choices(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(
                self._choice(index, Delta([]), delta={"role": "assistant", "content": ""})
            )
        if delta.tokens or delta.text:
            chunks.append(self._choice(index, delta, delta={"content": delta.text}))
        if delta.last:
            chunks.append(self._ended_by(self._choice(index, Delta([]), delta={}), delta))
        return chunks

    def _choice(self, index: int, said: Delta, **form: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, **form, "logprobs": None, "finish_reason": None}
        if self._with_logprobs and said.tokens:
            choice["logprobs"] = chat_logprobs(self._names, said.tokens)
        if self._token_ids:
            choice["token_ids"] = [token.id for token in said.tokens]
        return choice

    def _ended_by(self, choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
        return choice | {"finish_reason": delta.finish_name, "stop_reason": stop_reason(delta)}

"""POST /tokenize and /detokenize: text to the model's tokens and back, without generating."""

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from router.callers import CallerLimitError
from router.core import Router
from router.http.body import read_json
from router.http.chat import encode_messages
from router.http.chat_request import TemplateFields
from router.http.errors import json_response
from router.http.fields import Strict, flag, read_fields
from router.http.key_gate import caller_of
from router.http.messages import MESSAGE_TAGS
from router.request import check_token_ids
from router.token_bytes import token_name


class TokenizePrompt(Strict):
    """A text to tokenize."""

    model: str | None = Field(default=None, description="Absent: the model served.")
    prompt: str
    add_special_tokens: bool | None = flag("Those that begin or end a prompt. Absent: true.")
    return_token_strs: bool | None = flag("Add the tokens' texts.")


class TokenizeMessages(TemplateFields):
    """A chat to tokenize, as its template shows it."""

    model: str | None = Field(default=None, description="Absent: the model served.")
    add_special_tokens: bool | None = flag("Besides the template's own. Absent: false.")
    return_token_strs: bool | None = flag("Add the tokens' texts.")


class DetokenizeRequest(Strict):
    """Tokens to make text of."""

    model: str | None = Field(default=None, description="Absent: the model served.")
    tokens: list[Annotated[int, Field(ge=0)]]


async def tokenize(router: Router, request: Request) -> Response:
    """Serves POST /tokenize. Raises BatonError, HttpDoorError."""
    fields = await _read(router, request)
    body: TokenizePrompt | TokenizeMessages
    if "messages" in fields:
        body = read_fields(TokenizeMessages, fields, tags=MESSAGE_TAGS)
    else:
        body = read_fields(TokenizePrompt, fields)
    model = router.model(body.model or "")
    codec = await router.tokenizers.get(model.path)
    if isinstance(body, TokenizeMessages):
        ids = await encode_messages(
            body, codec, tools=body.tools, add_special_tokens=bool(body.add_special_tokens)
        )
    else:
        ids = await codec.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    texts = None
    if body.return_token_strs:
        texts = [token_name(codec.token_bytes(token_id)) for token_id in ids]
    return json_response(
        {
            "count": len(ids),
            "max_model_len": model.context_length,
            "tokens": ids,
            "token_strs": texts,
        }
    )


async def detokenize(router: Router, request: Request) -> Response:
    """Serves POST /detokenize. Raises BatonError, HttpDoorError."""
    body = read_fields(DetokenizeRequest, await _read(router, request))
    model = router.model(body.model or "")
    check_token_ids(body.tokens, model=model, param="tokens")
    codec = await router.tokenizers.get(model.path)
    return json_response({"prompt": await codec.decode(body.tokens, skip_special_tokens=False)})


async def _read(router: Router, request: Request) -> dict[str, Any]:
    try:
        caller_of(request).count_call()
    except CallerLimitError as error:
        router.metrics.refusals.limit(error.limit)
        raise
    config = router.config
    return await read_json(
        request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s
    )

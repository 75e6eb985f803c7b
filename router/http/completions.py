"""POST /v1/completions: answers in OpenAI's shape, whole or as server-sent events."""

import logging
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from router.core import Router
from router.http.answer import Answer, stop_reason
from router.http.body import read_json
from router.http.choices import Choices
from router.http.completion_request import CompletionRequest, parse
from router.http.key_gate import caller_of
from router.http.logprobs import LegacyLogprobs, TokenNames
from router.http.request_id import arrival_of, note_id
from router.http.serve import respond
from router.output import Delta, OutputToken

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as `echo` shows it."""

    text: str
    pieces: list[str]
    """What each of its tokens adds; empty where no log probabilities are wanted."""


async def create_completion(router: Router, request: Request) -> Response:
    """Serves one request.

    Raises:
        BatonError, HttpDoorError: it failed before anything of the answer was sent.
    """
    config = router.config
    sent = await read_json(
        request, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s
    )
    arrival = arrival_of(request, "text_completion")
    body = parse(sent)
    per_prompt = body.choices(prompts=len(body.prompt))
    specs = [body.spec_for(prompt) for prompt in body.prompt]
    choices = await Choices.admit(
        router, specs, per_prompt=per_prompt, caller=caller_of(request), arrival=arrival
    )
    note_id(request, choices.id)
    try:
        logger.debug("request %s over HTTP, user %r", choices.id, body.user)
        prompts = await _prompt_texts(choices, body) if body.echo else []
        answer = CompletionAnswer(
            body, choices, prompts=prompts, fingerprint=router.system_fingerprint()
        )
    except BaseException:
        choices.close()
        raise
    return await respond(
        request,
        choices,
        answer,
        stream=bool(body.stream),
        write_timeout_s=config.write_timeout_s,
    )


async def _prompt_texts(choices: Choices, body: CompletionRequest) -> list[PromptText]:
    codec, skip = choices.codec, body.skip_special_tokens is not False
    texts = []
    for index, prompt in enumerate(body.prompt):
        ids = choices.prompt_ids(index * choices.per_prompt)
        if codec is None:
            texts.append(PromptText("", [""] * len(ids)))
            continue
        text = prompt
        if not isinstance(prompt, str):
            text = await codec.decode(ids, skip_special_tokens=skip)
        pieces = []
        if body.logprobs is not None:
            pieces = await codec.pieces(ids, skip_special_tokens=skip)
        texts.append(PromptText(text, pieces))
    return texts


class CompletionAnswer(Answer):
    """The shape of text completions."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        body: CompletionRequest,
        choices: Choices,
        *,
        prompts: list[PromptText],
        fingerprint: str,
    ) -> None:
        """Args: prompts: to show before each choice's text; empty: none."""
        super().__init__(choices, fingerprint=fingerprint, include_usage=body.include_usage)
        self._token_ids = bool(body.return_token_ids)
        self._prompts = prompts
        self._begun: set[int] = set()
        names = TokenNames(choices.codec)
        self._logprobs: list[LegacyLogprobs] = []
        if body.logprobs is not None:
            self._logprobs = [LegacyLogprobs(names, top=body.logprobs) for _ in range(len(choices))]

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        prompt = None
        if self._prompts and index not in self._begun:
            prompt = self._prompts[index // self._per_prompt]
        self._begun.add(index)
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text if prompt is None else prompt.text + delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_name or None,
            "stop_reason": stop_reason(delta),
        }
        if self._logprobs:
            tokens = delta.tokens
            if prompt is not None:
                tokens = _with_text(delta.prompt_tokens, prompt.pieces) + tokens
            choice["logprobs"] = self._logprobs[index].add(tokens)
        if self._token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
        return choice

    def chunk_choices(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return [self.choice(index, delta)]


def _with_text(tokens: list[OutputToken], pieces: list[str]) -> list[OutputToken]:
    return [
        OutputToken(token.index, token.id, piece, token.logprob, token.top)
        for token, piece in zip(tokens, pieces, strict=True)
    ]

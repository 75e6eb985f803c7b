"""What POST /v1/completions takes."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

from router.http.fields import (
    MAX_CHOICES,
    GenerationFields,
    Only,
    flag,
    invalid,
    number,
    read_fields,
    refuse,
)
from router.request import RequestSpec

DEFAULT_MAX_TOKENS = 16
"""OpenAI's for this endpoint."""
MAX_LOGPROBS = 20

TEXT = {"type": "string", "minLength": 1}
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_CHOICES}


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A list of prompts, each text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        refuse("must be a string, a list of token ids, or a list of one of these")
    if not prompt:
        refuse("is empty: send at least one token")
    if isinstance(prompt[0], (str, list)):
        for part in prompt:
            if type(part) is not type(prompt[0]):
                refuse("mixes kinds: send texts only, or lists of token ids only")
            if isinstance(part, list):
                _check_ids(part)
        return prompt
    _check_ids(prompt)
    return [prompt]


def _check_ids(ids: list[Any]) -> None:
    for token_id in ids:
        # bool is an int to Python, and 1.0 equals 1; neither is a token id.
        if type(token_id) is not int:
            refuse(f"must hold integer token ids, not {str(token_id)[:40]!r}")


class CompletionRequest(GenerationFields):
    """A request for completions of one or several prompts."""

    prompt: Annotated[
        Any,
        AfterValidator(_prompts),
        WithJsonSchema({"anyOf": [TEXT, TOKEN_IDS, _many(TEXT), _many(TOKEN_IDS)]}),
    ] = Field(description="Text or token ids, or a list of these: then each gets n choices.")
    max_tokens: int | None = number(low=1, description="Absent: 16.")
    echo: bool | None = flag("Begin the text with the prompt, and its log probabilities.")
    logprobs: int | None = number(
        low=0,
        high=MAX_LOGPROBS,
        description="Log probabilities of the tokens, and of this many most likely ones at each.",
    )
    best_of: int | None = Field(default=None, description="Not supported, unless equal to n.")
    suffix: Annotated[Any, Only("")] = Field(default=None, description="Not supported.")

    def spec_for(self, prompt: str | Sequence[int]) -> RequestSpec:
        """The request for one choice of that prompt.

        Raises:
            BatonError: INVALID_ARGUMENT; a field out of its range.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of is not supported: leave it out or make it equal to n", "best_of")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise invalid(
                f"logprobs must be between 0 and {MAX_LOGPROBS}, not {self.logprobs}", "logprobs"
            )
        return self.spec(
            prompt=prompt,
            max_tokens=self.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


def parse(body: dict[str, Any]) -> CompletionRequest:
    """Raises BatonError (INVALID_ARGUMENT) naming the field at fault."""
    return read_fields(CompletionRequest, body)

"""Log probabilities in OpenAI's two formats."""

import math
from typing import Any

from router.output import OutputToken
from router.token_bytes import token_name
from router.tokenizer import TextCodec

LEAST_LOGPROB = -9999.0
"""What OpenAI shows for a token of no probability; JSON has no infinity."""


class TokenNames:
    """How tokens are named in an answer."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec

    def bytes_of(self, token_id: int) -> bytes | None:
        """None where the router has no tokenizer."""
        return None if self._codec is None else self._codec.token_bytes(token_id)

    def name(self, token_id: int) -> str:
        value = self.bytes_of(token_id)
        return f"token_id:{token_id}" if value is None else token_name(value)


def chat_logprobs(names: TokenNames, tokens: list[OutputToken]) -> dict[str, Any]:
    """The format of chat completions; `bytes` tells apart what names cannot."""
    content = []
    for token in tokens:
        entry = _entry(names, token.id, token.logprob)
        entry["top_logprobs"] = [_entry(names, other, value) for other, value in token.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, logprob: float | None) -> dict[str, Any]:
    value = names.bytes_of(token_id)
    return {
        "token": names.name(token_id),
        "logprob": finite(logprob),
        "bytes": None if value is None else list(value),
    }


class LegacyLogprobs:
    """The format of completions: four lists side by side, continued from chunk to chunk."""

    def __init__(self, names: TokenNames, *, top: int) -> None:
        """
        Args:
            names: of tokens.
            top: most likely tokens wanted beside each one; 0: none.
        """
        self._names = names
        self._top = top
        self._characters = 0

    def add(self, tokens: list[OutputToken]) -> dict[str, Any]:
        """The next tokens'. Offsets count in the text as the tokens make it, from its beginning."""
        offsets = []
        for token in tokens:
            offsets.append(self._characters)
            self._characters += len(token.text)
        return {
            "tokens": [self._names.name(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._most_likely(token) for token in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _most_likely(self, token: OutputToken) -> dict[str, float | None] | None:
        if token.logprob is None:
            return None
        # Two tokens may have one name: the more likely one stands for both.
        named: dict[str, float | None] = {}
        for other, value in [*token.top, (token.id, token.logprob)]:
            named.setdefault(self._names.name(other), finite(value))
        return named


def finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB

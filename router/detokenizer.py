"""Text from tokens, as they come: never half a character, and linear in the length.

A token may hold part of a character's bytes, and decoders show such a part as U+FFFD. So text that
ends in U+FFFD is held back until later tokens complete it, for as many tokens as a character can
have bytes; past that it is what the model said. Each step decodes a short window of recent tokens,
never the whole output: one window more, so that the decoder sees the same left context (leading
spaces) both with and without the new token. The first window is the end of the prompt: the output
continues it, and so does its text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 4
"""UTF-8 characters have at most 4 bytes, and a token has at least one."""
PROMPT_TOKENS = 32
"""Looked at for the left context; special ones among them have no text."""


class IncrementalDetokenizer:
    """The text of one output, piece by piece."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """
        Args:
            tokenizer: may be shared.
            special_ids: tokens without text.
            prompt_ids: tokens that the output follows.
        """
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._window: list[int] = []
        """Tokens of the last piece given out, then those whose text is held back."""
        self._given = 0
        """Tokens at the window's start whose text has been given out."""
        self._given_text = ""
        """What of the window's text has been given out."""
        self._begin_after(prompt_ids)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty in the middle of a character."""
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._given
        if text.endswith(REPLACEMENT):
            if held < MAX_HELD_TOKENS:
                return ""
            # One character may still be completed; those before it can not.
            return self._give(text, text[:-1])
        return self._give(text, text)

    def flush(self) -> str:
        """The end of the output: what was held back, complete or not."""
        if not self._window:
            return ""
        text = self._decode(self._window)
        piece = self._new(text, text)
        self._window, self._given, self._given_text = [], 0, ""
        return piece

    def _begin_after(self, prompt_ids: Sequence[int]) -> None:
        tail = [token_id for token_id in prompt_ids[-PROMPT_TOKENS:] if self._has_text(token_id)]
        # Starting inside a character would spoil the run of bytes that it belongs to; one of as
        # many starts as a character can have bytes is between two.
        for length in range(MAX_HELD_TOKENS, 2 * MAX_HELD_TOKENS):
            window = tail[-length:]
            text = self._decode(window)
            if not text.startswith(REPLACEMENT):
                self._window, self._given = window, len(window)
                self._given_text = text.removesuffix(REPLACEMENT)
                return

    def _has_text(self, token_id: int) -> bool:
        # A model's embedding may have more rows than its tokenizer has tokens.
        return (
            token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None
        )

    def _new(self, text: str, certain: str) -> str:
        if text.startswith(self._given_text):
            return certain[len(self._given_text) :]
        # Byte-fallback decoders turn a whole run of bytes into U+FFFD when any of it is invalid,
        # also characters that were given out; only the held tokens speak now.
        return self._decode(self._window[self._given :])

    def _give(self, text: str, certain: str) -> str:
        piece = self._new(text, certain)
        if certain == text:
            self._window = self._window[self._given :]
            self._given_text = self._decode(self._window)
        else:
            # No clean edge: the window keeps enough tokens to hold any unfinished character.
            self._window = self._window[-2 * MAX_HELD_TOKENS :]
            self._given_text = self._decode(self._window).removesuffix(REPLACEMENT)
        self._given = len(self._window)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

"""Text from tokens, as they come: never half a character, and linear in the length.

A token may hold part of a character's bytes, and decoders show such a part as U+FFFD. So text that
ends in U+FFFD is held back until later tokens complete it, for as many tokens as a character can
have bytes; past that it is what the model said. Each step decodes a short window of recent tokens,
never the whole output: one window more, so that the decoder sees the same left context (leading
spaces) both with and without the new token.
"""

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 4
"""UTF-8 characters have at most 4 bytes, and a token has at least one."""


class IncrementalDetokenizer:
    """The text of one output, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, *, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._window: list[int] = []
        """Tokens of the last piece given out, then those whose text is held back."""
        self._given = 0
        """Tokens at the window's start whose text has been given out."""
        self._given_text = ""
        """What of the window's text has been given out."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty in the middle of a character."""
        if token_id in self._special_ids:
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
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

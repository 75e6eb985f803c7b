"""Grammars by llguidance: the one door to the library, together with `llguidance_source`.

Why this one: it computes masks as the output goes, so that a grammar is ready in milliseconds; it
counts its own work and stops beyond a limit; it refuses schema keywords that it does not implement
instead of ignoring them; it releases Python's lock; and it depends on nothing.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from engine.errors import (
    EngineError,
    GrammarMismatchError,
    GrammarsUnavailableError,
    InvalidRequestError,
)
from engine.execution.token_mask import MaskBuffer
from engine.grammar.backend import CompiledGrammar, Endings, GrammarBackend, GrammarMatcher
from engine.grammar.checker import GrammarChecker
from engine.grammar.compiler import COMPILE_THREADS
from engine.grammar.llguidance_source import LIMITS, plain
from engine.grammar.spec import Grammar

MAX_MASK_THREADS = 8
"""Rows of one batch whose masks are computed at the same time."""

_END = "<|the grammar may end here|>"
"""A token of our own, so that a complete text shows in the mask whatever the model's
end-of-sequence tokens are, and even if it has none."""

_NOTHING_FITS = "NoExtensionBias"
"""The library's error where no token may come."""

_NOT_OF_THE_GRAMMAR = "satisfy the grammar"
"""In the library's words when a token is wrong; its other errors are limits that it has met."""


class LlguidanceBackend(GrammarBackend):
    """For the tokenizer of one model."""

    def __init__(
        self,
        tokenizer_file: Path,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        checkers: int = COMPILE_THREADS,
    ) -> None:
        """Reads nothing yet. `vocab_size`: width of the logits. `eos_token_ids`: never part of a
        text. `checkers`: compilations at a time."""
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._loading = threading.Lock()
        self._tables: _Tables | None = None
        self._all_checkers = [GrammarChecker() for _ in range(checkers)]
        self._checkers: queue.SimpleQueue[GrammarChecker] = queue.SimpleQueue()
        for checker in self._all_checkers:
            self._checkers.put(checker)
        self._executor: LLExecutor | None = None
        self.buffer = MaskBuffer()

    @property
    def mask_words(self) -> int:
        return self._loaded().words

    def warm_up(self) -> None:
        self._loaded()

    def _loaded(self) -> _Tables:
        with self._loading:
            if self._tables is None:
                self._tables = _Tables(self._file, self._vocab_size, self._eos_token_ids)
            return self._tables

    def compile(self, grammar: Grammar, *, limit_s: float) -> CompiledGrammar:
        tables = self._loaded()
        checker = self._checkers.get()
        try:
            text = checker.check(grammar, limit_s=limit_s)
        finally:
            self._checkers.put(checker)
        matcher = LLMatcher(tables.tokenizer, text, limits=LIMITS, log_level=0)
        first = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        end_byte, end_bit = divmod(tables.end, 8)
        problem = plain(matcher.get_error())
        if problem and problem != _NOTHING_FITS:
            raise InvalidRequestError(f"the grammar cannot be used: {problem}")
        if int(np.unpackbits(first).sum()) == (int(first[end_byte]) >> end_bit & 1):
            raise InvalidRequestError(
                "the grammar cannot be used: the model's tokens make no text that belongs to it, "
                "but perhaps the empty one"
            )
        return _Compiled(self, matcher)

    def fill_masks(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        tables = self._loaded()
        rows = [m for m in matchers if isinstance(m, _Matcher)]
        if len(rows) != len(matchers) or masks.shape != (len(rows), tables.words):
            raise EngineError("masks are filled for matchers and in the shape of this backend")
        self._compute(rows, masks)
        words = masks.numpy().view(np.uint32)
        accepting = words[:, tables.end >> 5] >> np.uint32(tables.end & 31) & 1
        words &= tables.text_only
        for matcher, row, accepts in zip(rows, words, accepting.tolist(), strict=True):
            matcher.allow_endings(row, accepts=bool(accepts))
        for i in np.flatnonzero(~words.any(axis=1)).tolist():
            if accepting[i]:
                # The grammar goes before min_tokens where it leaves nothing else.
                _set_bits(words[i], rows[i].endings.allowed)
            if not words[i].any():
                rows[i].fail("nothing may follow although the text is not complete")
        for matcher, row in zip(rows, words, strict=True):
            if matcher.error is not None:
                row.fill(0xFFFFFFFF)

    def _compute(self, rows: Sequence[_Matcher], masks: torch.Tensor) -> None:
        """The library's masks, in several threads where there are several rows."""
        sound = [(row.library, i) for i, row in enumerate(rows) if row.error is None]
        size = masks.shape[1] * masks.element_size()
        if len(sound) == 1:
            library, i = sound[0]
            library.unsafe_compute_mask_ptr(masks[i].data_ptr(), size)
        elif sound:
            if self._executor is None:
                self._executor = LLExecutor(min(os.cpu_count() or 1, MAX_MASK_THREADS))
            self._executor.unsafe_compute_mask_ptr(sound, masks.data_ptr(), size, masks.shape[0])
        for library, i in sound:
            if library.is_error():
                rows[i].fail(library.get_error())

    def close(self) -> None:
        for checker in self._all_checkers:
            checker.close()


class _Tables:
    """What follows from the tokenizer alone."""

    def __init__(self, file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Raises `GrammarsUnavailableError`."""
        if not file.is_file():
            raise GrammarsUnavailableError(
                f"outputs cannot be constrained here: the model has no {file.name}"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
            self.end = int(tokenizer.token_to_id(_END) or 0)
            size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True), self.end + 1)
            self.tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=self.end)
        except Exception as error:  # both packages raise bare ones
            raise GrammarsUnavailableError(
                f"outputs cannot be constrained here: {file} is no usable tokenizer: {error}"
            ) from error
        self.words = -(-size // 32)
        """int32 words of a mask."""
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        bits[:vocab_size] = 1
        bits[self.end] = 0
        bits[[token for token in eos_token_ids if token < vocab_size]] = 0
        self.text_only = np.packbits(bits, bitorder="little").view(np.uint32)
        """[words]; the model's tokens, its end-of-sequence tokens excepted."""


class _Compiled(CompiledGrammar):
    def __init__(self, backend: LlguidanceBackend, prototype: LLMatcher) -> None:
        self._backend = backend
        self._prototype = prototype

    def matcher(self, endings: Endings) -> GrammarMatcher:
        return _Matcher(self._backend, self._prototype.deep_copy(), endings)


class _Matcher(GrammarMatcher):
    def __init__(self, backend: LlguidanceBackend, library: LLMatcher, endings: Endings) -> None:
        self.backend = backend
        self.library = library
        self.endings = endings
        self.error = None
        self._outputs = 0

    def advance(self, token: int) -> None:
        if self.error is not None or token in self.endings.allowed:
            return
        self._outputs += 1
        if not self.library.consume_token(token):
            self.fail(self.library.get_error())

    @property
    def is_complete(self) -> bool:
        if self.error is not None or not self.library.is_accepting():
            return False
        if self.library.is_stopped():
            return True
        # The library may see it only when it looks for a token; a request with tokens that end it
        # draws one of these then.
        return not self.endings.allowed and self._only_the_end()

    def _only_the_end(self) -> bool:
        mask = np.frombuffer(self.library.compute_bitmask(), dtype=np.uint8)
        return int(np.unpackbits(mask).sum()) == 1 and not self.library.is_error()

    def allow_endings(self, row: np.ndarray, *, accepts: bool) -> None:
        """Puts into `row` [words] uint32 what ends the request, as far as it may now."""
        if self._outputs < self.endings.min_tokens:
            _clear_bits(row, self.endings.held_back)
        elif accepts:
            _set_bits(row, self.endings.allowed)

    def fail(self, detail: str) -> None:
        if self.error is not None:
            return
        where, detail = f"after {self._outputs} tokens", plain(detail)
        if _NOT_OF_THE_GRAMMAR in detail:
            self.error = GrammarMismatchError(f"the output left its grammar {where}: {detail}")
        else:
            self.error = InvalidRequestError(f"the grammar cannot be followed {where}: {detail}")


def _set_bits(row: np.ndarray, tokens: frozenset[int]) -> None:
    for token in tokens:
        row[token >> 5] |= np.uint32(1 << (token & 31))


def _clear_bits(row: np.ndarray, tokens: frozenset[int]) -> None:
    for token in tokens:
        row[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))

"""Grammars without a library: what may come is a function of how far the output is.

A matcher that is advanced twice by a token, or not at all, or that stands behind the request's
output, allows other tokens than the reference does, or sees one that it did not allow.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch

from engine.errors import InvalidRequestError
from engine.execution.token_mask import MaskBuffer
from engine.grammar.backend import CompiledGrammar, Endings, GrammarBackend, GrammarMatcher
from engine.grammar.compiler import Compilation, GrammarCompiler
from engine.grammar.spec import Grammar, GrammarKind
from tests.engine.scheduler.machine.chain import VOCAB

WRONG = Grammar(GrammarKind.EBNF, "wrong")
"""Does not compile."""


def stub_grammar(length: int) -> Grammar:
    """Complete after `length` tokens, three of them to choose from at each place."""
    return Grammar(GrammarKind.EBNF, str(length))


def allowed_tokens(length: int, outputs: Sequence[int]) -> list[int]:
    """None of them ends the output by itself."""
    last = outputs[-1] if outputs else 5
    start = (len(outputs) * 11 + last * 3 + length) % (VOCAB - 4)
    return [1 + start, 2 + start, 3 + start]


class StubMatcher(GrammarMatcher):
    def __init__(self, backend: "StubBackend", length: int) -> None:
        self.backend = backend
        self.length = length
        self.outputs: list[int] = []

    def advance(self, token: int) -> None:
        assert token in allowed_tokens(self.length, self.outputs), "a token that was not allowed"
        self.outputs.append(token)

    @property
    def is_complete(self) -> bool:
        return len(self.outputs) >= self.length


class StubGrammar(CompiledGrammar):
    def __init__(self, backend: "StubBackend", length: int) -> None:
        self._backend = backend
        self._length = length

    def matcher(self, endings: Endings) -> GrammarMatcher:
        return StubMatcher(self._backend, self._length)


class StubBackend(GrammarBackend):
    def __init__(self) -> None:
        self.buffer = MaskBuffer()

    @property
    def mask_words(self) -> int:
        return -(-VOCAB // 32)

    def warm_up(self) -> None:
        return None

    def compile(self, grammar: Grammar, *, limit_s: float) -> CompiledGrammar:
        if grammar == WRONG:
            raise InvalidRequestError("the grammar is wrong")
        return StubGrammar(self, int(grammar.text))

    def fill_masks(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        masks.zero_()
        for row, matcher in zip(masks, matchers, strict=True):
            assert isinstance(matcher, StubMatcher)
            for token in allowed_tokens(matcher.length, matcher.outputs):
                row[token // 32] |= 1 << (token % 32)

    def close(self) -> None:
        return None


class SlowCompilation:
    """Done some passes after it was asked for."""

    def __init__(self, result: Callable[[], CompiledGrammar], done: Callable[[], bool]) -> None:
        self.result = result
        self.done = done

    def started(self) -> bool:
        return True


class SlowCompiler:
    """`GrammarCompiler` on the machine's clock."""

    def __init__(self, now: Callable[[], int], passes: int) -> None:
        self.backend = StubBackend()
        self.timeout_s = float("inf")
        self._now = now
        self._passes = passes

    def submit(self, grammar: Grammar) -> Compilation:
        due = self._now() + self._passes
        slow = SlowCompilation(
            lambda: self.backend.compile(grammar, limit_s=0.0), lambda: self._now() >= due
        )
        return cast(Compilation, slow)

    def leave(self, grammar: Grammar) -> None:
        return None

    def as_compiler(self) -> GrammarCompiler:
        return cast(GrammarCompiler, self)

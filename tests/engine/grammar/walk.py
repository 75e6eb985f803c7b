"""Random outputs under a grammar's masks, as a very undecided model would draw them."""

import random
from collections.abc import Sequence

import torch

from engine.grammar.backend import CompiledGrammar, Endings, GrammarBackend, GrammarMatcher
from engine.grammar.llguidance_backend import LlguidanceBackend
from engine.grammar.spec import Grammar, GrammarKind

LIMIT_S = 10.0


def compiled(backend: GrammarBackend, kind: str, text: str) -> CompiledGrammar:
    return backend.compile(Grammar(GrammarKind(kind), text), limit_s=LIMIT_S)


def allowed(backend: GrammarBackend, matcher: GrammarMatcher, vocab_size: int) -> list[int]:
    """Tokens that may be drawn next."""
    masks = torch.zeros(1, backend.mask_words, dtype=torch.int32)
    backend.fill_masks([matcher], masks)
    bits = ((masks.view(torch.uint8)[0, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool()
    tokens: list[int] = bits.flatten().nonzero().flatten().tolist()
    assert tokens, "nothing may be drawn"
    assert tokens[-1] < vocab_size or matcher.error is not None
    return tokens


def random_output(
    backend: LlguidanceBackend,
    grammar: CompiledGrammar,
    *,
    vocab_size: int,
    eos: Sequence[int],
    seed: int,
    most: int,
) -> tuple[list[int], bool]:
    """(tokens without the one that ended them, whether they came to an end). Endings are drawn as
    soon as they may be, shorter tokens more often: so that most outputs do end."""
    rng = random.Random(seed)
    matcher = grammar.matcher(Endings(allowed=frozenset(eos)))
    tokens: list[int] = []
    while len(tokens) < most:
        choices = allowed(backend, matcher, vocab_size)
        if set(eos) <= set(choices) and rng.random() < 0.5:
            return tokens, True
        assert matcher.error is None, matcher.error
        texts = [t for t in choices if t not in eos] or choices
        # Low ids are short tokens, closing brackets among them.
        tokens.append(texts[int(len(texts) * rng.random() ** 4)])
        if tokens[-1] in eos:
            return tokens[:-1], True
        matcher.advance(tokens[-1])
        assert matcher.error is None, matcher.error
        if matcher.is_complete:
            return tokens, True
    return tokens, False

"""A scheduler with grammars, and requests whose draws under one are known from a list of texts."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.spec import Grammar, GrammarKind
from engine.sampling_params import SamplingParams
from engine.scheduler.grammar_queue import GrammarQueue
from tests.engine.grammar.tokenizers import STUB_TEXTS
from tests.engine.scheduler.drawn import SamplingRunner, Wanted, wanted
from tests.engine.scheduler.stub import EOS, VOCAB, Engine

TEXTS = frozenset(
    ["abc", "abcd", "ab1.23", "dcba", "dc", '{"a":true}', '{"a":null}', '{"a1":0}', "é", "éé-9",
     "1e5", "1e55", "a1 a1 a1 a1 a1 a1 a1 a1 b"]
)  # fmt: skip
"""A language that can be listed."""

EVERYTHING: dict[str, Any] = {
    "temperature": 1.1,
    "min_p": 0.01,
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.6,
    "logit_bias": {9: 3.0, 28: -100.0, EOS: 4.0},
    "min_tokens": 3,
    "stop_token_ids": frozenset({39}),
}
PLAIN = wanted([2, 4, 6], rid="plain", max_new_tokens=20, ignore_eos=True)


@dataclass(frozen=True)
class Listed(Wanted):
    """The draws of a request whose grammar is a list of texts, from that list."""

    texts: frozenset[str] = field(default=TEXTS)

    def is_complete(self, outputs: Sequence[int]) -> bool:
        text = "".join(STUB_TEXTS[token] for token in outputs)
        return {t for t in self.texts if t.startswith(text)} == {text}

    def forbid(self, edited: np.ndarray, outputs: Sequence[int]) -> None:
        text = "".join(STUB_TEXTS[token] for token in outputs)
        ends = self.params.stop_token_ids | (set() if self.params.ignore_eos else {EOS})
        goes_on = {
            token
            for token in range(VOCAB)
            if token != EOS and any(t.startswith(text + STUB_TEXTS[token]) for t in self.texts)
        }
        may_end = ends if text in self.texts and len(outputs) >= self.params.min_tokens else set()
        if len(outputs) < self.params.min_tokens:
            goes_on -= {EOS, *self.params.stop_token_ids}
        edited[[token for token in range(VOCAB) if token not in goes_on | may_end]] = -np.inf


def listed(prompt: list[int], *, rid: str = "r", **params: Any) -> Listed:
    grammar = Grammar(GrammarKind.REGEX, "|".join(re.escape(text) for text in sorted(TEXTS)))
    return Listed(
        prompt, SamplingParams(**{"max_new_tokens": 30, "grammar": grammar, **params}), rid
    )


class GrammarEngine(Engine):
    def __init__(self, compiler: GrammarCompiler, **settings: Any) -> None:
        super().__init__(runner=SamplingRunner, **settings)
        self.scheduler.grammar_queue = GrammarQueue(compiler)

    def finish(self) -> None:
        """Passes until no request is live; grammars take their time."""
        end = time.monotonic() + 30
        while self.scheduler._lifecycle.live or self.scheduler.has_work():
            assert time.monotonic() < end
            if self.scheduler.has_work():
                self.step()
            else:
                time.sleep(0.001)


REQUESTS = [
    listed([1, 2, 3]),
    listed([5] * 20, temperature=0.9, seed=4, logprobs=True),
    listed([7, 8], seed=11, **EVERYTHING),
    listed([9, 8, 7], temperature=1.5, seed=3, ignore_eos=True),
    listed([4], temperature=1.3, seed=1, min_tokens=20),
    listed([6, 6], temperature=1.3, seed=8, max_new_tokens=2),
]

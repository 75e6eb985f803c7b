"""Compiling is shared, bounded and cancelled; the scheduler's thread never waits for it."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import pytest
import torch

from engine.errors import EngineError, InvalidRequestError, QueueFullError
from engine.grammar.backend import CompiledGrammar, GrammarBackend, GrammarMatcher
from engine.grammar.compiler import Compilation, GrammarCompiler
from engine.grammar.spec import Grammar, GrammarKind


class FakeBackend(GrammarBackend):
    """Compiles when it is told to; `bad` grammars are refused, `broken` ones are no fault of
    theirs."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    @property
    def mask_words(self) -> int:
        return 1

    def warm_up(self) -> None:
        raise EngineError("is told to whoever sends a grammar")

    def compile(self, grammar: Grammar, *, limit_s: float) -> CompiledGrammar:
        self.go_on.wait(timeout=20)
        self.compiled.append(grammar.text)
        if grammar.text == "bad":
            raise InvalidRequestError("it is bad")
        if grammar.text == "broken":
            raise EngineError("no process")
        return CompiledGrammar  # type: ignore[return-value]

    def fill_masks(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.go_on.set()


def grammar(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def finish(compilation: Compilation) -> Compilation:
    wait_for(compilation.done)
    return compilation


def test_equal_grammars_are_compiled_once_and_everybody_is_told() -> None:
    backend, told = FakeBackend(), threading.Semaphore(0)
    backend.go_on.clear()
    with closing(GrammarCompiler(backend, timeout_s=5, on_done=told.release)) as compiler:
        first = compiler.submit(grammar("a"))
        assert compiler.submit(grammar("a")) is first
        assert not first.done()
        backend.go_on.set()
        assert told.acquire(timeout=10)
        finish(first).result()
        assert compiler.submit(grammar("a")).result() is first.result()
        assert compiler.submit(Grammar(GrammarKind.EBNF, "a")) is not first
        wait_for(lambda: len(backend.compiled) == 2)


def test_a_refusal_is_kept_too_but_a_failure_of_ours_is_not() -> None:
    backend = FakeBackend()
    with closing(GrammarCompiler(backend, timeout_s=5)) as compiler:
        for _ in range(3):
            with pytest.raises(InvalidRequestError, match="bad"):
                finish(compiler.submit(grammar("bad"))).result()
            with pytest.raises(EngineError, match="no process"):
                finish(compiler.submit(grammar("broken"))).result()
        assert backend.compiled.count("bad") == 1
        assert backend.compiled.count("broken") == 3


def test_the_least_recently_used_grammar_is_forgotten() -> None:
    backend = FakeBackend()
    with closing(GrammarCompiler(backend, timeout_s=5, cached=2)) as compiler:
        for text in ("a", "b", "a", "c", "a", "b"):
            finish(compiler.submit(grammar(text)))
        assert backend.compiled == ["a", "b", "c", "b"]


def test_only_so_many_wait_and_one_that_nobody_waits_for_leaves() -> None:
    backend = FakeBackend()
    backend.go_on.clear()
    with closing(GrammarCompiler(backend, timeout_s=5, threads=1, max_waiting=2)) as compiler:
        running = compiler.submit(grammar("0"))
        wait_for(running.started)
        for text in ("1", "2"):
            compiler.submit(grammar(text))
        with pytest.raises(QueueFullError, match="2 grammars"):
            compiler.submit(grammar("3"))
        compiler.submit(grammar("2"))  # joins
        for text in ("2", "1"):
            compiler.leave(grammar(text))
        compiler.submit(grammar("3"))
        backend.go_on.set()
        wait_for(lambda: sorted(backend.compiled) == ["0", "2", "3"])


def test_a_compilation_that_runs_goes_on_for_the_cache() -> None:
    backend = FakeBackend()
    backend.go_on.clear()
    with closing(GrammarCompiler(backend, timeout_s=5)) as compiler:
        running = compiler.submit(grammar("0"))
        wait_for(running.started)
        compiler.leave(grammar("0"))
        assert compiler.submit(grammar("0")) is running
        backend.go_on.set()
        finish(running).result()

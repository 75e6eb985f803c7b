"""While a grammar compiles, and where it fails: its request alone is concerned."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from llguidance import LLParserLimits

from engine.errors import (
    EngineError,
    GrammarMismatchError,
    GrammarsUnavailableError,
    InvalidRequestError,
    QueueFullError,
)
from engine.grammar import llguidance_backend
from engine.grammar.backend import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.llguidance_backend import LlguidanceBackend
from engine.grammar.spec import Grammar, GrammarKind
from engine.scheduler.req import Req
from engine.types import RequestId
from tests.engine.grammar.tokenizers import STUB_TEXTS, write_stub_tokenizer
from tests.engine.scheduler.drawn import wanted
from tests.engine.scheduler.grammar_engine import PLAIN, REQUESTS, GrammarEngine, listed
from tests.engine.scheduler.handover import FakeDecodeRole
from tests.engine.scheduler.stub import EOS, VOCAB, Engine, make_req


class SlowBackend(LlguidanceBackend):
    """Compiles when it is told to."""

    go_on: threading.Event

    def compile(self, grammar: Grammar, *, limit_s: float) -> CompiledGrammar:
        self.go_on.wait(timeout=20)
        return super().compile(grammar, limit_s=limit_s)


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GrammarCompiler, SlowBackend]]:
    path = write_stub_tokenizer(tmp_path_factory.mktemp("stub"))
    backend = SlowBackend(path, vocab_size=VOCAB, eos_token_ids=[EOS], checkers=1)
    backend.go_on = threading.Event()
    made = GrammarCompiler(backend, timeout_s=20.0, threads=1)
    yield made, backend
    backend.go_on.set()
    made.close()


def test_others_run_while_a_grammar_compiles_and_nobody_spins(
    slow: tuple[GrammarCompiler, SlowBackend],
) -> None:
    compiler, backend = slow
    engine = GrammarEngine(compiler)
    engine.add(REQUESTS[0].req(), PLAIN.req())
    engine.drain()
    assert engine.tokens("plain") == PLAIN.tokens()
    assert not engine.tokens("r")
    assert [req.rid for req in engine.scheduler.grammar_queue] == ["r"]
    assert [req.rid for req in engine.scheduler.returning_requests()] == ["r"]
    assert not engine.scheduler.has_work()
    assert not engine.step().ran
    backend.go_on.set()
    engine.finish()
    assert engine.tokens("r") == REQUESTS[0].tokens()


def test_a_request_may_be_aborted_while_its_grammar_compiles(
    slow: tuple[GrammarCompiler, SlowBackend],
) -> None:
    compiler, backend = slow
    engine = GrammarEngine(compiler)
    engine.add(REQUESTS[0].req())
    assert engine.scheduler.abort_request(RequestId("r"))
    engine.step()
    assert engine.aborted == engine.released == ["r"]
    assert not engine.scheduler.grammar_queue
    engine.add(REQUESTS[0].req())  # the id is free again
    backend.go_on.set()
    engine.finish()
    assert engine.tokens("r") == REQUESTS[0].tokens()


def test_a_deadline_ends_the_wait_for_a_grammar(slow: tuple[GrammarCompiler, SlowBackend]) -> None:
    compiler, _ = slow
    engine = GrammarEngine(compiler)
    req = REQUESTS[0].req()
    req.deadline = time.monotonic() + 0.02
    engine.add(req)
    time.sleep(0.03)
    engine.step()
    assert engine.errors["r"].code == "DEADLINE_EXCEEDED"  # type: ignore[attr-defined]
    assert not engine.scheduler.grammar_queue


def test_a_grammar_that_takes_too_long_is_the_clients_error(
    slow: tuple[GrammarCompiler, SlowBackend],
) -> None:
    compiler, _ = slow
    compiler.timeout_s = 0.05
    engine = GrammarEngine(compiler)
    for rid in ("r0", "r1"):
        grammar = Grammar(GrammarKind.REGEX, rid)
        engine.add(wanted([1], rid=rid, grammar=grammar).req())
        while rid == "r0" and not compiler.submit(grammar).started():
            time.sleep(0.001)
    time.sleep(0.06)
    assert engine.scheduler.has_work()
    engine.step()
    # The one that was being compiled, and the one that waited for it.
    assert isinstance(engine.errors["r0"], InvalidRequestError)
    assert "--grammar-timeout-s" in str(engine.errors["r0"])
    assert isinstance(engine.errors["r1"], QueueFullError)
    assert sorted(engine.released) == ["r0", "r1"]


def test_a_wrong_grammar_fails_its_request_alone(compiler: GrammarCompiler) -> None:
    engine = GrammarEngine(compiler)
    bad = wanted([1, 2], grammar=Grammar(GrammarKind.REGEX, "(a"))
    engine.add(bad.req(), PLAIN.req())
    engine.finish()
    assert isinstance(engine.errors["r"], InvalidRequestError)
    assert "unclosed group" in str(engine.errors["r"])
    assert str(engine.errors["r"]).startswith("request r: ")
    assert engine.tokens("plain") == PLAIN.tokens()
    assert sorted(engine.released) == ["plain", "r"]


def test_replayed_tokens_that_do_not_fit_are_a_typed_error(compiler: GrammarCompiler) -> None:
    engine = GrammarEngine(compiler)
    engine.add(REQUESTS[0].req([STUB_TEXTS.index("z")]), PLAIN.req())
    engine.finish()
    assert isinstance(engine.errors["r"], GrammarMismatchError)
    assert not engine.tokens("r")
    assert engine.tokens("plain") == PLAIN.tokens()


def prebuilt(engine: GrammarEngine, req: Req, first_token: int) -> None:
    """As if its prompt had been computed elsewhere."""
    pages = engine.memory.alloc_pages(-(-req.seqlen // 4))
    for position, token in enumerate(req.fill_ids):
        slot = pages[position // 4] * 4 + position % 4
        engine.runner.kv_token[slot], engine.runner.kv_position[slot] = token, position
    engine.scheduler.add_prebuilt(req, pages, first_token)


def test_a_transferred_request_joins_when_its_grammar_is_there(
    slow: tuple[GrammarCompiler, SlowBackend],
) -> None:
    compiler, backend = slow
    engine = GrammarEngine(compiler, role=FakeDecodeRole())
    request = REQUESTS[1]
    expected = request.tokens()
    prebuilt(engine, request.req(), expected[0])
    engine.add(PLAIN.req())
    engine.drain()
    assert engine.tokens("plain") == PLAIN.tokens()
    assert not engine.tokens("r")
    backend.go_on.set()
    engine.finish()
    assert engine.tokens("r") == expected[1:]


def test_a_transferred_request_whose_grammar_fails_gives_its_pages_back(
    slow: tuple[GrammarCompiler, SlowBackend],
) -> None:
    compiler, backend = slow
    engine = GrammarEngine(compiler, role=FakeDecodeRole())
    bad = wanted([1, 2, 3, 4, 5], grammar=Grammar(GrammarKind.EBNF, "root ::= nothing"))
    prebuilt(engine, bad.req(), 9)
    prebuilt(engine, listed([5] * 6, rid="gone").req(), 9)
    engine.step()
    assert engine.scheduler.abort_request(RequestId("gone"))
    backend.go_on.set()
    engine.finish()
    assert "`nothing` is not defined" in str(engine.errors["r"])
    assert engine.aborted == ["gone"]
    assert engine.scheduler.page_counts().in_use == 0


def test_a_first_token_that_does_not_fit_fails_the_request(compiler: GrammarCompiler) -> None:
    engine = GrammarEngine(compiler, role=FakeDecodeRole())
    prebuilt(engine, REQUESTS[0].req(), STUB_TEXTS.index("z"))
    engine.add(PLAIN.req())
    engine.finish()
    assert isinstance(engine.errors["r"], GrammarMismatchError)
    assert engine.tokens("plain") == PLAIN.tokens()
    assert engine.scheduler.page_counts().in_use == 0


def test_a_grammar_that_meets_its_limits_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_states = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    monkeypatch.setattr(llguidance_backend, "LIMITS", few_states)
    path = write_stub_tokenizer(tmp_path)
    backend = LlguidanceBackend(path, vocab_size=VOCAB, eos_token_ids=[EOS], checkers=1)
    with closing(GrammarCompiler(backend, timeout_s=20.0, threads=1)) as few:
        engine = GrammarEngine(few)
        pattern = Grammar(GrammarKind.REGEX, "(a|b)*a(a|b){20}")
        request = wanted([3], max_new_tokens=40, temperature=1.0, grammar=pattern)
        engine.add(request.req(), PLAIN.req())
        engine.finish()
    assert isinstance(engine.errors["r"], InvalidRequestError)
    assert "too many states" in str(engine.errors["r"])
    # Nothing that was drawn without a mask has left.
    assert 0 < len(engine.tokens("r")) < 40
    assert {STUB_TEXTS[token] for token in engine.tokens("r")} <= {"a", "b", "ab"}
    assert engine.tokens("plain") == PLAIN.tokens()


def test_an_engine_without_a_compiler_refuses_grammars() -> None:
    engine = Engine()
    with pytest.raises(GrammarsUnavailableError):
        engine.add(REQUESTS[0].req())
    assert not engine.scheduler._lifecycle.live
    engine.add(make_req("plain", [1, 2]))
    engine.drain()


def test_a_role_is_told_of_a_request_that_it_still_holds(compiler: GrammarCompiler) -> None:
    failed: list[tuple[str, EngineError]] = []
    role = FakeDecodeRole()
    role.on_grammar_failed = lambda req, error: failed.append((req.rid, error))  # type: ignore[method-assign]
    engine = GrammarEngine(compiler, role=role)
    for rid, pattern in (("bad", "(a"), ("good", "a+"), ("forgotten", "(b")):
        req = wanted([1], rid=rid, grammar=Grammar(GrammarKind.REGEX, pattern)).req()
        engine.scheduler.prepare_grammar(req)
        if rid == "good":
            good = req
    engine.scheduler.grammar_queue.discard(RequestId("forgotten"))
    end = time.monotonic() + 20
    while good.grammar is None or not failed:
        assert time.monotonic() < end
        engine.step()
    assert [rid for rid, _ in failed] == ["bad"]
    engine.add(good)
    assert not engine.scheduler.grammar_queue  # nothing to wait for
    engine.finish()
    assert {STUB_TEXTS[token] for token in engine.tokens("good")} <= {"a", "<eos>"}

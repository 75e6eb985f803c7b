"""A grammar that is wrong, or meant to do harm, is an error in bounded time, and nothing else."""

import json
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from engine.errors import EngineError, GrammarsUnavailableError, InvalidRequestError
from engine.grammar.backend import Endings
from engine.grammar.llguidance_backend import LlguidanceBackend
from engine.grammar.spec import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from router import grammar as router_grammar
from tests.engine.grammar.tokenizers import TINY, TINY_EOS, TINY_VOCAB
from tests.engine.grammar.walk import allowed, compiled

WRONG = [
    ("regex", "(a", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "", "empty"),
    ("regex", "[^\\x{0}-\\x{10ffff}]", "no"),
    ("json_schema", "{", "no JSON"),
    ("json_schema", "[1]", "must be an object"),
    ("json_schema", "false", "must be an object"),
    ("json_schema", '{"type": "nonsense"}', "nonsense"),
    ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
    ("json_schema", '{"$ref": "#"}', "no text"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "not"),
    ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', "minLength"),
    ("ebnf", "start ::= root2\nroot2 ::= [a]", "no rule `root`"),
    ("ebnf", "root ::= other", "line 1, column 10: rule `other` is not defined"),
    ("ebnf", 'root ::= "a\nroot2 ::= "b"', "line 1, column 10: this is not closed on its line"),
    ("ebnf", 'root ::= ("a"', "not closed"),
    ("ebnf", 'root ::= "a")', "not opened"),
    ("ebnf", "root ::= [z-a]", "backwards"),
    ("ebnf", "root ::= []", "nothing is in"),
    ("ebnf", 'root ::= "a"{3,2}', "holds nothing"),
    ("ebnf", 'root ::= "a"{99999}', "repetitions"),
    ("ebnf", 'root ::= "a" root ::= "b"', "defined twice"),
    ("ebnf", 'root ::= "\\q"', "\\q"),
    ("ebnf", 'root ::= (="a") "a"', "lookahead"),
    ("ebnf", "root ::= root", "no text"),
    ("ebnf", 'start: "a"', "expected `name ::=`"),
    ("ebnf", "", "no rule `root`"),
    ("ebnf", "root ::= " + "(" * 101 + '"a"' + ")" * 101, "groups within groups"),
]


@pytest.mark.parametrize(("kind", "text", "said"), WRONG)
def test_a_wrong_grammar_is_the_clients_error_with_a_reason(
    tiny: LlguidanceBackend, kind: str, text: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiled(tiny, kind, text)
    assert said.lower() in str(caught.value).lower()
    assert len(str(caught.value)) < 1500


def test_an_over_long_grammar_is_refused_before_anybody_reads_it() -> None:
    Grammar(GrammarKind.REGEX, "é" * (MAX_GRAMMAR_BYTES // 2))
    with pytest.raises(InvalidRequestError, match="bytes"):
        Grammar(GrammarKind.REGEX, "é" * (MAX_GRAMMAR_BYTES // 2) + "x")
    assert router_grammar.MAX_GRAMMAR_BYTES == MAX_GRAMMAR_BYTES


ENDLESS = json.dumps(
    {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{k}}}"} for k in range(5, 25)]}
)
"""Keeps the library busy for minutes."""

DOUBLING = 'root ::= r0\nr60 ::= "x"\n' + "".join(
    f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60)
)
"""One text, and a long one."""

HARMFUL = [
    ("json_schema", ENDLESS),
    ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
    ("json_schema", '{"properties":{"a":' * 120 + "{}" + "}}" * 120),
    ("regex", "(" * 60_000),
    ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    ("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"),
    ("ebnf", DOUBLING),
    ("ebnf", 'root ::= "' + "y" * 200_000 + '"'),
]  # fmt: skip


def own_backend(*, checkers: int = 1) -> LlguidanceBackend:
    """Of its own: what a test breaks is nobody else's."""
    return LlguidanceBackend(TINY, vocab_size=TINY_VOCAB, eos_token_ids=TINY_EOS, checkers=checkers)


@pytest.mark.parametrize(("kind", "text"), HARMFUL)
def test_a_harmful_grammar_ends_within_its_limits(kind: str, text: str) -> None:
    with closing(own_backend()) as backend:
        backend.warm_up()
        compiled(backend, "regex", "a")  # the process is there
        started, masks, problem = time.monotonic(), 0.0, ""
        try:
            grammar = backend.compile(Grammar(GrammarKind(kind), text), limit_s=2.0)
            matcher = grammar.matcher(Endings())
            for _ in range(20):
                before = time.monotonic()
                choices = allowed(backend, matcher, TINY_VOCAB)
                masks = max(masks, time.monotonic() - before)
                if matcher.error is not None:
                    raise matcher.error
                matcher.advance(choices[-1])
        except InvalidRequestError as error:
            problem = str(error)
        assert time.monotonic() - started < 10.0
        assert masks < 2.0
        assert len(problem) < 1500
        # Nothing is the worse for it.
        compiled(backend, "regex", "[a-z]+")


def test_other_grammars_are_compiled_while_one_takes_for_ever() -> None:
    backend = own_backend(checkers=2)
    errors: list[Exception] = []

    def endless() -> None:
        try:
            backend.compile(Grammar(GrammarKind.JSON_SCHEMA, ENDLESS), limit_s=3.0)
        except EngineError as error:
            errors.append(error)

    compiled(backend, "regex", "a")
    thread = threading.Thread(target=endless)
    thread.start()
    for i in range(5):
        compiled(backend, "regex", f"[a-z]{{{i}}}a")
    assert thread.is_alive()
    assert not errors
    thread.join(timeout=20)
    assert "not compiled within 3 s" in str(errors[0])
    backend.close()


def test_closing_ends_what_is_being_compiled() -> None:
    backend = own_backend()
    compiled(backend, "regex", "a")
    errors: list[Exception] = []

    def endless() -> None:
        try:
            backend.compile(Grammar(GrammarKind.JSON_SCHEMA, ENDLESS), limit_s=60.0)
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=endless)
    thread.start()
    time.sleep(0.3)
    backend.close()
    thread.join(timeout=10)
    assert [str(error) for error in errors] == ["the engine ends"]


def test_a_model_without_a_tokenizer_cannot_constrain_and_says_so(tmp_path: Path) -> None:
    for name, content in (("missing.json", None), ("tokenizer.json", "{}")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        backend = LlguidanceBackend(path, vocab_size=10, eos_token_ids=(), checkers=1)
        with pytest.raises(GrammarsUnavailableError, match="cannot be constrained"):
            compiled(backend, "regex", "a")
        backend.close()

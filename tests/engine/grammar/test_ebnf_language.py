"""The library's form of an EBNF grammar has the same language, whatever became a lexeme."""

import itertools
import json
import random

import pytest
from llguidance import LLMatcher

from engine.grammar.ebnf import Alt, Chars, Node, Ref, Repeat, Rules, Seq, parse_ebnf
from engine.grammar.ebnf_lark import to_lark
from engine.grammar.llguidance_backend import LlguidanceBackend
from engine.grammar.llguidance_source import LIMITS

LONGEST = 4
TEXTS = ["".join(p) for n in range(LONGEST + 1) for p in itertools.product("abc", repeat=n)]


def language(rules: Rules) -> frozenset[str]:
    """Texts of a, b and c up to LONGEST that belong to the grammar, by plain enumeration."""
    known: dict[str, frozenset[str]] = {name: frozenset() for name in rules}

    def joined(left: frozenset[str], right: frozenset[str]) -> frozenset[str]:
        return frozenset(a + b for a in left for b in right if len(a + b) <= LONGEST)

    def texts(node: Node) -> frozenset[str]:
        match node:
            case Chars(ranges):
                return frozenset(
                    c for c in "abc" if any(low <= ord(c) <= high for low, high in ranges)
                )
            case Ref(name):
                return known[name]
            case Alt(items):
                return frozenset().union(*map(texts, items))
            case Seq(items):
                found = frozenset({""})
                for item in items:
                    found = joined(found, texts(item))
                return found
            case Repeat(item, least, most):
                one, found = texts(item), frozenset({""})
                for _ in range(least):
                    found = joined(found, one)
                every, count = found, least
                while most is None or count < most:
                    found, count = joined(found, one), count + 1
                    if found <= every:
                        break
                    every |= found
                return every
            case _:
                raise TypeError(node)

    while True:
        larger = {name: texts(body) for name, body in rules.items()}
        if larger == known:
            return known["root"]
        known = larger


def random_side(rng: random.Random, depth: int = 3) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(['"a"', '"b"', '"ab"', '"abc"', "[ab]", "[a-c]", '"c"', '""', "[^a]"])
    if kind < 0.5:
        return rng.choice(["root", "x", "y"])
    parts = [random_side(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    if kind < 0.7:
        return " ".join(parts)
    if kind < 0.85:
        return "(" + " | ".join(parts) + ")"
    return f"({parts[0]})" + rng.choice(["*", "+", "?", "{2}", "{0,2}", "{1,}"])


def accepted(backend: LlguidanceBackend, lark: str) -> frozenset[str]:
    """Of TEXTS, those that the library takes, one character a token."""
    tokenizer = backend._loaded().tokenizer
    tokens = {char: tokenizer.tokenize_str(char)[0] for char in "abc"}
    start = LLMatcher(
        tokenizer, LLMatcher.grammar_from_lark("%llguidance {}\n" + lark), limits=LIMITS,
        log_level=0,
    )  # fmt: skip
    found = set()
    for text in TEXTS:
        matcher = start.deep_copy()
        taken = not text or matcher.consume_tokens([tokens[char] for char in text])
        if taken and matcher.is_accepting():
            found.add(text)
    return frozenset(found)


@pytest.mark.parametrize("start", range(0, 36, 12))
def test_random_grammars_keep_their_language(tiny: LlguidanceBackend, start: int) -> None:
    with_lexemes = 0
    for seed in range(start, start + 12):
        rng = random.Random(seed)
        source = "\n".join(
            f"{name} ::= {random_side(rng)} | {random_side(rng)}" for name in ("root", "x", "y")
        )
        rules = parse_ebnf(source)
        lark = to_lark(rules)
        wanted = language(rules)
        if wanted:
            assert accepted(tiny, lark) == wanted, source
        with_lexemes += any(len(line.split(": /", 1)[-1]) > 4 for line in lark.splitlines())
    assert with_lexemes > 3  # not all fell apart into characters


@pytest.mark.parametrize(
    ("source", "belong", "not_"),
    [
        # A lexer that takes all it can would never let these end.
        ('root ::= [a-c]+ "c"', {"ac", "ccc"}, {"c", "ab"}),
        ('root ::= x "c" | "a" root "b"\nx ::= [a-c]+', {"ac", "aacb"}, {"ab", "c"}),
        ('root ::= "ab" "c" | "abc" "a" | "b" root', {"abc", "abca", "babc"}, {"ab", "abcab"}),
        # Two lexemes for one text.
        ('root ::= x "a" | y "b" | "c" root "c"\nx ::= [a-c]\ny ::= [ab]', {"ab", "ca"}, {"cb"}),
        # Recursion at either end is repetition.
        ('root ::= ws "a" ws\nws ::= ([bc] ws)?', {"a", "bca", "abc"}, {"aa", "b"}),
        ('root ::= "a" | root "b"', {"a", "abbb"}, {"b", "aa"}),
        # Recursion through several rules that may be empty.
        ('root ::= x root y | ""\nx ::= "a"?\ny ::= "b"*', {"", "ab", "aabb", "b"}, {"ba", "c"}),
    ],
)  # fmt: skip
def test_what_belongs_to_a_grammar(
    tiny: LlguidanceBackend, source: str, belong: set[str], not_: set[str]
) -> None:
    rules = parse_ebnf(source)
    found = accepted(tiny, to_lark(rules))
    assert found == language(rules)
    assert belong <= found
    assert not not_ & found


def test_a_grammar_without_recursion_is_one_expression() -> None:
    lark = to_lark(parse_ebnf('root ::= y{2} "."\ny ::= x | "b"\nx ::= [a-z]+ ","'))
    assert lark.count("\n") == 1


def test_json_in_ebnf_is_read_in_few_lexemes(tiny: LlguidanceBackend) -> None:
    source = r"""
        root   ::= value
        value  ::= "{" ws (pair ("," ws pair)*)? "}" ws | "[" ws (value ("," ws value)*)? "]" ws
                 | string | number | ("true" | "false" | "null") ws   # and so on
        pair   ::= string ":" ws value
        string ::= "\"" ([^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
        number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
        ws     ::= ([ \t\n] ws)?
    """
    lark = to_lark(parse_ebnf(source))
    assert sum(line.startswith("L") for line in lark.splitlines()) < 12
    matcher = LLMatcher(
        tiny._loaded().tokenizer, LLMatcher.grammar_from_lark(lark), limits=LIMITS, log_level=0
    )
    text = json.dumps({"a": [1, -2.5e3, 'x\\"é', None, {"b": {}}], "": True}, indent=1)
    assert matcher.consume_tokens(tiny._loaded().tokenizer.tokenize_str(text))
    assert matcher.is_accepting()
    assert not matcher.consume_tokens(tiny._loaded().tokenizer.tokenize_str("}"))


def test_every_way_to_write_a_character() -> None:
    rules = parse_ebnf(
        r'root ::= "\x41\u00e9\U0001F600\n\"\\\/" [\]\-\^a-c] [a-] [^\x00-\U0010FFFE]'
        "\n # the end"
    )
    items = rules["root"]
    assert isinstance(items, Seq)
    literal = items.items[0]
    assert isinstance(literal, Seq)
    chars = [part for part in literal.items if isinstance(part, Chars)]
    assert "".join(chr(part.ranges[0][0]) for part in chars) == 'Aé😀\n"\\/'
    assert items.items[1] == Chars(((45, 45), (93, 94), (97, 99)))
    assert items.items[2] == Chars(((45, 45), (97, 97)))
    assert items.items[3] == Chars(((0x10FFFF, 0x10FFFF),))

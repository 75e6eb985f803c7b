"""Whatever is drawn under a grammar belongs to it, for every kind of grammar and of tokenizer."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from engine.grammar.backend import Endings
from engine.grammar.llguidance_backend import LlguidanceBackend
from router.tokenizer import TextCodec
from tests.engine.grammar.tokenizers import TINY, TINY_EOS, TINY_VOCAB
from tests.engine.grammar.walk import allowed, compiled, random_output

CODEC = TextCodec(Tokenizer.from_file(str(TINY)))
LIST_OF_PAIRS = r"""
    # a list of pairs, within lists
    root ::= "(" (item (", " item)*)? ")"
    item ::= root | name "=" [0-9]{1,4}
    name ::= [a-z]+ | "'" [^'\n]{1,6} "'"
"""


def text_of(tokens: list[int]) -> str:
    detokenizer = CODEC.detokenizer(prompt_ids=[77])
    return "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()


def tiny_outputs(
    backend: LlguidanceBackend, kind: str, text: str, *, seeds: range, most: int = 60
) -> list[str]:
    """Texts that came to an end."""
    grammar = compiled(backend, kind, text)
    outputs = [
        random_output(backend, grammar, vocab_size=TINY_VOCAB, eos=TINY_EOS, seed=seed, most=most)
        for seed in seeds
    ]
    return [text_of(tokens) for tokens, ended in outputs if ended]


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """Finite in length, so that random outputs come to an end."""
    simple: list[dict[str, Any]] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 1200},
        {"enum": ["red", "green", 3, None, True]},
        {"const": {"a": [1, 2]}},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-z]{1,3}[0-9]?$"},
        {"type": "string", "format": "ipv4"},
    ]
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(simple)
    if rng.random() < 0.3:
        low = rng.randint(0, 2)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if rng.random() < 0.2:
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    names = rng.sample(["name", "age", "ä b", 'quo"te', "list", "x"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def test_json_is_always_valid_against_its_schema(tiny: LlguidanceBackend) -> None:
    ended = 0
    for seed in range(20):
        schema = random_schema(random.Random(seed))
        for text in tiny_outputs(tiny, "json_schema", json.dumps(schema), seeds=range(3), most=120):
            jsonschema.validate(
                json.loads(text),
                schema,
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
            ended += 1
    assert ended > 30


@pytest.mark.parametrize("schema", ["true", "{}", '{"type": "object"}'])
def test_json_without_a_shape_is_still_json(tiny: LlguidanceBackend, schema: str) -> None:
    texts = tiny_outputs(tiny, "json_schema", schema, seeds=range(15), most=50)
    assert texts
    for text in texts:
        value = json.loads(text)
        assert schema != '{"type": "object"}' or isinstance(value, dict)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{2,5}(-[a-z]{2,5}){0,2}",
        r"\d{4}-(0[1-9]|1[0-2])",
        r"^(yes|no|it depends)$",
        r"[^\x00-\x1f]{1,6}é?",
        r"(?i)hello( \w{1,8}){1,3}",
        r"\"([^\"\\]|\\.)\"/[^/]",
    ],
)
def test_the_whole_output_matches_a_regular_expression(
    tiny: LlguidanceBackend, pattern: str
) -> None:
    texts = tiny_outputs(tiny, "regex", pattern, seeds=range(25))
    assert len(texts) > 10
    for text in texts:
        assert re.fullmatch(pattern, text, re.ASCII), text


def test_an_output_belongs_to_its_ebnf(tiny: LlguidanceBackend) -> None:
    texts = tiny_outputs(tiny, "ebnf", LIST_OF_PAIRS, seeds=range(40), most=50)
    assert len(texts) > 20

    def reduced(text: str) -> str:
        """With pairs, then lists of pairs, as `.`."""
        text = re.sub(r"(?:[a-z]+|'[^'\n]{1,6}')=[0-9]{1,4}", ".", text)
        while (shorter := re.sub(r"\((?:\.(?:, \.)*)?\)", ".", text)) != text:
            text = shorter
        return text

    for text in texts:
        assert reduced(text) == ".", text


def test_sentencepiece_tokens_make_the_same_texts(sentencepiece: LlguidanceBackend) -> None:
    tokenizer = Tokenizer.from_file(str(sentencepiece._file))
    before = tokenizer.token_to_id("x")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "a b": {"enum": [1, 2, "é"]}},
        "required": ["name", "a b"],
        "additionalProperties": False,
    }
    ended = 0
    for kind, text in (("json_schema", json.dumps(schema)), ("regex", "[a-c]{1,3} the é+[1-3]")):
        grammar = compiled(sentencepiece, kind, text)
        for seed in range(20):
            tokens, whole = random_output(
                sentencepiece, grammar, vocab_size=320, eos=(2,), seed=seed, most=150
            )
            # A text that goes on: the decoder would strip a blank at the very beginning.
            output = tokenizer.decode([before, *tokens])[1:]
            if whole and kind == "regex":
                assert re.fullmatch(text, output)
            elif whole:
                jsonschema.validate(json.loads(output), schema)
            ended += whole
    assert ended > 20


def test_end_tokens_may_come_exactly_where_the_text_is_complete(tiny: LlguidanceBackend) -> None:
    matcher = compiled(tiny, "regex", "(ab)+").matcher(Endings(allowed=frozenset({0, 2, 500})))
    a, b = CODEC_IDS["a"], CODEC_IDS["b"]
    assert not {0, 2, 500} & set(allowed(tiny, matcher, TINY_VOCAB))
    matcher.advance(a)
    assert not {0, 2, 500} & set(allowed(tiny, matcher, TINY_VOCAB))
    matcher.advance(b)
    assert {0, 2, 500} <= set(allowed(tiny, matcher, TINY_VOCAB))
    assert not matcher.is_complete


def test_endings_are_held_back_until_min_tokens_unless_nothing_else_may_come(
    tiny: LlguidanceBackend,
) -> None:
    a = CODEC_IDS["a"]
    ends = frozenset(TINY_EOS)
    matcher = compiled(tiny, "regex", "a+").matcher(
        Endings(allowed=ends, held_back=ends, min_tokens=2)
    )
    for length in range(4):
        choices = set(allowed(tiny, matcher, TINY_VOCAB))
        assert (ends <= choices) == (length >= 2)
        assert a in choices
        matcher.advance(a)


def test_without_end_tokens_an_output_is_complete_where_nothing_may_follow(
    tiny: LlguidanceBackend,
) -> None:
    never = [False, False]
    for pattern, complete in (("ab?", [False, True]), ("a|ab", [False, True]), ("ab*", never)):
        matcher = compiled(tiny, "regex", pattern).matcher(Endings())
        for char, wanted in zip("ab", complete, strict=True):
            assert not set(TINY_EOS) & set(allowed(tiny, matcher, TINY_VOCAB))
            matcher.advance(CODEC_IDS[char])
            assert matcher.is_complete is wanted, pattern


def test_a_token_that_does_not_belong_is_a_typed_error_and_masks_nothing_after(
    tiny: LlguidanceBackend,
) -> None:
    matcher = compiled(tiny, "regex", "[0-9]+").matcher(Endings())
    matcher.advance(CODEC_IDS["a"])
    assert matcher.error is not None
    assert matcher.error.code == "INTERNAL"
    assert "after 1 tokens" in str(matcher.error)
    assert not matcher.is_complete


CODEC_IDS = {char: Tokenizer.from_file(str(TINY)).encode(char).ids[0] for char in "ab"}

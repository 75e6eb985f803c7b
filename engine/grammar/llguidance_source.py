"""Grammars as llguidance reads them, and what it thinks of them.

Apart from `llguidance_backend`, because `check_process` must start quickly: no torch here.
"""

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, regex_to_lark

from engine.errors import InvalidRequestError
from engine.grammar.ebnf import parse_ebnf
from engine.grammar.ebnf_lark import to_lark
from engine.grammar.spec import Grammar, GrammarKind

LIMITS = LLParserLimits(
    # A mask takes at most some 20 ms; the library ends a grammar that would need more.
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    # Of building the lexer; some 20 ms.
    initial_lexer_fuel=1_000_000,
    # 1 to 2 KB each.
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    # 2,000 would be too few for objects of 500 optional properties.
    max_items_in_row=5_000,
    # Errors go to clients: without the parser's whole state.
    verbose_errors=False,
)

JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two tokens of JSON. Not more, because models that are kept from what they would like to
say tend to go on with blanks until max_tokens."""

_MAX_MESSAGE = 1_000
_EXCERPT = re.compile(r"\n\s*\d+ \| ")


_HEAD = '%llguidance {"no_forcing": true}\n'
"""Without: where only one text may follow, the library would write all of it out at each step to
tokenise it, and nothing bounds how long that text is. So every token that fits is allowed, in
whatever way the model likes to divide a text."""


def library_text(grammar: Grammar) -> str:
    """The grammar in the library's own notation; it may still be wrong (`check`).

    Raises `InvalidRequestError`.
    """
    if grammar.kind is GrammarKind.REGEX:
        # \d and \w are ASCII, as in JSON schemas.
        text = f"start: /{regex_to_lark(grammar.text, 'dw')}/\n"
    elif grammar.kind is GrammarKind.EBNF:
        text = to_lark(parse_ebnf(grammar.text))
    else:
        text = f"start: %json {json.dumps(_schema(grammar.text))}\n"
    return LLMatcher.grammar_from_lark(_HEAD + text)


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"the JSON schema is no JSON: {error}") from error
    if schema is True:  # JSON Schema's "anything"
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequestError("the JSON schema must be an object, or true")
    # A schema may carry options of the library; what it does not implement stays an error.
    return {**schema, "x-guidance": {"lenient": False, "whitespace_pattern": JSON_WHITESPACE}}


def check(text: str) -> None:
    """Raises `InvalidRequestError` where the library refuses `text` of `library_text`. May take
    very long, or take the process down: `checker` puts bounds around it."""
    problem = LLMatcher.validate_grammar(text, limits=LIMITS)
    if problem:
        raise InvalidRequestError(f"the grammar cannot be used: {plain(problem)}")


def plain(message: str) -> str:
    """What the library says, without excerpts of the text that only it has seen."""
    message = _EXCERPT.split(message)[0].removesuffix("<non-verbose/>").strip()
    return message[:_MAX_MESSAGE]

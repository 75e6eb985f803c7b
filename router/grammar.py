"""Grammars at the doors: their size and form. Whether one means anything, the workers find out."""

import json
from typing import Any, Literal

from protos.baton.v1 import inference_pb2
from router.request import invalid

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest grammar as UTF-8; the workers' bound, too."""

JSON_OBJECT = '{"type": "object"}'
"""Schema of any JSON object."""

GrammarKind = Literal["json_schema", "regex", "ebnf"]


def make_grammar(kind: GrammarKind, text: str, *, param: str) -> inference_pb2.Grammar:
    """The grammar for the workers.

    Args:
        kind: the language that `text` is written in.
        text: the grammar.
        param: the client's field, named in errors.

    Raises:
        BatonError: INVALID_ARGUMENT; too long, empty, or a schema that is no JSON.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise invalid(f"{param} is not valid Unicode: {error.reason}", param) from error
    if size > MAX_GRAMMAR_BYTES:
        raise invalid(f"{param} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are taken", param)
    if not text:
        raise invalid(f"{param} is empty: leave it out, or say what the output looks like", param)
    if kind == "json_schema":
        _check_json(text, param)
    return inference_pb2.Grammar(**{kind: text})


def _check_json(text: str, param: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is no JSON: {error}", param) from error
    if not isinstance(schema, dict) and schema is not True:
        raise invalid(f"{param} must be a JSON schema: an object, or true", param)


def schema_text(schema: dict[str, Any], *, param: str) -> str:
    """A schema that came as a part of a JSON body, as text. Order is kept: properties appear in it.

    Raises:
        BatonError: INVALID_ARGUMENT; it is nested too deeply.
    """
    try:
        return json.dumps(schema)
    except RecursionError as error:
        raise invalid(f"{param} is nested too deeply", param) from error


def check_grammar(grammar: inference_pb2.Grammar) -> inference_pb2.Grammar | None:
    """A grammar that came over gRPC; None where it says nothing.

    Raises:
        BatonError: INVALID_ARGUMENT.
    """
    kind = grammar.WhichOneof("kind")
    if kind is None:
        return None
    return make_grammar(kind, getattr(grammar, kind), param="grammar")

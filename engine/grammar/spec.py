"""What a request asks its output to look like."""

from dataclasses import dataclass
from enum import Enum

from engine.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 256 * 1024
"""Longest grammar as UTF-8. A longer one is refused before anybody looks into it; the router's
doors ask the same."""


class GrammarKind(Enum):
    """In which language a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """JSON text of a schema; `{}` is any JSON value."""
    REGEX = "regex"
    """A regular expression that the whole output matches."""
    EBNF = "ebnf"
    """Rules `name ::= ...`; the output is derived from `root`."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as it was sent; equal ones are compiled once."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        """Raises `InvalidRequestError` for an over-long one."""
        try:
            size = len(self.text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the grammar is not valid Unicode: {error.reason}"
            ) from error
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                f"the grammar ({self.kind.value}) has {size} bytes, at most {MAX_GRAMMAR_BYTES} "
                "are allowed"
            )

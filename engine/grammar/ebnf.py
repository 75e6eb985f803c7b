"""Reads grammars in the EBNF that constrained decoding is usually given (GBNF's).

    # what follows a hash is a comment
    root   ::= "{" pair ("," pair)* "}"
    pair   ::= [a-z]+ ":" number
    number ::= "-"? [0-9]{1,5} | "none"

A rule goes on until the next `name ::=`, over as many lines as it takes. There are literals in
double quotes, character classes (`[a-z]`, `[^"\\n]`), `.` for any character, groups, alternatives,
`*`, `+`, `?`, `{n}`, `{n,}`, `{n,m}`, and the escapes \\n \\r \\t \\xHH \\uHHHH \\UHHHHHHHH and
those of ``\\ " ' - [ ] ^ /``. Names are letters, digits, `_`, `-` and `.`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from engine.errors import InvalidRequestError

Ranges = tuple[tuple[int, int], ...]
"""Code points, both ends included; ascending, apart, and without surrogates."""

MAX_NESTING = 100
"""Groups within groups."""

MAX_REPEAT = 10_000
"""Largest number in braces."""

LAST_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Ref:
    name: str


@dataclass(frozen=True, slots=True)
class Seq:
    """All of them, one after another; none: the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of them; at least one."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    item: Node
    least: int
    most: int | None
    """None: without end."""


@dataclass(frozen=True, slots=True)
class Lexeme:
    """What a lexer reads at once; put in by `ebnf_lark`, never read from a grammar."""

    pattern: Node
    """Without references, and not matching the empty text."""
    source: Node
    """What it stands for in the grammar."""


Node = Chars | Ref | Seq | Alt | Repeat | Lexeme
Rules = dict[str, Node]

EMPTY = Seq(())
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_NUMBER = re.compile(r"[0-9]{1,9}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_PLAIN_ESCAPES = "\\\"'-[]^/"
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


def parse_ebnf(text: str) -> Rules:
    """The rules by name, `root` among them, in which every name is defined.

    Raises `InvalidRequestError` that names line and column.
    """
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise InvalidRequestError("the grammar (ebnf) has no rule `root`")
    return rules


def as_ranges(parts: list[tuple[int, int]]) -> Ranges:
    """In order, joined where they touch, surrogates cut out: these are no characters."""
    cut: list[tuple[int, int]] = []
    for low, high in parts:
        if low < _SURROGATES[0]:
            cut.append((low, min(high, _SURROGATES[0] - 1)))
        if high > _SURROGATES[1]:
            cut.append((max(low, _SURROGATES[1] + 1), high))
    joined: list[tuple[int, int]] = []
    for low, high in sorted(cut):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def _others(ranges: Ranges) -> Ranges:
    """Every character that is not in `ranges`."""
    gaps, start = [], 0
    for low, high in ranges:
        if low > start:
            gaps.append((start, low - 1))
        start = high + 1
    if start <= LAST_CODE_POINT:
        gaps.append((start, LAST_CODE_POINT))
    return as_ranges(gaps)


ANY = Chars(_others(()))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._nesting = 0
        self._used: dict[str, int] = {}
        """Names that rules refer to, and where first."""

    def rules(self) -> Rules:
        rules: Rules = {}
        self._skip_space()
        while self._at < len(self._text):
            start = self._at
            name = self._rule_head()
            if name is None:
                self._fail("expected `name ::=`")
            if name in rules:
                self._fail(f"rule `{name}` is defined twice", at=start)
            rules[name] = self._alternatives()
        for name, at in self._used.items():
            if name not in rules:
                self._fail(f"rule `{name}` is not defined", at=at)
        return rules

    def _rule_head(self) -> str | None:
        """`name ::=`, taken if it is there."""
        match = _NAME.match(self._text, self._at)
        if match is None:
            return None
        end = self._space_end(match.end())
        if not self._text.startswith("::=", end):
            return None
        self._at = self._space_end(end + 3)
        return match.group()

    def _alternatives(self) -> Node:
        items = [self._sequence()]
        while self._take("|"):
            items.append(self._sequence())
        return items[0] if len(items) == 1 else Alt(tuple(items))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            items.append(self._repeated(item))
        return items[0] if len(items) == 1 else Seq(tuple(items))

    def _item(self) -> Node | None:
        """The next one of a sequence; None at its end."""
        char = self._text[self._at : self._at + 1]
        if char == '"':
            return self._literal()
        if char == "[":
            return self._character_class()
        if char == ".":
            self._take(".")
            return ANY
        if char == "(":
            return self._group()
        match = _NAME.match(self._text, self._at)
        if match is not None:
            if self._text.startswith("::=", self._space_end(match.end())):
                return None  # the next rule
            self._used.setdefault(match.group(), self._at)
            self._at = self._space_end(match.end())
            return Ref(match.group())
        if char and char not in "|)":
            self._fail(f"unexpected {char!r}")
        if char == ")" and not self._nesting:
            self._fail("this parenthesis was not opened")
        return None

    def _group(self) -> Node:
        start = self._at
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            self._fail(f"more than {MAX_NESTING} groups within groups")
        self._take("(")
        if self._text.startswith("=", self._at):
            self._fail("lookahead is not supported")
        node = self._alternatives()
        if not self._take(")"):
            self._fail("this parenthesis is not closed", at=start)
        self._nesting -= 1
        return node

    def _repeated(self, item: Node) -> Node:
        while True:
            if self._take("*"):
                item = Repeat(item, 0, None)
            elif self._take("+"):
                item = Repeat(item, 1, None)
            elif self._take("?"):
                item = Repeat(item, 0, 1)
            elif self._take("{"):
                item = self._counted(item)
            else:
                return item

    def _counted(self, item: Node) -> Node:
        start = self._at
        least = self._number()
        most: int | None = least
        if self._take(","):
            most = None if self._text.startswith("}", self._at) else self._number()
        if not self._take("}"):
            self._fail("expected `}`")
        if most is not None and most < least:
            self._fail(f"{{{least},{most}}} holds nothing", at=start)
        return Repeat(item, least, most)

    def _number(self) -> int:
        match = _NUMBER.match(self._text, self._at)
        if match is None:
            self._fail("expected a number")
        value = int(match.group())
        if value > MAX_REPEAT:
            self._fail(f"more than {MAX_REPEAT} repetitions")
        self._at = self._space_end(match.end())
        return value

    def _literal(self) -> Node:
        start = self._at
        self._at += 1
        chars: list[Node] = []
        while not self._text.startswith('"', self._at):
            code = self._character(start)
            chars.append(Chars(((code, code),)))
        self._at = self._space_end(self._at + 1)
        return chars[0] if len(chars) == 1 else Seq(tuple(chars))

    def _character_class(self) -> Node:
        start = self._at
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        parts: list[tuple[int, int]] = []
        while not self._text.startswith("]", self._at):
            low = high = self._character(start)
            ahead = self._text[self._at : self._at + 2]
            if len(ahead) == 2 and ahead[0] == "-" and ahead[1] != "]":
                self._at += 1
                high = self._character(start)
                if high < low:
                    self._fail("a range of characters runs backwards")
            parts.append((low, high))
        self._at = self._space_end(self._at + 1)
        ranges = as_ranges(parts)
        if negated:
            ranges = _others(ranges)
        if not ranges:
            self._fail("a character class that nothing is in", at=start)
        return Chars(ranges)

    def _character(self, start: int) -> int:
        """One character of a literal or a class that began at `start`."""
        char = self._text[self._at : self._at + 1]
        if char in ("", "\n"):
            self._fail("this is not closed on its line", at=start)
        self._at += 1
        if char != "\\":
            return ord(char)
        escape = self._text[self._at : self._at + 1]
        self._at += 1
        if escape in _ESCAPES:
            return ord(_ESCAPES[escape])
        if escape and escape in _PLAIN_ESCAPES:
            return ord(escape)
        if escape in _HEX_ESCAPES:
            digits = self._text[self._at : self._at + _HEX_ESCAPES[escape]]
            if re.fullmatch(r"[0-9A-Fa-f]+", digits) and len(digits) == _HEX_ESCAPES[escape]:
                code = int(digits, 16)
                self._at += len(digits)
                if code <= LAST_CODE_POINT and not _SURROGATES[0] <= code <= _SURROGATES[1]:
                    return code
        self._fail(f"\\{escape} is no character that can be written so", at=self._at - 2)

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at = self._space_end(self._at + len(text))
        return True

    def _skip_space(self) -> None:
        self._at = self._space_end(self._at)

    def _space_end(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        return at if match is None else match.end()

    def _fail(self, message: str, *, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        raise InvalidRequestError(
            f"the grammar (ebnf) is wrong at line {line}, column {column}: {message}"
        )

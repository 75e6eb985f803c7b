"""Writes an EBNF grammar in the library's own notation (llguidance's Lark), without changing its
language.

The library reads text with a lexer first, which is greedy: it never ends a lexeme that could go
on. EBNF has no lexer; `root ::= [a-z]+ "end"` holds `friend`. So what may become one lexeme has to
be proven: wherever it ends, no lexeme that could have begun at the same place would take a
character that may follow. What fails is divided, down to single characters, which are always
right and only slower. A grammar without recursion becomes one regular expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.errors import InvalidRequestError
from engine.grammar.ebnf import EMPTY, Alt, Chars, Lexeme, Node, Ranges, Ref, Repeat, Rules, Seq
from engine.grammar.ebnf_shapes import (
    as_repetition,
    inlined,
    nullable,
    references,
    walk,
    without_empty,
)
from engine.grammar.lexeme_automaton import Automaton, CharSet, CharSets, Work

MAX_LEXEME_NODES = 5_000
"""Larger expressions are divided rather than written as one."""

MAX_WORK = 500_000
"""Pairs of characters that are compared to find lexemes; then all are single characters. Some 2 s.
"""


def to_lark(rules: Rules) -> str:
    """The grammar's text for the library. Raises `InvalidRequestError` where it is too large."""
    rules = {name: as_repetition(name, body) for name, body in rules.items()}
    sizes = _expanded_sizes(rules)
    if (sizes["root"] or MAX_LEXEME_NODES + 1) <= MAX_LEXEME_NODES:
        return f"start: /{_regex(inlined(rules['root'], rules))}/\n"
    cover = _Cover(rules, sizes)
    work = Work(MAX_WORK)
    while True:
        bodies = cover.bodies()
        too_greedy = set() if cover.single_characters else _too_greedy(bodies, work)
        if not too_greedy:
            return _write(bodies)
        cover.divided |= too_greedy
        cover.single_characters = work.left < 0


def _expanded_sizes(rules: Rules) -> dict[str, int | None]:
    """Nodes of each rule with its references written out; None: it is recursive."""
    sizes: dict[str, int | None] = {}
    refers = {name: references(body) for name, body in rules.items()}
    pending = dict(refers)
    # Rules whose references are all known; what is left in the end is on a cycle or reaches one.
    while ready := [name for name, used in pending.items() if used <= sizes.keys()]:
        for name in ready:
            del pending[name]
            sizes[name] = min(_size(rules[name], sizes) or 0, 10**9)
    return sizes | dict.fromkeys(pending)


def _size(node: Node, sizes: dict[str, int | None]) -> int | None:
    """Nodes with references written out; None: one of them is recursive."""
    total = 0
    for below in walk(node):
        size = sizes.get(below.name) if isinstance(below, Ref) else 1
        if size is None:
            return None
        total += size
    return total


class _Cover:
    """Which parts of the grammar are lexemes."""

    def __init__(self, rules: Rules, sizes: dict[str, int | None]) -> None:
        self._rules = rules
        self._sizes = sizes
        self.divided: set[Node] = set()
        """Parts that must not be one lexeme."""
        self.single_characters = False
        """Every lexeme is one character."""

    def bodies(self) -> dict[str, Node]:
        """What is left of the rules that `root` reaches, `root` first."""
        bodies: dict[str, Node] = {}
        pending = ["root"]
        while pending:
            name = pending.pop()
            if name not in bodies:
                bodies[name] = self._cover(self._rules[name])
                pending.extend(sorted(references(bodies[name])))
        return bodies

    def _is_lexeme(self, node: Node) -> bool:
        if isinstance(node, Chars):
            return True
        if self.single_characters or node in self.divided:
            return False
        size = _size(node, self._sizes)
        return size is not None and size <= MAX_LEXEME_NODES

    def _cover(self, node: Node) -> Node:
        if self._is_lexeme(node):
            return self._lexeme(node)
        match node:
            case Seq(items):
                return Seq(tuple(self._cover_sequence(items, node)))
            case Alt(items):
                return Alt(tuple(map(self._cover, items)))
            case Repeat(item, least, most):
                return Repeat(self._cover(item), least, most)
            case Ref():
                return node
            case _:
                raise TypeError(f"unexpected {node!r}")

    def _cover_sequence(self, items: tuple[Node, ...], whole: Node) -> Iterable[Node]:
        """Neighbours that are regular become one lexeme, unless that was too greedy."""
        run: list[Node] = []
        divided = whole in self.divided
        for item in items:
            if not divided and self._is_lexeme(item):
                run.append(item)
                continue
            yield from self._cover_run(run)
            run = []
            yield self._cover(item)
        yield from self._cover_run(run)

    def _cover_run(self, run: list[Node]) -> Iterable[Node]:
        if len(run) > 1 and self._is_lexeme(together := Seq(tuple(run))):
            yield self._lexeme(together)
        else:
            yield from map(self._cover, run)

    def _lexeme(self, node: Node) -> Node:
        whole = inlined(node, self._rules)
        pattern = without_empty(whole)
        if pattern is None:
            return EMPTY
        lexeme = Lexeme(pattern, node)
        return Repeat(lexeme, 0, 1) if nullable(whole) else lexeme


# ---- is it safe? --------------------------------------------------------------------------------


def _too_greedy(bodies: dict[str, Node], work: Work) -> set[Node]:
    """Sources of lexemes that would swallow what belongs to the next one."""
    lexemes = {
        below for body in bodies.values() for below in walk(body)
        if isinstance(below, Lexeme)
    }  # fmt: skip
    sets = CharSets(
        below.ranges
        for lexeme in lexemes
        for below in walk(lexeme.pattern)
        if isinstance(below, Chars)
    )
    automata = {lexeme: Automaton(lexeme.pattern, sets.of) for lexeme in lexemes}
    follow = _Follow(bodies, automata).of_lexemes
    found: set[Node] = set()
    composite = [lexeme for lexeme in lexemes if not isinstance(lexeme.source, Chars)]
    for other in composite:
        for lexeme in lexemes:
            if automata[lexeme].read_on(automata[other], follow[lexeme], work):
                found.add(other.source)
                break
    return found


class _Follow:
    """Characters that may come after each lexeme, by the usual fixed points."""

    def __init__(self, bodies: dict[str, Node], automata: dict[Lexeme, Automaton]) -> None:
        self._automata = automata
        self._first = dict.fromkeys(bodies, 0)
        self._empty = dict.fromkeys(bodies, False)
        self._rules = dict.fromkeys(bodies, 0)
        self.of_lexemes: dict[Lexeme, CharSet] = dict.fromkeys(automata, 0)
        self._until_stable(bodies, self._update_first)
        self._until_stable(bodies, lambda name, body: self._spread(body, self._rules[name]))

    @staticmethod
    def _until_stable(bodies: dict[str, Node], update: Callable[[str, Node], bool]) -> None:
        while sum(update(name, body) for name, body in bodies.items()):
            pass

    def _update_first(self, name: str, body: Node) -> bool:
        before = (self._first[name], self._empty[name])
        self._first[name], self._empty[name] = self._begin(body)
        return before != (self._first[name], self._empty[name])

    def _begin(self, node: Node) -> tuple[CharSet, bool]:
        """(characters it may begin with, whether it may be empty)."""
        match node:
            case Lexeme():
                return self._automata[node].first_chars, False
            case Ref(name):
                return self._first[name], self._empty[name]
            case Repeat(item, least, most):
                first, empty = self._begin(item)
                return (first, empty or least == 0) if most != 0 else (0, True)
            case Alt(items):
                begins = [self._begin(item) for item in items]
                return _union(first for first, _ in begins), any(empty for _, empty in begins)
            case Seq(items):
                found = 0
                for item in items:
                    first, empty = self._begin(item)
                    found |= first
                    if not empty:
                        return found, False
                return found, True
            case Chars():
                raise TypeError("a character outside of every lexeme")

    def _spread(self, node: Node, after: CharSet) -> bool:
        """Notes that `after` may come after `node`; True: something is new."""
        match node:
            case Lexeme():
                before = self.of_lexemes[node]
                self.of_lexemes[node] |= after
                return before != self.of_lexemes[node]
            case Ref(name):
                before = self._rules[name]
                self._rules[name] |= after
                return before != self._rules[name]
            case Repeat(item, _, most):
                first, _ = self._begin(item)
                return self._spread(item, after if most == 1 else after | first)
            case Alt(items):
                return sum(self._spread(item, after) for item in items) > 0
            case Seq(items):
                changed = False
                for item in reversed(items):
                    changed = self._spread(item, after) or changed
                    first, empty = self._begin(item)
                    after = after | first if empty else first
                return changed
            case Chars():
                raise TypeError("a character outside of every lexeme")


def _union(sets: Iterable[CharSet]) -> CharSet:
    found = 0
    for chars in sets:
        found |= chars
    return found


# ---- writing ------------------------------------------------------------------------------------


def _write(bodies: dict[str, Node]) -> str:
    names = {name: f"r{i}" for i, name in enumerate(bodies)} | {"root": "start"}
    terminals: dict[str, str] = {}

    def rule(node: Node) -> str:
        match node:
            case Lexeme(pattern):
                return terminals.setdefault(_regex(pattern), f"L{len(terminals)}")
            case Ref(name):
                return names[name]
            case Seq(items):
                return " ".join(map(grouped, items)) or '""'
            case Alt(items):
                return " | ".join(map(grouped, items))
            case Repeat(item, least, most):
                return grouped(item) + _count(least, most)
            case Chars():
                raise TypeError("a character outside of every lexeme")

    def grouped(node: Node) -> str:
        text = rule(node)
        return text if isinstance(node, Lexeme | Ref) else f"({text})"

    lines = [f"{names[name]}: {rule(body)}\n" for name, body in bodies.items()]
    lines.extend(f"{name}: /{regex}/\n" for regex, name in terminals.items())
    return "".join(lines)


def _count(least: int, most: int | None) -> str:
    if most is None and least <= 1:
        return "*+"[least]
    if (least, most) == (0, 1):
        return "?"
    return f"{{{least},{'' if most is None else most}}}"


def _regex(node: Node) -> str:
    """A node without references as a regular expression of the library."""
    match node:
        case Chars(ranges):
            return _class(ranges)
        case Seq(items):
            return "".join(f"(?:{_regex(i)})" if isinstance(i, Alt) else _regex(i) for i in items)
        case Alt(items):
            return "|".join(map(_regex, items))
        case Repeat(item, least, most):
            text = _regex(item)
            return (text if isinstance(item, Chars) else f"(?:{text})") + _count(least, most)
        case _:
            raise InvalidRequestError("the grammar (ebnf) is too large")


def _class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _code(ranges[0][0])
    parts = (_code(a) if a == b else f"{_code(a)}-{_code(b)}" for a, b in ranges)
    return "[" + "".join(parts) + "]"


def _code(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:x}}}"

"""Lexemes as automata, to see whether a greedy lexer would read past the end of one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.grammar.ebnf import Alt, Chars, Node, Ranges, Repeat, Seq
from engine.grammar.ebnf_shapes import count_positions

EXPANDED_POSITIONS = 64
"""A counted repetition is written out up to this many characters, and taken for one without an end
beyond: that overstates what a lexer might read, so that nothing unsafe passes for safe."""

MAX_PAIRS = 20_000
"""Pairs of positions that a comparison looks at; more count as unsafe."""

CharSet = int
"""A bit for each class of characters that the grammar does not tell apart."""


class CharSets:
    """Sets of characters as integers; one bit a run of code points that no class of the grammar
    divides."""

    def __init__(self, all_ranges: Iterable[Ranges]) -> None:
        cuts = {edge for ranges in all_ranges for low, high in ranges for edge in (low, high + 1)}
        self._index = {edge: i for i, edge in enumerate(sorted(cuts))}

    def of(self, ranges: Ranges) -> CharSet:
        found = 0
        for low, high in ranges:
            found |= (1 << self._index[high + 1]) - (1 << self._index[low])
        return found


@dataclass(slots=True)
class Work:
    """How many pairs of positions may still be looked at; a number and not a time, so that every
    worker writes a grammar in the same way."""

    left: int


class Automaton:
    """Glushkov's: one state for each place of a character in the expression."""

    def __init__(self, node: Node, char_set: Callable[[Ranges], CharSet]) -> None:
        """`node` has no references, and does not match the empty text."""
        self._char_set = char_set
        self.chars: list[CharSet] = []
        self.after: list[set[int]] = []
        _, self.first, self.last = self._add(node)

    @property
    def first_chars(self) -> CharSet:
        return self._union(self.first)

    def _union(self, states: Iterable[int]) -> CharSet:
        found = 0
        for state in states:
            found |= self.chars[state]
        return found

    def _add(self, node: Node) -> tuple[bool, set[int], set[int]]:
        """(matches the empty text, states it begins with, states it ends with)."""
        match node:
            case Chars(ranges):
                self.chars.append(self._char_set(ranges))
                self.after.append(set())
                state = {len(self.chars) - 1}
                return False, state, state
            case Seq(items):
                return self._add_sequence(items)
            case Alt(items):
                parts = [self._add(item) for item in items]
                first = set().union(*(part[1] for part in parts))
                last = set().union(*(part[2] for part in parts))
                return any(part[0] for part in parts), first, last
            case Repeat(item, least, most):
                return self._add_repeat(item, least, most)
            case _:
                raise TypeError(f"a lexeme cannot hold {node!r}")

    def _add_sequence(self, items: Iterable[Node]) -> tuple[bool, set[int], set[int]]:
        empty, first, last = True, set[int](), set[int]()
        for item in items:
            item_empty, item_first, item_last = self._add(item)
            for state in last:
                self.after[state] |= item_first
            first = first | item_first if empty else first
            last = last | item_last if item_empty else item_last
            empty = empty and item_empty
        return empty, first, last

    def _add_repeat(
        self, item: Node, least: int, most: int | None
    ) -> tuple[bool, set[int], set[int]]:
        if most == 0:
            return True, set(), set()
        if most is not None and count_positions(item) * most <= EXPANDED_POSITIONS:
            optional: Node | None = None
            for _ in range(most - least):
                optional = Repeat(item if optional is None else Seq((item, optional)), 0, 1)
            if most == 1 and optional is not None:
                empty, first, last = self._add(item)
                return True, first, last
            copies = (item,) * least + (() if optional is None else (optional,))
            return self._add_sequence(copies)
        empty, first, last = self._add(item)
        for state in last:
            self.after[state] |= first
        return empty or least == 0, first, last

    def read_on(self, other: "Automaton", stop: CharSet, work: "Work") -> bool:
        """Whether, somewhere that this lexeme ends, `other` (begun at the same place) would take
        one more character of `stop`; also if that takes too much work to tell."""
        pending = [
            (a, b) for a in self.first for b in other.first if self.chars[a] & other.chars[b]
        ]
        seen = set(pending)
        while pending:
            work.left -= 1
            if work.left < 0 or len(seen) > MAX_PAIRS:
                return True
            a, b = pending.pop()
            if a in self.last and other._union(other.after[b]) & stop:
                return True
            for next_a in self.after[a]:
                for next_b in other.after[b]:
                    pair = (next_a, next_b)
                    if pair not in seen and self.chars[next_a] & other.chars[next_b]:
                        seen.add(pair)
                        pending.append(pair)
        return False

"""What the analysis of an EBNF grammar asks of its nodes."""

from collections.abc import Iterable, Iterator

from engine.grammar.ebnf import EMPTY, Alt, Chars, Node, Ref, Repeat, Rules, Seq


def sequence(items: Iterable[Node]) -> Node:
    """Their sequence, in its plainest form."""
    flat: list[Node] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Seq) else (item,))
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alternatives(items: Iterable[Node]) -> Node:
    """Their alternatives, each once, in the plainest form."""
    flat: dict[Node, None] = {}
    for item in items:
        flat.update(dict.fromkeys(item.items if isinstance(item, Alt) else (item,)))
    return next(iter(flat)) if len(flat) == 1 else Alt(tuple(flat))


def children(node: Node) -> tuple[Node, ...]:
    match node:
        case Seq(items) | Alt(items):
            return items
        case Repeat(item):
            return (item,)
        case _:
            return ()


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(children(node))


def references(node: Node) -> set[str]:
    return {below.name for below in walk(node) if isinstance(below, Ref)}


def inlined(node: Node, rules: Rules) -> Node:
    """The node without references; those rules must not be recursive."""
    match node:
        case Ref(name):
            return inlined(rules[name], rules)
        case Seq(items):
            return sequence(inlined(item, rules) for item in items)
        case Alt(items):
            return alternatives(inlined(item, rules) for item in items)
        case Repeat(item, least, most):
            return Repeat(inlined(item, rules), least, most)
        case _:
            return node


def nullable(node: Node) -> bool:
    """Whether a node without references matches the empty text."""
    match node:
        case Seq(items):
            return all(map(nullable, items))
        case Alt(items):
            return any(map(nullable, items))
        case Repeat(item, least, most):
            return least == 0 or most == 0 or nullable(item)
        case _:
            return False


def without_empty(node: Node) -> Node | None:
    """What a node without references matches, the empty text excepted; None: nothing."""
    match node:
        case Seq(items):
            found: list[Node] = []
            for i, item in enumerate(items):
                rest = without_empty(item)
                if rest is not None:
                    found.append(sequence((rest, *items[i + 1 :])))
                if not nullable(item):
                    break
            return alternatives(found) if found else None
        case Alt(items):
            found = [rest for item in items if (rest := without_empty(item)) is not None]
            return alternatives(found) if found else None
        case Repeat(item, least, most):
            rest = without_empty(item)
            if rest is None or most == 0:
                return None
            if rest == item and least > 0:
                return node
            fewer = max(0, least - 1) if rest == item else 0
            return sequence((rest, Repeat(item, fewer, None if most is None else most - 1)))
        case _:
            return node


def as_repetition(name: str, body: Node) -> Node:
    """`body` of rule `name` as a repetition, where all that makes it recursive is a reference to
    itself at the end (or at the beginning) of alternatives: `ws ::= ([ \\t] ws)?` is `[ \\t]*`."""
    if name not in references(body):
        return body
    options = [_items(option) for option in _options(body)]
    for last in (True, False):
        again: list[Node] = []
        ends: list[Node] = []
        for items in options:
            if items and items[-1 if last else 0] == Ref(name):
                again.append(sequence(items[:-1] if last else items[1:]))
            else:
                ends.append(sequence(items))
        if ends and not any(name in references(node) for node in (*again, *ends)):
            loop = Repeat(alternatives(again), 0, None)
            end = alternatives(ends)
            return sequence((loop, end) if last else (end, loop))
    return body


def _options(node: Node) -> tuple[Node, ...]:
    match node:
        case Alt(items):
            return tuple(option for item in items for option in _options(item))
        case Repeat(item, 0, 1):
            return (*_options(item), EMPTY)
        case _:
            return (node,)


def _items(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Seq) else (node,)


def count_positions(node: Node) -> int:
    """Characters that a node without references is made of."""
    return sum(1 for below in walk(node) if isinstance(below, Chars))

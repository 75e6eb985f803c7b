"""Which running requests give way to a more important one (scheduling.md section 3)."""

from collections.abc import Callable, Iterable

from engine.memory.prefix_cache import TreeNode
from engine.scheduler.req import Req


def choose_victims(
    candidates: Iterable[Req], *, page_size: int, enough: Callable[[list[Req], int], bool]
) -> list[Req]:
    """The least important and newest of `candidates`, as many as it takes; none where all of them
    would not do. `enough` is asked after each with the victims so far and the tokens that their
    end makes free or evictable. One that has finished is no candidate: its pages are given back
    already.
    """
    order = sorted(
        (req for req in candidates if not req.finished()),
        key=lambda req: (req.priority, req.t_arrival, req.arrival_order),
    )
    victims: list[Req] = []
    freed = FreedTokens(page_size)
    while order:
        victim = order.pop()
        victims.append(victim)
        freed.add(victim)
        if enough(victims, freed.tokens):
            return victims
    return []


class FreedTokens:
    """Counts what becomes free or evictable when requests let go of their pages, before they do:
    their own pages, and those of the tree that nobody else locks.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._locks: dict[TreeNode, int] = {}
        """Locks that are left on nodes once the victims are gone."""
        self.tokens = 0

    def add(self, victim: Req) -> None:
        pages = len(victim.pages) - victim.tree_len // self._page_size
        node = victim.last_node
        while node is not None and node.parent is not None:
            left = self._locks[node] = self._locks.get(node, node.lock_ref) - 1
            if left == 0:
                pages += len(node.pages)
            node = node.parent
        self.tokens += pages * self._page_size

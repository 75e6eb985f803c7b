"""Requests that wait, in the policy's order, at a cost that does not grow with their number.

A list would be sorted anew in every pass and searched at every removal. Here each request is given
its key when it comes (arrival, priority: nothing that changes while it waits), stands in a heap by
it, and is marked as gone when it leaves: coming and going cost O(log n), a look at the first k
costs O(k log k).
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from engine.errors import EngineError
from engine.scheduler.req import Req

Key = tuple[float, ...]
"""Smaller goes first."""

_COMPACT_ABOVE: Final = 64
"""Dead entries that are not worth a rebuild."""


class _Place:
    """A request's stay in the queue; empty once it has left."""

    __slots__ = ("entry", "req")

    def __init__(self, req: Req) -> None:
        self.req: Req | None = req
        self.entry: tuple[Key, int, _Place] = ((), 0, self)


_Entry = tuple[Key, int, _Place]


class WaitingQueue:
    """Iteration and `in (...)` see every request once; `in_order` sees the first ones first."""

    def __init__(
        self, key: Callable[[Req], Key], *, displaces: Callable[[Req], Key] | None = None
    ) -> None:
        """`displaces`: the order in which requests give way to a more important newcomer, largest
        first; None where none does.
        """
        self._key = key
        self._rank = displaces
        self._places: dict[Req, _Place] = {}
        self._heap: list[_Entry] = []
        self._least: list[_Entry] = []
        self._entries = 0
        self.version = 0
        """Changes whenever somebody comes or goes."""
        self.num_tokens = 0
        """Prompt and output tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, req: Req) -> bool:
        return req in self._places

    def __iter__(self) -> Iterator[Req]:
        """In the order in which they came here."""
        return iter(self._places)

    def __repr__(self) -> str:
        return f"WaitingQueue({list(self.in_order())})"

    def append(self, req: Req) -> None:
        """Raises `EngineError` for one that waits already."""
        if req in self._places:
            raise EngineError(f"request {req.rid} waits already")
        self.version += 1
        self._entries += 1
        self.num_tokens += req.seqlen
        place = self._places[req] = _Place(req)
        place.entry = (self._key(req), self._entries, place)
        self._heap = self._compact(self._heap)
        heapq.heappush(self._heap, place.entry)
        if self._rank is not None and req.retraction_count == 0:
            self._least = self._compact(self._least)
            rank = tuple(-part for part in self._rank(req))
            heapq.heappush(self._least, (rank, -self._entries, place))

    def extend(self, reqs: Iterable[Req]) -> None:
        for req in reqs:
            self.append(req)

    def remove(self, req: Req) -> None:
        """Raises `EngineError` for one that does not wait here."""
        place = self._places.pop(req, None)
        if place is None:
            raise EngineError(f"request {req.rid} does not wait")
        place.req = None
        self.version += 1
        self.num_tokens -= req.seqlen

    def in_order(self) -> Iterator[Req]:
        """From the first on. Requests may leave meanwhile; none may come before the iteration is
        over, which raises `EngineError`.
        """
        _drop_dead(self._heap)
        heap, came = self._heap, self._entries
        # The heap's own shape gives the order: after an entry, its two children are candidates.
        candidates = [(heap[0], 0)] if heap else []
        while candidates:
            if self._entries != came:
                raise EngineError("a request was queued while the queue was being looked through")
            entry, index = heapq.heappop(candidates)
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heapq.heappush(candidates, (heap[child], child))
            if entry[2].req is not None:
                yield entry[2].req

    def first(self) -> Req | None:
        """The one that `in_order` begins with."""
        _drop_dead(self._heap)
        return self._heap[0][2].req if self._heap else None

    def least_important(self) -> Req | None:
        """The one that gives way first. A request that was retracted never does: its client has
        tokens of it already.
        """
        _drop_dead(self._least)
        return self._least[0][2].req if self._least else None

    def _compact(self, heap: list[_Entry]) -> list[_Entry]:
        if len(heap) <= 2 * len(self._places) + _COMPACT_ABOVE:
            return heap
        alive = [entry for entry in heap if entry[2].req is not None]
        heapq.heapify(alive)
        return alive


def _drop_dead(heap: list[_Entry]) -> None:
    while heap and heap[0][2].req is None:
        heapq.heappop(heap)

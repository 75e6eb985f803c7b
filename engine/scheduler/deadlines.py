"""Which waiting requests nobody waits for any more, without looking at those that are in time."""

import heapq
import weakref
from typing import Final

from engine.scheduler.req import Req

_COMPACT_ABOVE: Final = 1024


class Deadlines:
    """A heap of moments. What has become of a request meanwhile is the caller's to see: one that
    was admitted or has ended stays in the heap until its moment comes, without being kept alive.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, weakref.ref[Req]]] = []
        self._entries = 0
        self._compact_at = _COMPACT_ABOVE

    def watch(self, req: Req, at: float | None) -> None:
        """`at`: `time.monotonic()` seconds; None: never."""
        if at is None:
            return
        self._entries += 1
        heapq.heappush(self._heap, (at, self._entries, weakref.ref(req)))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if _may_wait(entry[2]())]
            heapq.heapify(self._heap)
            self._compact_at = max(_COMPACT_ABOVE, 2 * len(self._heap))

    def take_expired(self, now: float) -> list[Req]:
        """Those whose moment has come, once each call to `watch`; the earliest first."""
        expired: list[Req] = []
        while self._heap and self._heap[0][0] <= now:
            req = heapq.heappop(self._heap)[2]()
            if req is not None and not req.finished():
                expired.append(req)
        return expired


def _may_wait(req: Req | None) -> bool:
    return req is not None and not req.finished()

"""A drain's clock: begun by an operator, a signal or a pod's end, and given less time by any of
them, never more.
"""

import asyncio
import math
import time

POLL_S = 0.2
"""How soon a drain notices that it was given less time."""


class DrainClock:
    """Whether a worker drains, has drained, and until when it may take for it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        """No new request is taken."""
        self.done = asyncio.Event()
        """The engine holds nothing for any request."""
        self._until = math.inf

    def begin(self, limit_s: float) -> None:
        """May be called again: of several limits the earliest counts."""
        self._until = min(self._until, time.monotonic() + limit_s)
        self.begun.set()

    def start_again(self, limit_s: float) -> None:
        """A new limit in place of the one that has passed."""
        self._until = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Until its end; below 0 once that has passed."""
        return self._until - time.monotonic()

    async def in_time(self) -> bool:
        """Waits until the drain is done or its time is over; whether it is done."""
        while (left_s := self.left_s) > 0:
            try:
                await asyncio.wait_for(self.done.wait(), min(left_s, POLL_S))
            except TimeoutError:
                continue
            return True
        return self.done.is_set()

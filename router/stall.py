"""Notices a client that stopped reading, at the cost of two assignments a write."""

import asyncio
from types import TracebackType


class StallGuard:
    """Ends the block's task with TimeoutError once one write in it has blocked for too long.

    One slow timer looks at a time stamp: `asyncio.timeout` around every write took some 25 µs a
    token under the profiler. A stall is noticed after 1 to 1.5 limits.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._since: float | None = None
        self._stalled = False
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "StallGuard":
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(self.limit_s / 2, self._look)
        return self

    def begin(self) -> None:
        """A write begins."""
        self._since = self._loop.time()

    def end(self) -> None:
        """It went through."""
        self._since = None

    def _look(self) -> None:
        if self._since is not None and self._loop.time() - self._since >= self.limit_s:
            if self._task is not None:
                self._stalled = True
                self._task.cancel()
        else:
            self._timer = self._loop.call_later(self.limit_s / 2, self._look)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._stalled or self._task is None:
            return
        # As in asyncio.timeout: our own cancellation becomes an error, another one passes.
        if self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise TimeoutError(f"the reader took nothing for {self.limit_s:g} s") from error

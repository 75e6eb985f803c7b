"""Moments of a transfer, for whoever wants to know where its time goes."""

from collections.abc import Callable

Trace = Callable[[str, str], None]
"""Called with a request and one of the events below, as it happens, by the transfer thread."""

STARTED, WRITTEN, HEARD = "started", "written", "heard"
"""Sender: a write of whole pages was begun; it has ended. Receiver: pages were announced."""


def no_trace(request_id: str, event: str) -> None:
    """Nobody wants to know."""

"""What transfers have done since the start, by the transport that carried them.

Kept on the scheduler's thread, where a transfer begins (a ticket is granted or opened) and where
its end is learnt; the transfer thread is not asked.
"""

from collections import Counter
from dataclasses import dataclass, field

from kvtransfer.links import Clock
from kvtransfer.states import TransferFailure
from observability.histogram import ITL_S, Histogram


@dataclass(slots=True)
class TransportTally:
    """Of one transport."""

    bytes: int = 0
    """Moved by transfers that completed."""
    seconds: Histogram = field(default_factory=lambda: Histogram(ITL_S))
    """From the ticket to the last page's acknowledgement, the computation of the prompt included:
    of transfers that completed."""
    failures: Counter[str] = field(default_factory=Counter)
    """Transfers that did not, by cause."""


@dataclass(slots=True)
class _Begun:
    transport: str
    at: float
    pages: int = 0


class TransferTally:
    """One process's transfers, outgoing and incoming alike."""

    def __init__(self, *, page_bytes: int, clock: Clock) -> None:
        self.by_transport: dict[str, TransportTally] = {}
        self._page_bytes = page_bytes
        self._clock = clock
        self._begun: dict[str, _Begun] = {}

    def begin(self, request_id: str, transport: str) -> None:
        """Its ticket is there."""
        self._begun[request_id] = _Begun(transport, self._clock())

    def moved(self, request_id: str, pages: int) -> None:
        """So many pages of it, once each."""
        begun = self._begun.get(request_id)
        if begun is not None:
            begun.pages += pages

    def complete(self, request_id: str) -> None:
        """Every page has arrived and was accepted."""
        begun = self._begun.pop(request_id, None)
        if begun is not None:
            tally = self._of(begun)
            tally.bytes += begun.pages * self._page_bytes
            tally.seconds.observe(self._clock() - begun.at)

    def fail(self, request_id: str, failure: TransferFailure) -> None:
        """It came to nothing. Counted once, however many say so."""
        begun = self._begun.pop(request_id, None)
        if begun is not None:
            self._of(begun).failures[failure.name.lower()] += 1

    def _of(self, begun: _Begun) -> TransportTally:
        return self.by_transport.setdefault(begun.transport, TransportTally())

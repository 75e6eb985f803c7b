"""Slots of failed tickets whose writer has not yet said that it writes no more.

Neither a timer nor a cancel ends a quarantine (a write that was posted goes on, also after its
memory was deregistered): only the writer's own word, or proof that nothing of it can land.
"""

from dataclasses import dataclass

from kvtransfer import messages
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import Ticket
from kvtransfer.window import LandingWindow
from protos.baton.v1 import kv_pb2

ASKS_PER_LEASE = 3


@dataclass(slots=True)
class _Held:
    ticket: Ticket
    slots: set[int]
    failure: TransferFailure
    detail: str
    last_asked: float


class Quarantine:
    """Held slots by ticket; transfer thread only."""

    def __init__(
        self,
        *,
        window: LandingWindow | None,
        links: PeerLinks,
        clock: Clock,
        lease_s: float,
    ) -> None:
        self._window = window
        self._links = links
        self._clock = clock
        self._ask_every_s = lease_s / ASKS_PER_LEASE
        self._held: dict[int, _Held] = {}

    def hold(self, ticket: Ticket, slots: set[int], failure: TransferFailure, detail: str) -> None:
        """Withdraws the ticket at its writer, and keeps its slots until the writer has answered.

        A ticket without slots is withdrawn, too, so that its writer stops.
        """
        if self._window is None:
            return
        self._window.quarantine(slots, ticket.ticket_id)
        held = _Held(ticket, slots, failure, detail, self._clock())
        self._held[ticket.ticket_id] = held
        self._ask(held)

    def _ask(self, held: _Held) -> None:
        held.last_asked = self._clock()
        message = messages.failed(
            held.ticket, held.failure, held.detail, quiesced=True, from_writer=False
        )
        self._links.send(held.ticket.writer_instance, message)

    def ask_again(self) -> None:
        """Repeats the question to writers that are connected (again) and have not answered."""
        now = self._clock()
        for held in self._held.values():
            if now - held.last_asked > self._ask_every_s:
                self._ask(held)

    def lift(self, peer: str, message: kv_pb2.KvMessage) -> None:
        """The writer's word for one ticket; dropped where it is not that ticket's writer."""
        held = self._held.get(message.ticket_id)
        if held is None:
            self._links.dropped["unknown_ticket"] += 1
        elif held.ticket.writer_instance != peer or not messages.names(held.ticket, message):
            self._links.dropped["wrong_ticket"] += 1
        else:
            self._free(held)

    def lift_all(self, peer: str) -> None:
        """Nothing of this writer can land any more."""
        for held in [h for h in self._held.values() if h.ticket.writer_instance == peer]:
            self._free(held)

    def _free(self, held: _Held) -> None:
        del self._held[held.ticket.ticket_id]
        if self._window is not None:
            self._window.release(held.slots, held.ticket.ticket_id)

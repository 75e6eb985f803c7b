"""Slots of failed tickets whose writer has not yet said that it writes no more.

Neither a timer nor a cancel ends a quarantine (a write that was posted goes on, also after its
memory was deregistered): only the writer's own word, or proof that nothing of it can land. What a
silent writer may keep is bounded by refusing it further tickets, and by replacing the window
(kvtransfer/windows.py).
"""

from collections import Counter
from dataclasses import dataclass

from kvtransfer import messages
from kvtransfer.errors import SilentWriterError
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.outgoing import beat_s
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import Ticket
from kvtransfer.window import LandingWindow
from kvtransfer.windows import QuarantinePolicy
from protos.baton.v1 import kv_pb2


@dataclass(slots=True)
class _Held:
    ticket: Ticket
    window: LandingWindow
    slots: set[int]
    failure: TransferFailure
    detail: str
    since: float
    last_asked: float


class Quarantine:
    """Held slots by ticket. Transfer thread only, but for `check_writer`."""

    def __init__(
        self, *, links: PeerLinks, clock: Clock, lease_s: float, policy: QuarantinePolicy
    ) -> None:
        self._links = links
        self._clock = clock
        self._ask_every_s = beat_s(lease_s)
        self._policy = policy
        self._held: dict[int, _Held] = {}
        self._silent_writers: frozenset[str] = frozenset()

    def hold(
        self,
        ticket: Ticket,
        window: LandingWindow,
        slots: set[int],
        failure: TransferFailure,
        detail: str,
    ) -> None:
        """Withdraws the ticket at its writer, and keeps its slots until the writer has answered.

        A ticket without slots is withdrawn, too, so that its writer stops.
        """
        window.quarantine(slots, ticket.ticket_id)
        now = self._clock()
        held = _Held(ticket, window, slots, failure, detail, since=now, last_asked=now)
        self._held[ticket.ticket_id] = held
        self._ask(held)

    def _ask(self, held: _Held) -> None:
        held.last_asked = self._clock()
        message = messages.failed(
            held.ticket, held.failure, held.detail, quiesced=True, from_writer=False
        )
        self._links.send(held.ticket.writer_instance, message)

    def ask(self, peer: str) -> None:
        """Asks a writer that is connected again for all of its tickets."""
        for held in self._held.values():
            if held.ticket.writer_instance == peer:
                self._ask(held)

    def ask_again(self) -> None:
        """Repeats the question to writers that have not answered, and notes who is silent."""
        now = self._clock()
        for held in self._held.values():
            if now - held.last_asked >= self._ask_every_s:
                self._ask(held)
        self._silent_writers = frozenset(h.ticket.writer_instance for h in self._silent())

    def _silent(self) -> list[_Held]:
        limit = self._clock() - self._policy.refuse_after_s
        return [held for held in self._held.values() if held.since < limit]

    def silent_slots(self) -> Counter[LandingWindow]:
        """Slots that silent writers keep, by window."""
        kept: Counter[LandingWindow] = Counter()
        for held in self._silent():
            kept[held.window] += len(held.slots)
        return kept

    def check_writer(self, peer: str) -> None:
        """Any thread. Raises SilentWriterError where the peer may have no further slot to keep."""
        if peer in self._silent_writers:
            raise SilentWriterError(
                f"instance {peer} keeps landing slots and does not say whether it still writes "
                "them: no ticket until it does"
            )

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
        held.window.release(held.slots, held.ticket.ticket_id)
        self._silent_writers = frozenset(h.ticket.writer_instance for h in self._silent())

"""One incoming transfer: which slots its writer may fill, and how far it has come."""

from dataclasses import dataclass, field

from kvtransfer import messages
from kvtransfer.geometry import WriterPages
from kvtransfer.states import TransferState
from kvtransfer.ticket import Ticket
from kvtransfer.window import LandingWindow
from protos.baton.v1 import kv_pb2


@dataclass(slots=True)
class Incoming:
    """Books of one transfer; times are the transfer clock's seconds."""

    ticket: Ticket
    window: LandingWindow
    """Where all of its slots are."""
    pages: WriterPages
    """What a page is, in everything below: the writer's."""
    first_position: int
    total_pages: int
    chain_hashes: tuple[bytes, ...]
    last_message: float
    last_sent: float
    state: TransferState = TransferState.RESERVED
    credited: set[int] = field(default_factory=set)
    """Slots that the writer may fill."""
    landed: dict[int, int] = field(default_factory=dict)
    """Position -> slot, reported and not yet accepted."""
    accepted: set[int] = field(default_factory=set)
    first_token: int | None = None
    credit_total: int = 0
    """Slots credited beyond the ticket's own."""
    short_since: float | None = None
    """When the writer first counted pages that had not been announced, and still have not."""

    def is_from_writer(self, peer: str, message: kv_pb2.KvMessage) -> bool:
        return peer == self.ticket.writer_instance and messages.names(self.ticket, message)

    @property
    def slots(self) -> set[int]:
        return self.credited | set(self.landed.values())

    @property
    def travelling_pages(self) -> int:
        return self.total_pages - self.first_position

    @property
    def reported_pages(self) -> int:
        return len(self.landed) + len(self.accepted)

    @property
    def unreported_pages(self) -> int:
        return self.travelling_pages - self.reported_pages

    @property
    def finished(self) -> bool:
        return self.first_token is not None and len(self.accepted) == self.travelling_pages

    def lacks(self, pages: int, now: float, patience_s: float) -> bool:
        """Whether the writer has counted so many `pages` for longer than `patience_s`, and they
        were not all announced."""
        if pages <= self.reported_pages:
            self.short_since = None
            return False
        if self.short_since is None:
            self.short_since = now
        return now - self.short_since > patience_s

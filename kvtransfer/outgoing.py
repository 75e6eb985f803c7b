"""One outgoing transfer: what it may write, what is being written, and when decode was last heard.

A heartbeat says how far its side has come. So a slow peer is never taken for a dead one, and a
message that got lost is noticed by the second heartbeat that speaks of it, not by a lease that
runs out.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

import torch

from kvtransfer.pool_sealer import PendingSeals
from kvtransfer.states import TransferFailure, TransferState, Trigger, advance
from kvtransfer.ticket import SourcePage, Ticket
from kvtransfer.transport import Transport, WriteId
from protos.baton.v1 import kv_pb2

BEATS_PER_LEASE = 4

LONGEST_BEAT_S = 1.0
"""Two heartbeats find a lost message, and a client is to have its answer within 5 s."""

MAX_TOMBSTONES = 65_536
"""Ended tickets remembered, so that one that was withdrawn early cannot be opened late."""

MAX_ANNOUNCED_PAGES = 512
"""Most pages that one message announces."""

TicketKey = tuple[str, int]
"""(decode instance, ticket id)."""

WriteKey = tuple[str, WriteId]
"""(transport, its id for the write)."""


def beat_s(lease_s: float) -> float:
    """Longest time between two messages about a live ticket, in either direction."""
    return min(LONGEST_BEAT_S, lease_s / BEATS_PER_LEASE)


def refusal(
    ticket: Ticket,
    *,
    instance_id: str,
    withdrawn: bool,
    in_use: bool,
    transport: Transport | None,
) -> tuple[TransferFailure, str] | None:
    """Why a ticket cannot be opened by the worker `instance_id`, which `transport` joins to decode;
    None where it can."""
    number = ticket.ticket_id
    if ticket.writer_instance != instance_id:
        detail = f"ticket {number} is for writer {ticket.writer_instance}, this is {instance_id}"
        return TransferFailure.REFUSED, detail
    if withdrawn:
        return TransferFailure.ABORTED, f"ticket {number} was withdrawn before"
    if in_use:
        return TransferFailure.REFUSED, f"ticket {number} is in use already"
    if transport is None:
        detail = f"decode instance {ticket.instance_id} is not connected"
        return TransferFailure.TRANSPORT, detail
    if ticket.transport and ticket.transport != transport.name:
        joined = f"but {transport.name} joins the two workers"
        return TransferFailure.REFUSED, f"ticket {number} is for {ticket.transport}, {joined}"
    return None


class CreditNews(Enum):
    """What a credit message turned out to be."""

    TAKEN = auto()
    REPEATED = auto()
    LOST_BEFORE = auto()
    """It is the second in a row that counts credits which never came."""


@dataclass(slots=True)
class Early:
    """A page whose first layers left before the others were computed."""

    page: int
    slot: int
    layers: int = 0
    """Leading layers that were written, or are being."""
    writes: int = 0
    """Of them, writes that have not ended. Until they have, the page is not announced: writes may
    land in any order."""


@dataclass(slots=True)
class Outgoing:
    """Books of one transfer; times are the transfer clock's seconds."""

    ticket: Ticket
    last_heard: float
    """Any word of decode about the ticket."""
    last_sent: float
    last_written: float
    """When a write began or ended."""
    state: TransferState = TransferState.RESERVED
    credits: deque[int] = field(default_factory=deque)
    pending: deque[SourcePage] = field(default_factory=deque)
    early: dict[int, Early] = field(default_factory=dict)
    """By position."""
    writes: set[WriteKey] = field(default_factory=set)
    pages: int = 0
    """In writes that were begun."""
    pages_written: int = 0
    """In writes that have ended well."""
    first_token: int | None = None
    complete_sent: bool = False
    failure: TransferFailure = TransferFailure.TRANSPORT
    detail: str = ""
    _credited: int = 0
    _credit_totals: set[int] = field(default_factory=set)
    _missing_total: int = 0

    @property
    def key(self) -> TicketKey:
        return self.ticket.instance_id, self.ticket.ticket_id

    @property
    def finished(self) -> bool:
        """Whether every page was pushed and no write is left."""
        return self.first_token is not None and not self.pending and not self.writes

    def end(self, page_bytes: int) -> kv_pb2.TransferComplete:
        """What decode is told then: by itself, or with the last pages."""
        return kv_pb2.TransferComplete(
            total_pages=self.pages,
            total_bytes=self.pages * page_bytes,
            first_token=self.first_token or 0,
        )

    def early_pages(self, pages: Iterable[tuple[int, int]], first_layer: int) -> list[Early]:
        """Of (position, page), those whose layers from `first_layer` on may leave now: they go on,
        or begin and have credit."""
        chosen = []
        for position, page in pages:
            early = self.early.get(position)
            if early is None and first_layer == 0 and self.credits:
                early = self.early[position] = Early(page, self.credits.popleft())
            if early is not None and (early.page, early.layers) == (page, first_layer):
                chosen.append(early)
        return chosen

    def next_pages(self, *, at_most: int, all_layers: int) -> tuple[list[SourcePage], int]:
        """What one write takes, and how many leading layers of it have landed already. Pages of
        which some have go first, as they need no credit and would keep their slots from all others;
        then whole ones. `at_most` bounds pages of which something is still to leave."""
        early: list[SourcePage] = []
        layers = 0
        for page in self.pending if self.early else ():
            begun = self.early.get(page.position)
            if begun is None or begun.writes:
                continue
            if begun.page != page.page:
                begun.page, begun.layers = page.page, 0  # another page now: all of it, once more
            if not early:
                layers = begun.layers
            if begun.layers == layers:
                early.append(page)
        if early:
            return early[: MAX_ANNOUNCED_PAGES if layers == all_layers else at_most], layers
        whole = (page for page in self.pending if page.position not in self.early)
        return list(islice(whole, min(len(self.credits), at_most))), 0

    def slots_for(self, pages: Sequence[SourcePage]) -> list[int]:
        """Where these of `next_pages` lie, or are to."""
        begun = [self.early[page.position].slot for page in pages if page.position in self.early]
        return begun or list(islice(self.credits, len(pages)))

    def take(self, pages: Sequence[SourcePage]) -> None:
        """They are no longer pending: they are being written, or announced."""
        for page in pages:
            if self.pending[0] is page:
                self.pending.popleft()
            else:
                self.pending.remove(page)
            if self.early.pop(page.position, None) is None:
                self.credits.popleft()
        self.state = advance(self.state, Trigger.PAGES) or self.state
        self.pages += len(pages)

    def take_credit(self, credit: kv_pb2.Credit) -> CreditNews:
        """Adds slots that are credited for the first time. A repeated credit may name slots that
        were written meanwhile: taking it would write them twice."""
        if credit.slots:
            if credit.total in self._credit_totals:
                return CreditNews.REPEATED
            self._credit_totals.add(credit.total)
            self._credited += len(credit.slots)
            self.credits.extend(credit.slots)
            return CreditNews.TAKEN
        missing, self._missing_total = self._missing_total, 0
        if credit.total > self._credited:
            if missing and missing > self._credited:
                return CreditNews.LOST_BEFORE
            self._missing_total = credit.total
        return CreditNews.TAKEN

    def silence(self, now: float, peer_written: float) -> str:
        """What has not come for the length of the lease; empty while the transfer lives.

        `peer_written`: when any write to the same peer last ended. Writes queue behind one another,
        and one to a stopped peer stays in progress for ever. A ticket waits for credit, and for
        the end of a decode step, as long as decode is heard.
        """
        lease_s = self.ticket.lease_s
        if self.writes and now - max(self.last_written, peer_written) > lease_s:
            return f"no end of a write for {lease_s:g} s"
        if now - self.last_heard > lease_s:
            return f"nothing from decode for {lease_s:g} s"
        return ""


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a transfer, until it has ended and its source pages were compared."""

    out: Outgoing
    pages: Sequence[SourcePage] = ()
    """Announced by it; none where it only carries layers that were ready early."""
    early: Sequence[Early] = ()
    """Pages of which it carries such layers."""
    check: PendingSeals | None = None
    """What its source pages hold as they leave; None: nobody asks."""
    passed: torch.cuda.Event | None = None
    """What the device passes before it begins; None: it has begun."""

    @property
    def has_begun(self) -> bool:
        return self.passed is None or bool(self.passed.query())  # type: ignore[no-untyped-call]

    @property
    def checked(self) -> bool:
        return self.check is None or self.check.ended()

    def spoilt(self) -> str:
        """What is wrong with the source pages; empty where nothing is."""
        if self.check is None:
            return ""
        for page, seal in zip(self.pages, self.check.seals(), strict=True):
            if seal != page.seal:
                return f"source page at position {page.position} changed after it was sealed"
        return ""


class Tombstones:
    """Tickets that have ended here, and how."""

    def __init__(self) -> None:
        self._ended: OrderedDict[TicketKey, tuple[TransferFailure, str] | None] = OrderedDict()

    def __contains__(self, key: TicketKey) -> bool:
        return key in self._ended

    def bury(self, key: TicketKey, failure: tuple[TransferFailure, str] | None = None) -> None:
        """`failure`: why it failed; None: it did not, or was withdrawn before it was opened."""
        self._ended[key] = failure
        while len(self._ended) > MAX_TOMBSTONES:
            self._ended.popitem(last=False)

    def failure(self, key: TicketKey) -> tuple[TransferFailure, str] | None:
        """Why the ticket failed; None for any other."""
        return self._ended.get(key)

"""What the transfer tells the role; read by the scheduler thread through `poll_events`."""

from dataclasses import dataclass, replace

import torch

from kvtransfer.states import TransferFailure
from kvtransfer.ticket import LandedPage


def is_probe(request_id: str) -> bool:
    """Whether it names a probe (kvtransfer/probe.py). A request's id here ends with `#` and the
    number of its attempt, so that no client can choose such a name."""
    return request_id.startswith("#probe-") and request_id.count("#") == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesLanded:
    """Decode: bytes lie in slots. Copy and digest them, then `accept` or `reject`."""

    request_id: str
    ticket_id: int
    window: torch.Tensor
    """[slots, page_bytes] uint8: the memory that `pages`' slots index."""
    pages: tuple[LandedPage, ...]
    first_slot: int = 0
    """Which window it is: the number of its first slot among those of all windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesComing:
    """Decode: the step that computes the last pages is on its way. They may never come."""

    request_id: str
    ticket_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterFinished:
    """Decode: the writer has sent all pages and has stopped. A request whose pages were all
    accepted may join at once: what is left is the acknowledgement, and nobody waits for that.
    """

    request_id: str
    ticket_id: int
    first_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCompleted:
    """Decode: every page was accepted and acknowledged; the slots are free again."""

    request_id: str
    ticket_id: int
    first_token: int
    total_bytes: int
    """KV bytes that travelled: whole pages."""
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReleased:
    """Prefill: decode holds verified copies of every page; the source pages may go."""

    request_id: str
    total_bytes: int
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailedEvent:
    """The transfer failed.

    Prefill gets it with `quiesced` False while writes still read the source pages, and then,
    always, exactly once with `quiesced` True: only then may they go. Decode gets it once, always
    quiesced, since nobody else writes to its pages.
    """

    request_id: str
    ticket_id: int
    failure: TransferFailure
    detail: str
    quiesced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAttached:
    """Answer to `peer_connected`: whether the transport reaches the peer."""

    peer: str
    ok: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDetached:
    """The transport lost the peer; its transfers failed. The front should end the session."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferThreadFailed:
    """The transfer thread stopped on an error of its own; the worker must not go on."""

    detail: str


KvEvent = (
    PagesLanded
    | PagesComing
    | WriterFinished
    | TransferCompleted
    | SourceReleased
    | TransferFailedEvent
    | PeerAttached
    | PeerDetached
    | TransferThreadFailed
)


def joined_landings(earlier: KvEvent, later: KvEvent) -> PagesLanded | None:
    """Both as one event, where they are pages of one ticket in one window."""
    match earlier, later:
        case (PagesLanded(), PagesLanded()):
            one = (earlier.ticket_id, earlier.first_slot) == (later.ticket_id, later.first_slot)
            return replace(earlier, pages=earlier.pages + later.pages) if one else None
    return None

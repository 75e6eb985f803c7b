"""Measuring what joins two workers, beside their work: `baton doctor`'s part in the engines.

A probe is a transfer like any other: decode grants a ticket, with slots of its landing window, and
the writer fills them through the transport that the two have chosen. So nothing of the way is left
out, the slots come back (or are kept in quarantine) by the rules of all others, and a busy window
refuses a probe rather than a request. Only the end differs: what has landed is copied nowhere, and
as pages of the pool may change while they are read, no seals are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvtransfer.errors import TransferError
from kvtransfer.events import (
    KvEvent,
    PagesLanded,
    SourceReleased,
    TransferFailedEvent,
    is_probe,
)
from kvtransfer.layout import PageLayout
from kvtransfer.links import Clock, PeerLinks
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import SourcePage, Ticket
from protos.baton.v1 import kv_pb2

LIMIT_S = 10.0
"""Longest that one round may take."""

FREE_SHARE = 2
"""A probe takes at most one of so many free slots, and leaves the others to requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What was seen between two engines."""

    peer: str
    transport: str = ""
    num_bytes: int = 0
    """Of one round."""
    best_s: float = 0.0
    """The fastest round, from the first write to the acknowledgement. Seconds."""
    round_trip_s: float = 0.0
    """A question to the peer's engine and its answer, the fastest. Seconds."""
    connect_s: float = 0.0
    """How long the transport took to connect, at registration. Seconds."""
    peer_device: str = ""
    peer_host: str = ""
    peer_facts: tuple[str, ...] = ()
    """Where its accelerator and network devices sit."""
    error: str = ""


ProbeDone = Callable[[ProbeResult], None]


@dataclass(slots=True)
class _Probe:
    peer: str
    pages: int
    rounds: int
    done: ProbeDone
    result: ProbeResult
    began: float
    """Of the present round: the question, then the first write."""
    ticket: Ticket | None = None


class Prober:
    """Transfer thread only, but for the construction."""

    def __init__(
        self,
        *,
        layout: PageLayout,
        num_pages: int,
        device: str,
        host: str,
        facts: Callable[[], Sequence[str]],
        links: PeerLinks,
        sender: Sender,
        receiver: Receiver,
        clock: Clock,
    ) -> None:
        """`num_pages` of the pool that writes read from; `device`, `host` and `facts` are told to
        peers."""
        self._layout = layout
        self._num_pages = num_pages
        self._device = device
        self._host = host
        self._facts = facts
        self._links = links
        self._sender = sender
        self._receiver = receiver
        self._clock = clock
        self._probes: dict[str, _Probe] = {}
        self._asked = 0

    # ---- the writer -----------------------------------------------------------------------------

    def start(self, peer: str, num_bytes: int, rounds: int, done: ProbeDone) -> None:
        """Measures `rounds` times with about `num_bytes`; `done` is called once, on this thread."""
        transport = self._links.get(peer)
        pages = max(1, min(num_bytes // self._layout.page_bytes, self._num_pages))
        result = ProbeResult(
            peer=peer,
            transport=transport.name if transport is not None else "",
            connect_s=self._links.connect_s.get(peer, 0.0),
        )
        probe = _Probe(peer, pages, max(1, rounds), done, result, self._clock())
        if transport is None or not self._num_pages:
            self._end(probe, f"instance {peer} is not connected, or no pages are sent from here")
        else:
            self._ask(probe)

    def _ask(self, probe: _Probe) -> None:
        self._asked += 1
        request_id = f"#probe-{self._asked}"
        self._probes[request_id] = probe
        probe.began, probe.ticket = self._clock(), None
        message = kv_pb2.KvMessage(request_id=request_id)
        message.probe.pages = probe.pages
        if not self._links.send(probe.peer, message):
            self._drop(request_id, f"instance {probe.peer} cannot be reached")

    def _on_granted(self, request_id: str, granted: kv_pb2.ProbeGranted) -> None:
        probe = self._probes.get(request_id)
        if probe is None or probe.ticket is not None:
            return
        if granted.refused:
            self._drop(request_id, granted.refused)
            return
        now = self._clock()
        trip = min(now - probe.began, probe.result.round_trip_s or 1e9)
        ticket = probe.ticket = Ticket.from_proto(granted.ticket)
        pages = self._layout.pages_of(ticket.total_tokens)
        probe.result = replace(
            probe.result,
            round_trip_s=trip,
            num_bytes=pages * self._layout.page_bytes,
            peer_device=granted.device,
            peer_host=granted.host,
            peer_facts=tuple(granted.facts),
        )
        if ticket.request_id != request_id or not 1 <= pages <= self._num_pages:
            self._drop(request_id, "the ticket does not fit the question")
            return
        valid = self._layout.page_size
        source = [
            SourcePage(page=index, position=index, valid_tokens=valid, seal=b"")
            for index in range(pages)
        ]
        probe.began = now
        self._sender.open(ticket)
        self._sender.push(request_id, source)
        self._sender.complete(request_id, 0)

    def _next_round(self, request_id: str) -> None:
        probe = self._probes.pop(request_id)
        took = self._clock() - probe.began
        best = min(took, probe.result.best_s or took)
        probe.result = replace(probe.result, best_s=best)
        probe.rounds -= 1
        if probe.rounds:
            self._ask(probe)
        else:
            self._end(probe, "")

    def tick(self) -> None:
        """Ends what takes too long."""
        now = self._clock()
        for request_id, probe in list(self._probes.items()):
            if now - probe.began > LIMIT_S:
                detail = f"no end within {LIMIT_S:g} s"
                self._sender.abort(request_id, TransferFailure.EXPIRED, detail)
                self._drop(request_id, detail)

    def _drop(self, request_id: str, error: str) -> None:
        probe = self._probes.pop(request_id, None)
        if probe is not None:
            self._end(probe, error)

    def _end(self, probe: _Probe, error: str) -> None:
        probe.done(replace(probe.result, error=error))

    # ---- the reader -----------------------------------------------------------------------------

    def _on_asked(self, peer: str, request_id: str, asked: kv_pb2.ProbeAsked) -> None:
        answer = kv_pb2.KvMessage(request_id=request_id)
        granted = answer.probe_granted
        granted.device, granted.host = self._device, self._host
        if not is_probe(request_id):
            return
        granted.facts.extend(self._facts())
        try:
            writer = self._links.pages_of(peer)
            free = self._receiver.free_slots // FREE_SHARE // writer.slots
            pages = min(asked.pages, free, self._receiver.most_pages(writer))
            if pages < 1:
                granted.refused = "its landing window is busy; try again"
            else:
                ticket = self._receiver.grant(
                    request_id=request_id,
                    writer=peer,
                    total_pages=pages,
                    total_tokens=pages * writer.page_size,
                    prefix_len=0,
                    token_hash=b"",
                )
                granted.ticket.CopyFrom(ticket.to_proto())
        except (TransferError, ValueError) as error:
            granted.refused = str(error)
        self._links.send(peer, answer)

    # ---- both -----------------------------------------------------------------------------------

    def on_message(self, peer: str, message: kv_pb2.KvMessage) -> None:
        """A question, or its answer."""
        if message.WhichOneof("kind") == "probe":
            self._on_asked(peer, message.request_id, message.probe)
        else:
            self._on_granted(message.request_id, message.probe_granted)

    def on_event(self, event: KvEvent) -> bool:
        """Takes the events of probes; False for those of requests."""
        request_id = getattr(event, "request_id", "")
        if not is_probe(request_id):
            return False
        match event:
            case PagesLanded(ticket_id=ticket_id, pages=pages):
                self._receiver.accept(ticket_id, [page.position for page in pages])
            case SourceReleased() if request_id in self._probes:
                self._next_round(request_id)
            case TransferFailedEvent(detail=detail):
                self._drop(request_id, detail)
        return True

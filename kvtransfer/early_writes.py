"""Layers of pages that leave before their page is whole.

The KV of a layer is final long before the step's last layer is. What a transport can take of it
leaves then. A transport that the device itself can start has its writes queued behind the layers
that compute the pages, and nobody need be told; for any other the transfer thread looks when the
device has come so far. Such pages are announced later, when all of them is there and sealed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvtransfer import messages
from kvtransfer.errors import TransportError
from kvtransfer.layout import PageLayout
from kvtransfer.links import PeerLinks
from kvtransfer.outgoing import Outgoing, Write, WriteKey
from kvtransfer.states import TransferFailure
from kvtransfer.ticket import SourcePage
from kvtransfer.transport import Transport

Fail = Callable[[Outgoing, TransferFailure, str], None]


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Layers that a step computes, and that the host is to send on."""

    request_id: str
    pages: Sequence[tuple[int, int]]
    """(position, page)."""
    layers: range
    passed: torch.cuda.Event | None

    @property
    def computed(self) -> bool:
        return self.passed is None or bool(self.passed.query())  # type: ignore[no-untyped-call]


class EarlyLayers:
    """Of all transfers of a `Sender`, in whose turn it runs."""

    def __init__(
        self,
        *,
        links: PeerLinks,
        layout: PageLayout,
        at_most: int,
        live: Callable[[str], Outgoing | None],
        add_write: Callable[[WriteKey, Write], None],
        fail: Fail,
    ) -> None:
        """`at_most`: pages a write; `live`: a transfer that may still write."""
        self._links = links
        self._layout = layout
        self._at_most = at_most
        self._live = live
        self._add_write = add_write
        self._fail = fail
        self._awaited: list[_Awaited] = []
        self.sent = 0
        """Layers of pages that left before their page was whole."""

    @property
    def awaiting(self) -> bool:
        """Whether only a look at the device tells when the next ones may leave."""
        return bool(self._awaited)

    def push(self, request_id: str, pages: Iterable[tuple[int, int]], layers: range) -> None:
        """`layers` of these (position, page) are final, others are not: they may leave as far as
        credit and transport allow. The pages follow by `Sender.push`, which sends the rest; what
        does not leave now leaves then. Layers come in order from 0 on, and never up to the last."""
        self._write(request_id, pages, layers, behind=False, passed=None)

    def push_behind(
        self,
        request_id: str,
        pages: Sequence[tuple[int, int]],
        layers: range,
        passed: torch.cuda.Event | None,
    ) -> None:
        """As `push`, of layers that are final when the device has passed the event (None: now),
        which may be all of them. Where the device starts the writes, they leave then without
        anybody's doing, and `Sender.push` has nothing to do but to announce their pages. Where the
        host does, the last layers leave with the whole pages, which are looked at once more."""
        out = self._live(request_id)
        transport = None if out is None else self._links.get(out.ticket.instance_id)
        if transport is None:
            return
        if transport.writes_behind:
            self._write(request_id, pages, layers, behind=True, passed=passed)
        elif transport.writes_parts and pages and layers.stop < self._layout.layers:
            self._awaited.append(_Awaited(request_id, pages, layers, passed))

    def poll(self) -> bool:
        """Sends on what the device has computed by now; whether there was any."""
        computed = 0
        while computed < len(self._awaited) and self._awaited[computed].computed:
            computed += 1
        taken, self._awaited = self._awaited[:computed], self._awaited[computed:]
        for each in taken:
            self.push(each.request_id, each.pages, each.layers)
        return bool(taken)

    def whole(self, request_id: str, pages: Sequence[SourcePage]) -> None:
        """These leave whole now, or what is left of them does: nothing of them is awaited."""
        last = max((page.position for page in pages), default=-1)
        self._awaited = [
            each
            for each in self._awaited
            if each.request_id != request_id or each.pages[-1][0] > last
        ]

    def _write(
        self,
        request_id: str,
        pages: Iterable[tuple[int, int]],
        layers: range,
        *,
        behind: bool,
        passed: torch.cuda.Event | None,
    ) -> None:
        out = self._live(request_id)
        transport = None if out is None else self._links.get(out.ticket.instance_id)
        if out is None or transport is None:
            return
        if not (transport.writes_behind if behind else transport.writes_parts):
            return
        try:
            for key, write in self._begin(out, transport, pages, layers, behind, passed):
                self._add_write(key, write)
                self.sent += len(write.early) * len(layers)
        except TransportError as error:
            self._fail(out, TransferFailure.TRANSPORT, error.message)

    def _begin(
        self,
        out: Outgoing,
        transport: Transport,
        pages: Iterable[tuple[int, int]],
        layers: range,
        behind: bool,
        passed: torch.cuda.Event | None,
    ) -> Iterator[tuple[WriteKey, Write]]:
        """Starts writes as far as credit allows. Raises TransportError."""
        peer = out.ticket.instance_id
        rows = self._layout.row_bytes * 2
        part = (layers.start * rows, layers.stop * rows)
        beat = messages.written(out.ticket, (), (), so_far=out.pages_written).SerializeToString()
        chosen = out.early_pages(pages, layers.start)
        for first in range(0, len(chosen), self._at_most):
            some = chosen[first : first + self._at_most]
            copies = [(early.page, early.slot) for early in some]
            if behind:
                write = transport.write_behind(peer, copies, part=part, passed=passed)
            else:
                write = transport.write(peer, copies, beat, part=part)
            for early in some:
                early.layers = layers.stop
                early.writes += 1
            yield (transport.name, write), Write(out, early=some, passed=passed)

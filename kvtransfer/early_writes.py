"""Layers of pages that leave before their page is whole.

The KV of a layer is final long before the step's last layer is. What a transport can take of it
leaves then: told of by the host when a part of a step has ended, or queued on the device behind the
layers that compute it, where nobody need be told. Such pages are announced later, when all of them
is there and sealed.
"""

from collections.abc import Iterable, Iterator

import torch

from kvtransfer import messages
from kvtransfer.layout import PageLayout
from kvtransfer.outgoing import Outgoing, Write, WriteKey
from kvtransfer.transport import Transport


def early_writes(
    out: Outgoing,
    transport: Transport,
    pages: Iterable[tuple[int, int]],
    layers: range,
    *,
    layout: PageLayout,
    at_most: int,
    behind: bool,
    passed: torch.cuda.Event | None,
) -> Iterator[tuple[WriteKey, Write]]:
    """Starts writes of `layers` of these (position, page), as far as credit allows, `at_most` pages
    each. `behind`: when the device has passed the event (None: at once). Raises TransportError."""
    peer = out.ticket.instance_id
    rows = layout.row_bytes * 2
    part = (layers.start * rows, layers.stop * rows)
    heartbeat = messages.written(out.ticket, (), (), so_far=out.pages_written).SerializeToString()
    chosen = out.early_pages(pages, layers.start)
    for first in range(0, len(chosen), at_most):
        some = chosen[first : first + at_most]
        copies = [(early.page, early.slot) for early in some]
        if behind:
            write = transport.write_behind(peer, copies, part=part, passed=passed)
        else:
            write = transport.write(peer, copies, heartbeat, part=part)
        for early in some:
            early.layers = layers.stop
            early.writes += 1
        yield (transport.name, write), Write(out, early=some, passed=passed)

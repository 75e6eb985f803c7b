"""That source pages still hold what they were sealed with, as they leave.

A page that was freed and reused while it waited for credit is caught here, before decode finds it.
On a GPU the digests are computed beside the wire, those of all writes that begin together by one
launch: a launch costs the host more than the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvtransfer.events import is_probe
from kvtransfer.outgoing import Outgoing, Write, WriteKey
from kvtransfer.pool_sealer import PendingSeals, Sealer
from kvtransfer.ticket import SourcePage


class _Shared:
    """Seals of the pages of several writes."""

    def __init__(self, whole: PendingSeals) -> None:
        self._whole = whole
        self._known: list[bytes] | None = None

    def ended(self) -> bool:
        return self._known is not None or self._whole.ended()

    def seals(self) -> list[bytes]:
        if self._known is None:
            self._known = self._whole.seals()
        return self._known


@dataclass(frozen=True, slots=True)
class _Part:
    """`PendingSeals` of one of those writes."""

    shared: _Shared
    part: slice

    def ended(self) -> bool:
        return self.shared.ended()

    def seals(self) -> list[bytes]:
        return self.shared.seals()[self.part]


class SourceChecks:
    """Of all transfers of a worker."""

    def __init__(self, sealer: Sealer | None, *, verify: bool) -> None:
        self._sealer = sealer if verify else None

    @property
    def at_once(self) -> bool:
        """Whether the thread that begins a write digests its pages itself."""
        return self._sealer is not None and not self._sealer.queues

    def of_write(self, out: Outgoing, pages: Sequence[SourcePage]) -> Write:
        """A write that is about to begin: its pages are compared now, where no device does it."""
        sealer = self._sealer
        if sealer is None or sealer.queues or is_probe(out.ticket.request_id):
            return Write(out, pages)
        return Write(out, pages, check=_start(sealer, pages))

    def beside(self, writes: Iterable[tuple[WriteKey, Write]]) -> Iterator[tuple[WriteKey, Write]]:
        """Writes that have just begun, with the digests of their pages on their way."""
        sealer = self._sealer
        if sealer is None or not sealer.queues:
            return
        begun = [(key, write) for key, write in writes if not is_probe(write.out.ticket.request_id)]
        if not begun:
            return
        shared, end = (
            _Shared(_start(sealer, [page for _, write in begun for page in write.pages])),
            0,
        )
        for key, write in begun:
            first, end = end, end + len(write.pages)
            yield key, replace(write, check=_Part(shared, slice(first, end)))


def _start(sealer: Sealer, pages: Sequence[SourcePage]) -> PendingSeals:
    return sealer.start([page.page for page in pages], [page.valid_tokens for page in pages])

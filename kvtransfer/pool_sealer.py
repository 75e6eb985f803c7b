"""The digests of source pages, when they are sealed and again when they leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvtransfer.device_digest import DeviceDigests
from kvtransfer.digest import as_tensor, digest_pages, seals_of, start_digests
from kvtransfer.layout import PageLayout


class PendingSeals(Protocol):
    """Seals that may still be computed."""

    def ended(self) -> bool:
        """Whether they are known; never waits."""
        ...

    def seals(self) -> list[bytes]:
        """In the order asked for; waits where they have not `ended`."""
        ...


class Sealer(Protocol):
    """Over all ranks of this worker: a seal holds the digest of each rank's part, in order."""

    @property
    def queues(self) -> bool:
        """Whether `start` leaves the work to a device, rather than do it at once."""
        ...

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        """Seals of pool pages as they are now; waits for the device."""
        ...

    def start(
        self,
        pages: Sequence[int],
        valid_tokens: Sequence[int],
        *,
        behind_step: bool = False,
        passed: torch.cuda.Event | None = None,
    ) -> PendingSeals:
        """The same without waiting where it `queues`. `behind_step`: of pages as they will be when
        what this thread has launched on the device has ended, or, where an event is given, when the
        device has `passed` that."""
        ...


@dataclass(frozen=True, slots=True)
class KnownSeals:
    """`PendingSeals` that were computed at once."""

    known: list[bytes]

    def ended(self) -> bool:
        return True

    def seals(self) -> list[bytes]:
        return self.known


@dataclass(frozen=True, slots=True)
class QueuedSeals:
    """`PendingSeals` of a stream of a GPU."""

    _digests: DeviceDigests

    def ended(self) -> bool:
        return self._digests.ended()

    def seals(self) -> list[bytes]:
        return seals_of(as_tensor(self._digests.wait()))


class PoolSealer:
    """`Sealer` of one pool."""

    def __init__(self, pool: torch.Tensor, layout: PageLayout) -> None:
        """`pool`: [pages, page_bytes] uint8."""
        self._pool = pool
        self._layout = layout

    def seals(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> list[bytes]:
        return seals_of(digest_pages(self._pool, pages, valid_tokens, self._layout))

    @property
    def queues(self) -> bool:
        return self._pool.device.type == "cuda"

    def start(
        self,
        pages: Sequence[int],
        valid_tokens: Sequence[int],
        *,
        behind_step: bool = False,
        passed: torch.cuda.Event | None = None,
    ) -> PendingSeals:
        if not self.queues:
            return KnownSeals(self.seals(pages, valid_tokens))
        stream = torch.cuda.current_stream(self._pool.device) if behind_step else None
        return QueuedSeals(
            start_digests(
                self._pool, pages, valid_tokens, self._layout, stream=stream, passed=passed
            )
        )

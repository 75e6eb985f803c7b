"""Host memory for the chain's KV, behind a copier that is as late as a stream may be.

A copy runs behind the steps that were launched before it and in front of nothing: it moves when
somebody looks at it often enough or waits for it, and by then those steps have run. A page that
changed hands in between shows as a broken chain.
"""

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.memory.page_copier import PageCopy
from tests.engine.scheduler.machine.chain import Chain, ChainKv


@dataclass
class LateCopy:
    """`PageCopy` that ends at the `looks`-th look, or when it is waited for."""

    move: Callable[[], list[bytes]]
    looks: int
    moved: list[bytes] | None = None

    def done(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.wait()
        return self.moved is not None

    def wait(self) -> None:
        if self.moved is None:
            self.moved = self.move()

    def digests(self) -> list[bytes]:
        assert self.moved is not None, "asked before it has ended"
        return self.moved

    def duration_s(self) -> float:
        return 0.0


class ChainCopier:
    """Implements `PageCopier`."""

    page_bytes = 64

    def __init__(
        self,
        kv: Callable[[], ChainKv],
        num_pages: int,
        looks: int,
        steps_before: Callable[[], Callable[[], None]],
    ) -> None:
        """`steps_before`: asked when a copy starts, gives what runs the steps launched so far."""
        self.num_pages = num_pages
        self._kv = kv
        self._looks = looks
        self._steps_before = steps_before
        self._host: list[list[Chain]] = [[None] for _ in range(num_pages)]

    def to_host(self, device_pages: Sequence[int], host_pages: Sequence[int]) -> PageCopy:
        run_steps, pairs = self._steps_before(), list(zip(device_pages, host_pages, strict=True))

        def move() -> list[bytes]:
            run_steps()
            for device, host in pairs:
                self._host[host] = self._kv().page(device)
            return [page_digest(self._host[host]) for _, host in pairs]

        return LateCopy(move, self._looks)

    def to_device(self, host_pages: Sequence[int], device_pages: Sequence[int]) -> PageCopy:
        run_steps, pairs = self._steps_before(), list(zip(host_pages, device_pages, strict=True))

        def move() -> list[bytes]:
            run_steps()
            for host, device in pairs:
                self._kv().fill(device, self._host[host])
            return [page_digest(self._kv().page(device)) for _, device in pairs]

        return LateCopy(move, self._looks)


def page_digest(page: list[Chain]) -> bytes:
    return hashlib.blake2b(pickle.dumps(page), digest_size=8).digest()

"""A copier that takes its time, between two memories whose contents a test can read.

Bytes move when a copy ends, not when it starts: a page that changes hands under a copy shows as
wrong content, on whichever side.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.memory.page_copier import PageCopy


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


@dataclass
class FakeCopy:
    move: Callable[[], list[bytes]]
    """Moves everything; the digests of the device's side."""
    delay: int
    """Looks at it that find it unfinished."""
    result: list[bytes] | None = None
    waited_for: bool = False

    def done(self) -> bool:
        if self.result is None:
            self.delay -= 1
            if self.delay < 0:
                self.result = self.move()
        return self.result is not None

    def wait(self) -> None:
        if self.result is None:
            self.waited_for = True
            self.result = self.move()

    def digests(self) -> list[bytes]:
        assert self.result is not None, "asked before it has ended"
        return self.result

    def duration_s(self) -> float:
        return 0.0


@dataclass
class FakeCopier:
    """`read` and `write` reach a device page's content; 0 looks: over when it is started."""

    num_pages: int
    read: Callable[[int], bytes]
    write: Callable[[int, bytes], None]
    delay: Callable[[], int] = lambda: 0
    page_bytes: int = 64
    behind: Callable[[], Callable[[], None]] = lambda: lambda: None
    """Asked when a copy starts, gives what runs the steps that it comes after."""
    copies: list[FakeCopy] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host = [b"never written"] * self.num_pages

    def to_host(self, device_pages: Sequence[int], host_pages: Sequence[int]) -> PageCopy:
        device, host = list(device_pages), list(host_pages)
        assert len(device) == len(host) > 0
        run_steps = self.behind()

        def move() -> list[bytes]:
            run_steps()
            digests = [digest(self.read(page)) for page in device]
            for source, target in zip(device, host, strict=True):
                self.host[target] = self.read(source)
            return digests

        return self._start(move)

    def to_device(self, host_pages: Sequence[int], device_pages: Sequence[int]) -> PageCopy:
        device, host = list(device_pages), list(host_pages)
        assert len(device) == len(host) > 0
        run_steps = self.behind()

        def move() -> list[bytes]:
            run_steps()
            for source, target in zip(host, device, strict=True):
                self.write(target, self.host[source])
            return [digest(self.read(page)) for page in device]

        return self._start(move)

    def _start(self, move: Callable[[], list[bytes]]) -> PageCopy:
        copy = FakeCopy(move, self.delay())
        self.copies.append(copy)
        return copy

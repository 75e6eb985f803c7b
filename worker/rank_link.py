"""Between the leading rank's process and another one: a socket pair with framed messages.

End of file on either end means that the other process is gone, and a model of which a part is gone
computes nothing: whoever notices ends at once, also when its main thread waits in a collective.
"""

import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum, auto

_HEADER = struct.Struct("<IB")


class Kind(IntEnum):
    """What a frame is."""

    START = auto()
    """Leader: JSON of everything that the rank needs to begin."""
    STEP = auto()
    """Leader: a StepCommand."""
    STOP = auto()
    """Leader: the last frame."""
    SEAL = auto()
    """Leader: the seals of some pages of the rank's; answered."""
    LAND = auto()
    """Leader: copy landed pages out of the window; answered with what they digest to."""
    TRANSPORTS = auto()
    """Leader: which ones the rank has; answered."""
    OFFER = auto()
    """Leader: how the rank's landing window is written; answered."""
    OPEN_WINDOW = auto()
    """Leader: expose a further landing window; answered with how it is written."""
    CONNECT_WINDOW = auto()
    """Leader: reach further windows of a peer; answered."""
    FILL = auto()
    """Leader: copy pages into the outbox; answered."""
    CONNECT = auto()
    """Leader: reach a peer's windows; answered."""
    DISCONNECT = auto()
    WRITE = auto()
    """Leader: write pages to a peer's windows; ENDED follows."""
    ANSWER = auto()
    """To the frame before; one at a time."""
    ENDED = auto()
    """A write is over."""
    LOST = auto()
    """A peer's rank cannot be reached any more."""


class RankLink:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket, *, on_closed: Callable[[], None]) -> None:
        """`on_closed` runs on the reader's thread when the other process is gone."""
        self._socket = end
        self._on_closed = on_closed
        self._lock = threading.Lock()
        self._frames: queue.SimpleQueue[tuple[Kind, bytes]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._ended: deque[bytes] = deque()
        self._lost: deque[bytes] = deque()
        threading.Thread(target=self._read, name="rank-link", daemon=True).start()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Waits only while the other process is far behind. A frame to a dead process is dropped:
        its death is reported once, by `on_closed`."""
        with self._lock:
            try:
                self._socket.sendall(_HEADER.pack(len(payload), kind) + payload)
            except OSError:
                return

    def receive(self, timeout_s: float | None = None) -> tuple[Kind, bytes]:
        """The next frame; waits for it. Raises queue.Empty when the time is over."""
        return self._frames.get(timeout=timeout_s)

    def answer(self) -> bytes:
        """The answer to the frame that was sent before; waits for it."""
        return self._answers.get()

    def take_ended(self) -> list[bytes]:
        """ENDED frames that have come; never waits."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def take_lost(self) -> list[bytes]:
        """LOST frames that have come; never waits."""
        return [self._lost.popleft() for _ in range(len(self._lost))]

    def close(self) -> None:
        self._socket.close()

    def _sort(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.ANSWER:
            self._answers.put(payload)
        elif kind is Kind.ENDED:
            self._ended.append(payload)
        elif kind is Kind.LOST:
            self._lost.append(payload)
        else:
            self._frames.put((kind, payload))

    def _read(self) -> None:
        stream = self._socket.makefile("rb")
        try:
            while len(header := stream.read(_HEADER.size)) == _HEADER.size:
                size, kind = _HEADER.unpack(header)
                payload = stream.read(size)
                if len(payload) < size:
                    break
                self._sort(Kind(kind), payload)
        except OSError:
            pass
        self._on_closed()

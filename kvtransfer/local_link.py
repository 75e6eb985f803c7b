"""Messages between the engines of one host, over Unix sockets.

For transports that move bytes by themselves and need only short words beside them: a message takes
some 50 µs, where the way through both fronts and their gRPC session takes milliseconds, and nobody
polls. The kernel tells who is at the other end (its process id, in this PID namespace), so an offer
cannot speak for another process. Names are abstract: nothing is left in a file system, and a peer
in another network namespace finds nobody, which is as good as another host.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.errors import TransportError

MAX_MESSAGE_BYTES = 1 << 17
"""A longer one is a programming error: a write's message names some dozens of pages."""

_SEND_BUFFER_BYTES = 1 << 20
"""Words to a peer that stands still pile up here; past it the peer counts as unreachable."""

_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """What a peer must know to reach this end."""

    name: str
    token: str
    """Known to those who got the offer: a stranger's connection is dropped."""
    pid: int


@dataclass(slots=True)
class _Link:
    socket: socket.socket
    pid: int
    token: str = ""
    """Of the process at the other end; empty until it has said hello."""
    peer: str = ""
    """Its name here, once both are known."""


@dataclass(slots=True)
class _Books:
    lock: threading.Lock = field(default_factory=threading.Lock)
    by_fd: dict[int, _Link] = field(default_factory=dict)
    by_peer: dict[str, _Link] = field(default_factory=dict)
    expected: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Token -> (peer, process id) of those who are to dial."""


class LocalLinks:
    """One listening socket, one reader thread, any number of peers. All methods but the reader's
    are the transfer thread's, or of whoever has its turn."""

    def __init__(self) -> None:
        self._wake: Callable[[], None] = _nothing
        self._books = _Books()
        self._arrived: deque[tuple[str, bytes | None]] = deque()
        name, token = f"baton-kv-{secrets.token_hex(8)}", secrets.token_hex(16)
        self.address = LinkAddress(name, token, os.getpid())
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + name)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._stop, self._stopped = socket.socketpair()
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._stopped, select.EPOLLIN)
        self._thread = threading.Thread(target=self._read, name="kv-local", daemon=True)
        self._thread.start()

    def bind(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the reader's thread when something has arrived."""
        self._wake = wake

    # ---- joining --------------------------------------------------------------------------------

    def dial(self, peer: str, address: LinkAddress) -> None:
        """Connects to a peer that listens. Raises TransportError where it is not to be found, or
        is another process than its offer says."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            end.connect("\0" + address.name)
            pid = _peer_pid(end)
            if pid != address.pid:
                raise TransportError(f"process {pid} listens where {address.pid} should")
            end.send(f"{address.token} {self.address.token}".encode())
        except (OSError, TransportError) as error:
            end.close()
            raise TransportError(f"peer {peer} is not reachable on this host: {error}") from error
        with self._books.lock:
            self._adopt(_Link(end, pid, address.token, peer))

    def expect(self, peer: str, address: LinkAddress) -> None:
        """A peer will dial, or has done so already."""
        with self._books.lock:
            self._books.expected[address.token] = (peer, address.pid)
            for link in self._books.by_fd.values():
                if link.token == address.token:
                    self._name(link)

    def drop(self, peer: str) -> None:
        """Ends the connection; nothing is reported of it."""
        with self._books.lock:
            expected = self._books.expected
            for token in [t for t, (name, _) in expected.items() if name == peer]:
                del expected[token]
            link = self._books.by_peer.pop(peer, None)
            if link is not None:
                self._close(link)

    def _adopt(self, link: _Link) -> None:
        link.socket.setblocking(False)
        link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._books.by_fd[link.socket.fileno()] = link
        if link.peer:
            self._replace(link)
        self._epoll.register(link.socket, select.EPOLLIN)

    def _name(self, link: _Link) -> None:
        """Gives a link that has said hello its peer's name, if that is known yet."""
        peer, pid = self._books.expected.get(link.token, ("", 0))
        if peer and pid == link.pid:
            link.peer = peer
            self._replace(link)

    def _replace(self, link: _Link) -> None:
        older = self._books.by_peer.get(link.peer)
        if older is not None and older is not link:
            self._close(older)
        self._books.by_peer[link.peer] = link

    def _close(self, link: _Link) -> None:
        if self._books.by_fd.pop(link.socket.fileno(), None) is not None:
            self._epoll.unregister(link.socket)
            link.socket.close()

    # ---- messages -------------------------------------------------------------------------------

    def send(self, peer: str, message: bytes) -> None:
        """Never waits. Raises TransportError where the peer is not connected, or does not read."""
        with self._books.lock:
            link = self._books.by_peer.get(peer)
            if link is None:
                raise TransportError(f"peer {peer} is not connected on this host")
            try:
                link.socket.send(message)
            except OSError as error:
                raise TransportError(f"peer {peer} cannot be told: {error}") from error

    def receive(self) -> list[tuple[str, bytes | None]]:
        """(peer, message) since the last call, in order; None instead of a message: its end is
        gone, and nothing more comes."""
        arrived = []
        while self._arrived:
            arrived.append(self._arrived.popleft())
        return arrived

    def close(self) -> None:
        """Ends all connections and the reader."""
        self._stop.send(b"\0")
        self._thread.join()
        with self._books.lock:
            for link in list(self._books.by_fd.values()):
                self._close(link)
            self._books.by_peer.clear()
        for end in (self._listener, self._stop, self._stopped):
            end.close()
        self._epoll.close()

    # ---- the reader's thread --------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            ready = [fd for fd, _ in self._epoll.poll()]
            if self._stopped.fileno() in ready:
                return
            for fd in ready:
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._take(fd)
            self._wake()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            end, _ = self._listener.accept()
            with self._books.lock:
                self._adopt(_Link(end, _peer_pid(end)))

    def _take(self, fd: int) -> None:
        """All that one connection has to say now."""
        while True:
            with self._books.lock:
                link = self._books.by_fd.get(fd)
                if link is None:
                    return
                try:
                    data = link.socket.recv(MAX_MESSAGE_BYTES)
                except BlockingIOError:
                    return
                except OSError:
                    data = b""
                if not data:
                    self._end(link)
                    return
                if link.token:
                    self._arrived.append((link.peer, data))
                else:
                    self._greet(link, data)

    def _greet(self, link: _Link, hello: bytes) -> None:
        mine, _, theirs = hello.decode(errors="replace").partition(" ")
        if not theirs or not secrets.compare_digest(mine.encode(), self.address.token.encode()):
            self._close(link)
            return
        link.token = theirs
        self._name(link)

    def _end(self, link: _Link) -> None:
        self._close(link)
        if link.peer and self._books.by_peer.get(link.peer) is link:
            del self._books.by_peer[link.peer]
            self._arrived.append((link.peer, None))


def _peer_pid(end: socket.socket) -> int:
    raw = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid


def _nothing() -> None:
    """Before `bind`."""

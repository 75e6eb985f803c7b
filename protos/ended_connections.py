"""Hears of each TCP connection that ends at one of this machine's ports: whose it was, and how much
it had said.

The Linux kernel tells this to whoever listens (`sock_diag`, as `ss --events` does), without any
privilege, for the network name space that the process lives in. Nothing of it lies on a message's
path, and short connections are not missed, as they would be by looking at what is open just now.
"""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable

_NETLINK_SOCK_DIAG = 4
_DESTROYED = (1 << 0) | (1 << 2)
"""Groups of connections that have ended: TCP over IPv4 and over IPv6."""
_SO_ATTACH_FILTER = 26
_BUFFER_BYTES = 1 << 20
_MESSAGE_BYTES = 8 << 10

_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port id."""
_ENDS = struct.Struct("!B3xHH16s16s")
"""inet_diag_msg: family, the ports of both ends, their addresses, which take 16 bytes each."""
_DIAG_MSG_BYTES = 72
_ATTRIBUTE = struct.Struct("=HH")
"""rtattr: length, type."""
_INET_DIAG_INFO = 2
_BYTES_RECEIVED = struct.Struct("=128xQ")
"""Of tcp_info: tcpi_bytes_received."""
_MAPPED = bytes(10) + b"\xff\xff"
"""Beginning of an IPv4 address in the clothes of IPv6."""

OnEnd = Callable[[str, int], None]
"""Is told the peer as gRPC names it (`ipv4:10.0.0.1:5000`), and how many bytes came from it. The
end of what it sends counts as one."""


class EndedConnections:
    """Listens in the running loop until `close`."""

    def __init__(self, port: int, on_end: OnEnd) -> None:
        """Raises OSError where the kernel does not tell: another system, or one that forbids it."""
        self._on_end = on_end
        if not hasattr(socket, "AF_NETLINK"):
            raise OSError("only Linux tells of ended connections")
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            _take_only(self._socket, port)
            self._socket.bind((0, _DESTROYED))
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._read)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        # Where more end at once than the buffer holds, the kernel drops some, and says so once.
        with contextlib.suppress(OSError):
            while True:
                peer, received = _parse(self._socket.recv(_MESSAGE_BYTES))
                self._on_end(peer, received)


def _take_only(listener: socket.socket, port: int) -> None:
    """The kernel itself leaves out all but that local port: a busy machine must not wake us."""
    at = _HEADER.size + 4  # idiag_sport
    steps = (
        struct.pack("=HBBI", 0x28, 0, 0, at),  # load the half-word there
        struct.pack("=HBBI", 0x15, 0, 1, port),  # is it the port?
        struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF),  # then all of the message
        struct.pack("=HBBI", 0x06, 0, 0, 0),  # else nothing
    )
    program = ctypes.create_string_buffer(b"".join(steps))
    described = struct.pack("HL", len(steps), ctypes.addressof(program))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def _parse(message: bytes) -> tuple[str, int]:
    family, _, port, _, address = _ENDS.unpack_from(message, _HEADER.size)
    received, at = 0, _HEADER.size + _DIAG_MSG_BYTES
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _INET_DIAG_INFO and length >= _ATTRIBUTE.size + _BYTES_RECEIVED.size:
            (received,) = _BYTES_RECEIVED.unpack_from(message, at + _ATTRIBUTE.size)
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return _name(family, address, port), received


def _name(family: int, address: bytes, port: int) -> str:
    if family == socket.AF_INET:
        return f"ipv4:{socket.inet_ntop(family, address[:4])}:{port}"
    if address.startswith(_MAPPED):
        return f"ipv4:{socket.inet_ntop(socket.AF_INET, address[12:])}:{port}"
    return f"ipv6:%5B{socket.inet_ntop(socket.AF_INET6, address)}%5D:{port}"

"""Anonymous shared memory between a worker's two processes, passed as a file descriptor.

No name in the file system: nothing is left behind whichever process dies first, and nobody else
can open it.
"""

import ctypes
import mmap
import os
import socket
import sys
import tempfile
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class SharedMemory:
    """One mapping of an anonymous file; pages are committed when first touched."""

    def __init__(self, fd: int, size: int) -> None:
        """Owns `fd` from here on; use `create` or `attach`."""
        self.size = size
        """Bytes."""
        self.fd = fd
        """Descriptor to hand to the other process."""
        self._map: mmap.mmap | ctypes.Array[ctypes.c_ubyte] | None = _mapped(fd, size)

    @classmethod
    def create(cls, size: int) -> "SharedMemory":
        """Zeroed memory of `size` bytes. Raises ValueError for a size below 1."""
        if size < 1:
            raise ValueError(f"shared memory of {size} bytes; must be >= 1")
        fd = anonymous_file()
        try:
            os.ftruncate(fd, size)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, size: int) -> "SharedMemory":
        """Maps what another process created; takes `fd` over.

        Raises ValueError where the file is smaller than `size`: touching what lies beyond its end
        would kill the process.
        """
        actual = os.fstat(fd).st_size
        if actual < size:
            raise ValueError(f"shared memory has {actual} bytes, {size} expected")
        return cls(fd, size)

    def tensor(self, count: int, item_bytes: int) -> "torch.Tensor":
        """The first `count * item_bytes` bytes as [count, item_bytes] uint8, sharing memory.

        The tensor keeps the mapping alive, also after `close`.
        """
        import torch  # only engines need it: the front maps the same memory as plain bytes

        flat = torch.frombuffer(self._mapping, dtype=torch.uint8, count=count * item_bytes)
        return flat.view(count, item_bytes)

    @property
    def view(self) -> memoryview:
        """All bytes, writable."""
        return memoryview(self._mapping).cast("B")

    @property
    def _mapping(self) -> "mmap.mmap | ctypes.Array[ctypes.c_ubyte]":
        if self._map is None:
            raise ValueError("shared memory that is closed")
        return self._map

    def close(self) -> None:
        """Closes descriptor and mapping; the mapping stays while tensors or views of it live."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._map = None  # unmapped with the last view

    def __enter__(self) -> "SharedMemory":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_ALIGNMENT = 2 << 20
"""Bytes. A huge page of the file can be one of the mapping only where both begin alike."""

_FIXED = 0x10
"""MAP_FIXED, which Python's mmap does not offer."""


def _mapped(fd: int, size: int) -> "mmap.mmap | ctypes.Array[ctypes.c_ubyte]":
    """The file's first bytes, at an address where the kernel can make huge pages of them."""
    if sys.platform != "linux" or size < _ALIGNMENT:
        return mmap.mmap(fd, size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    number, flag, pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    libc.mmap.argtypes = [pointer, number, flag, flag, flag, ctypes.c_long]
    libc.munmap.argtypes = [pointer, number]
    failed = pointer(-1).value
    room = size + _ALIGNMENT
    # Addresses first, without memory behind them; then the file over a part of them.
    begin = libc.mmap(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if begin == failed:
        raise OSError(ctypes.get_errno(), f"no addresses for {size} bytes of shared memory")
    address = -(-begin // _ALIGNMENT) * _ALIGNMENT
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(address, size, access, mmap.MAP_SHARED | _FIXED, fd, 0) == failed:
        error = ctypes.get_errno()
        libc.munmap(begin, room)
        raise OSError(error, f"{size} bytes of shared memory cannot be mapped")
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at the process's end, when other threads may still be reading.
    weakref.finalize(memory, libc.munmap, begin, room).atexit = False
    return memory


def anonymous_file() -> int:
    """Descriptor of an empty file without a name; whoever learns its size gives it one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("baton-kv", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def send_fds(channel: socket.socket, fds: list[int], payload: bytes = b"\0") -> None:
    """Sends descriptors over a connected Unix socket, with at least one byte of payload."""
    socket.send_fds(channel, [payload], fds)


def recv_fds(channel: socket.socket, count: int, payload_bytes: int = 1) -> tuple[bytes, list[int]]:
    """Receives what `send_fds` sent: (payload, descriptors), the descriptors close-on-exec.

    Raises ConnectionError where the other side closed, or sent another number of descriptors.
    """
    payload, fds, flags, _ = socket.recv_fds(channel, payload_bytes, count)
    if not payload or len(fds) != count or flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ConnectionError(f"expected {count} file descriptors, got {len(fds)}")
    for fd in fds:
        os.set_inheritable(fd, False)
    return payload, fds

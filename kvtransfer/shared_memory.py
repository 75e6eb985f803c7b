"""Anonymous shared memory between a worker's two processes, passed as a file descriptor.

No name in the file system: nothing is left behind whichever process dies first, and nobody else
can open it.
"""

import contextlib
import mmap
import os
import socket
import tempfile
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
        self._map = mmap.mmap(fd, size)

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

        The tensor keeps the mapping alive; `close` refuses while one exists.
        """
        import torch  # only engines need it: the front maps the same memory as plain bytes

        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=count * item_bytes)
        return flat.view(count, item_bytes)

    @property
    def view(self) -> memoryview:
        """All bytes, writable."""
        return memoryview(self._map)

    def close(self) -> None:
        """Closes descriptor and mapping; the mapping stays while tensors or views of it live."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):  # freed with the last view
            self._map.close()

    def __enter__(self) -> "SharedMemory":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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

"""Makes a host's landing window consist of huge pages, where the kernel can.

Who writes from another process of the host has the kernel pin the window's pages one after another,
which at 4 KiB takes a third of the copy's time (bench/README.md). Shared memory comes in small
pages unless the whole machine is set up otherwise, but the kernel puts small ones together when it
is asked to (`MADV_COLLAPSE`, Linux 6.1). It does that with pages that are there only, so memory is
still taken where it is first written: what a transfer has used, and may use again, is put together.
"""

import ctypes
import errno
import logging
import sys
import threading
from collections import deque

import torch

logger = logging.getLogger(__name__)

HUGE_BYTES = 2 << 20
"""A huge page of x86-64, and of arm64 with small pages of 4 KiB."""

_COLLAPSE = 25

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EPERM)


class HugePages:
    """Of one piece of memory. Any thread may call."""

    def __init__(self, memory: torch.Tensor) -> None:
        """`memory`: [slots, slot_bytes] uint8. On a device, or smaller than a huge page, it stays
        as it is."""
        self._memory = memory
        """Alive as long as this: the kernel is told of its addresses."""
        self._start, self._slot_bytes = memory.data_ptr(), int(memory.shape[1])
        self._end = self._start + memory.numel()
        able = sys.platform == "linux" and memory.device.type == "cpu"
        first = -(-self._start // HUGE_BYTES)
        self._open = set(range(first, self._end // HUGE_BYTES)) if able else set()
        """Places of huge pages, by address, that have not been asked for."""
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._worker: threading.Thread | None = None
        """None while nothing waits."""
        self.collapsed = 0

    def used(self, slot: int) -> None:
        """The slot, counted from the memory's first, has been written. Never waits: a huge page
        takes milliseconds, on a thread that ends when nothing is left to do."""
        if not self._open:
            return
        begin = self._start + slot * self._slot_bytes
        places = range(begin // HUGE_BYTES, -(-(begin + self._slot_bytes) // HUGE_BYTES))
        with self._lock:
            found = [place for place in places if place in self._open]
            self._open.difference_update(found)
            self._waiting.extend(found)
            if not self._waiting or self._worker is not None:
                return
            worker = threading.Thread(target=self._work, name="kv-huge-pages", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:  # no room for a thread: these pages stay small
                logger.info("no huge pages of the landing window: %s", error)
                self._waiting.clear()
                return
            self._worker = worker

    def wait(self) -> None:
        """Until what was used is done."""
        with self._lock:
            worker = self._worker
        if worker is not None:
            worker.join()

    def _work(self) -> None:
        # ctypes lets other threads run meanwhile; mmap.madvise would not.
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        while (place := self._next()) is not None:
            if madvise(place * HUGE_BYTES, HUGE_BYTES, _COLLAPSE) == 0:
                self.collapsed += 1
            elif ctypes.get_errno() in _UNSUPPORTED and not self.collapsed:
                logger.info(
                    "the kernel makes no huge pages of the landing window: %s",
                    errno.errorcode[ctypes.get_errno()],
                )
                with self._lock:
                    self._open = set()
                    self._waiting.clear()

    def _next(self) -> int | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._worker = None
            return None

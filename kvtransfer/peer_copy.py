"""Writing pages into a peer's mapped memory, and digesting them on the way, in one kernel.

A pass of its own over the source pages, as other transports need before they send, is saved: what
is compared with the seal is what left, word for word.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtransfer.digest import device_weights, seals_of
from kvtransfer.layout import WORD_BYTES, PageLayout

ALIGNMENT_BYTES = 16
"""A thread moves as much at a time, so rows and slots must begin at multiples of it."""

_BLOCK_WORDS = 2048
"""Words that a program of the kernel takes at a time."""

_CHUNK_WORDS = 4 * _BLOCK_WORDS
"""Words of a row that a program takes in all: enough programs for few pages, few sums for many."""


@dataclass(slots=True)
class PendingCopy:
    """A kernel on its way; keeps alive what it uses."""

    _event: torch.cuda.Event
    _sums: torch.Tensor
    _used: tuple[torch.Tensor, ...]

    def ended(self) -> bool:
        """Whether everything has landed at the peer. Raises RuntimeError for an error of the
        device, after which the process cannot use it any more."""
        ended: bool = self._event.query()  # type: ignore[no-untyped-call]
        return ended

    def wait(self) -> None:
        self._event.synchronize()

    def seals(self) -> list[bytes]:
        """Of the pages that were written, as they were read; only once it has `ended`."""
        return seals_of(self._sums.view(-1, 1))


class PeerCopier:
    """Launches copies from one pool, on a stream of its own."""

    def __init__(self, pool: torch.Tensor, layout: PageLayout) -> None:
        """`pool`: [pages, page_bytes] uint8 on CUDA. Compiles the kernel, which takes seconds the
        first time on a machine. Raises ValueError for a layout that the kernel cannot move."""
        if layout.row_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"rows of {layout.row_bytes} bytes: no multiple of {ALIGNMENT_BYTES}")
        self._pool = pool
        self._layout = layout
        self._words = pool.view(torch.int32)
        # Ahead of the steps where both have work: it is short, and a request waits for it.
        self._stream = torch.cuda.Stream(pool.device, priority=-1)  # type: ignore[no-untyped-call]
        self._kernels: Any = importlib.import_module("kvtransfer.push_kernels")
        own = torch.empty(layout.page_bytes, dtype=torch.uint8, device=pool.device)
        self.start([(0, own.data_ptr())], [layout.page_size]).wait()

    def start(
        self,
        copies: Sequence[tuple[int, int]],
        valid_tokens: Sequence[int],
        *,
        rows: tuple[int, int] | None = None,
        digest_all: bool = True,
    ) -> PendingCopy:
        """Copies (page, address of its slot) pairs, valid tokens only. `rows`: `first .. end - 1`
        of each page alone; then `digest_all` says whether the other rows are read, too, so that
        the digest is of the whole page. Does not wait for anything: whoever wrote the pages must
        have waited for that.
        """
        layout, device = self._layout, self._pool.device
        first, end = rows if rows is not None else (0, layout.rows)
        read_first, read_end = (0, layout.rows) if digest_all else (first, end)
        row_words = layout.row_bytes // WORD_BYTES
        chunk = min(_CHUNK_WORDS, -(-row_words // _BLOCK_WORDS) * _BLOCK_WORDS)
        pages, addresses = zip(*copies, strict=True)
        host = torch.tensor([pages, addresses, valid_tokens], dtype=torch.int64, pin_memory=True)
        sums = torch.empty(len(copies), dtype=torch.int64, pin_memory=True)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            row_weights, word_weights = device_weights(layout, device)
            table = host.to(device, non_blocking=True)
            on_device = torch.zeros(len(copies), dtype=torch.int64, device=device)
            grid = (len(copies), read_end - read_first, -(-row_words // chunk))
            self._kernels.push_and_digest_kernel[grid](
                self._words,
                table,
                on_device,
                row_weights,
                word_weights,
                len(copies),
                layout.rows,
                read_first,
                first,
                end,
                row_words,
                layout.token_bytes // WORD_BYTES,
                CHUNK=chunk,
                BLOCK=_BLOCK_WORDS,
                num_warps=8,
            )
            sums.copy_(on_device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return PendingCopy(event, sums, (host, table, on_device))

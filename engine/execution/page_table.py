"""A batch's pages in the compressed form that paged kernels read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import EngineError
from engine.execution.forward_batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which pages each of `b` requests reads, request after request."""

    indptr: torch.Tensor
    """[b + 1] int32 on the host: where each request's pages begin in `indices`."""
    indices: torch.Tensor
    """[pages] int32 on the device: page numbers, in order of position."""
    last_page_len: torch.Tensor
    """[b] int32 on the host: tokens in each request's last page, 1 to page_size."""

    def first(self, requests: int) -> "PageTable":
        """Of the first so many requests."""
        end = int(self.indptr[requests])
        return PageTable(
            self.indptr[: requests + 1], self.indices[:end], self.last_page_len[:requests]
        )

    def after(self, requests: int) -> "PageTable":
        """Of those after the first so many."""
        if requests == 0:
            return self
        start = int(self.indptr[requests])
        indptr = host_int32([end - start for end in self.indptr[requests:].tolist()])
        return PageTable(indptr, self.indices[start:], self.last_page_len[requests:])


class TableBuffers:
    """Page tables at fixed addresses for captured graphs; sizes share them, since only one graph
    runs at a time."""

    __slots__ = ("indices", "indptr", "last_page_len")

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        self.indptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.indices = torch.zeros(pages, dtype=torch.int32, device=device)
        self.last_page_len = torch.zeros(rows, dtype=torch.int32, device=device)


MOST_HOST_PAGES = 8192
"""Up to so many pages the host writes down their numbers, 20 ns each; beyond, the device gathers
them, which takes five launches whatever their number."""


def page_table(batch: ForwardBatch, page_size: int) -> PageTable:
    """The batch's page table. Lengths come from the host, and page numbers, where they are not too
    many; else these come from the device's request-to-token table, so that nothing waits."""
    lengths = np.array(batch.seq_lens_cpu, dtype=np.int64)
    counts = -(-lengths // page_size)
    indptr = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=indptr[1:])
    device = batch.req_to_token.device
    if batch.pages is not None and indptr[-1] <= MOST_HOST_PAGES:
        own = zip(batch.pages, counts.tolist(), strict=True)
        numbers = list(chain.from_iterable(pages[:count] for pages, count in own))
        indices = host_int32(numbers).to(device, non_blocking=True)
        if len(numbers) != indptr[-1]:
            raise EngineError(f"{len(numbers)} pages for requests of {batch.seq_lens_cpu} tokens")
    else:
        indices = _gathered(batch, page_size, counts, indptr)
    return PageTable(
        indptr=host_int32(indptr),
        indices=indices,
        last_page_len=host_int32((lengths - 1) % page_size + 1),
    )


def _gathered(
    batch: ForwardBatch,
    page_size: int,
    counts: npt.NDArray[np.int64],
    indptr: npt.NDArray[np.int64],
) -> torch.Tensor:
    device = batch.req_to_token.device
    pages = np.arange(indptr[-1])
    # Of each page: whose it is, and its first token there.
    places = torch.empty((2, len(pages)), dtype=torch.int64, pin_memory=device.type == "cuda")
    owners_here, first_tokens_here = places.numpy()
    owners_here[:] = np.repeat(np.arange(len(counts)), counts)
    first_tokens_here[:] = (pages - np.repeat(indptr[:-1], counts)) * page_size
    owners, first_tokens = places.to(device, non_blocking=True)
    rows = batch.req_pool_indices.index_select(0, owners)
    slots = batch.req_to_token[rows, first_tokens]
    return torch.div(slots, page_size, rounding_mode="floor").to(torch.int32)


def host_int32(values: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
    """[n] int32 on the host, pinned where there is a GPU to copy to."""
    made = torch.empty(len(values), dtype=torch.int32, pin_memory=torch.cuda.is_available())
    made.numpy()[:] = values
    return made

"""A batch's pages in the compressed form that paged kernels read."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.execution.device import to_device
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


def page_table(batch: ForwardBatch, page_size: int) -> PageTable:
    """The batch's page table. Lengths come from the host, page numbers from the device's
    request-to-token table, so that nothing waits."""
    device = batch.req_to_token.device
    counts = [-(-length // page_size) for length in batch.seq_lens_cpu]
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    first_tokens = [page * page_size for count in counts for page in range(count)]
    rows = batch.req_pool_indices.index_select(0, to_device(owners, device))
    slots = batch.req_to_token[rows, to_device(first_tokens, device)]
    return PageTable(
        indptr=host_int32([0, *accumulate(counts)]),
        indices=torch.div(slots, page_size, rounding_mode="floor").to(torch.int32),
        last_page_len=host_int32([(n - 1) % page_size + 1 for n in batch.seq_lens_cpu]),
    )


def host_int32(values: list[int]) -> torch.Tensor:
    """[n] int32 on the host, pinned where there is a GPU to copy to."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=torch.cuda.is_available())

"""What captured decode steps read, at addresses that stay, and one kernel that writes it.

Between two replays of a graph the device does nothing but prepare the next one: each copy or small
kernel there is a few microseconds in which it idles, and a copy from the host between two kernels
ten or twenty. So page numbers are gathered on the device, by the kernel that also copies the step's
inputs and fills the rows of padding.
"""

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch

from engine.execution.forward_batch import ForwardBatch
from engine.execution.page_table import PageTable, TableBuffers, host_int32, page_table
from engine.memory.kv_pool import PageMajorKVPool
from engine.models.rotary_store import triton_installed


class DecodeInputs:
    """Of up to `rows` requests; sizes share it, since only one graph runs at a time. Rows of
    padding read and write the pool's padding page only."""

    def __init__(self, rows: int, pages: int, kv_pool: PageMajorKVPool) -> None:
        """`pages`: the most that all requests list together."""
        device = kv_pool.device
        self._page_size = kv_pool.page_size
        self._padding_page = kv_pool.num_pages
        self._padding_slot = kv_pool.num_pages * kv_pool.page_size
        self.input_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.out_cache_loc = torch.full_like(self.positions, self._padding_slot)
        self.tables = TableBuffers(rows, pages, device)
        self._lanes = 1 << (rows - 1).bit_length()
        self._on_device = device.type == "cuda" and triton_installed()
        if self._on_device:  # built now, and not when somebody waits for a token
            none = self.positions
            self._launch(self.tables.indices[:1].view(1, 1), none, none, (none, none, none), 0, 1)

    def padding(self, size: int) -> PageTable:
        """`size` rows of padding."""
        self._pad(0, size, first_page=0)
        return self._table(np.zeros(0, dtype=np.int64), size)

    def write(self, batch: ForwardBatch, size: int) -> PageTable:
        """The batch's rows, and padding up to `size`."""
        count = len(batch.seq_lens_cpu)
        table = self._table(np.array(batch.seq_lens_cpu, dtype=np.int64), size)
        inputs = batch.input_ids, batch.positions, batch.out_cache_loc
        if self._on_device:
            self._launch(
                batch.req_to_token, batch.req_pool_indices, batch.seq_lens, inputs, count, size
            )
            return table
        pages = page_table(batch, self._page_size).indices
        self.tables.indices[: len(pages)].copy_(pages)
        kept = self.input_ids, self.positions, self.out_cache_loc
        for target, source in zip(kept, inputs, strict=True):
            target[:count].copy_(source)
        self._pad(count, size, first_page=len(pages))
        return table

    def _table(self, lengths: np.typing.NDArray[np.int64], size: int) -> PageTable:
        """For requests of `lengths` tokens and padding; page numbers are where they are kept."""
        padded = np.ones(size, dtype=np.int64)
        padded[: len(lengths)] = lengths
        indptr = np.zeros(size + 1, dtype=np.int64)
        np.cumsum(-(-padded // self._page_size), out=indptr[1:])
        return PageTable(
            indptr=host_int32(indptr),
            indices=self.tables.indices[: int(indptr[-1])],
            last_page_len=host_int32((padded - 1) % self._page_size + 1),
        )

    def _pad(self, start: int, end: int, *, first_page: int) -> None:
        self.tables.indices[first_page : first_page + end - start].fill_(self._padding_page)
        self.input_ids[start:end].zero_()
        self.positions[start:end].zero_()
        self.out_cache_loc[start:end].fill_(self._padding_slot)

    def _launch(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        inputs: tuple[torch.Tensor, ...],
        count: int,
        size: int,
    ) -> None:
        _kernel()[(size,)](
            req_to_token,
            req_to_token.stride(0),
            req_pool_indices,
            seq_lens,
            *inputs,
            *(self.input_ids, self.positions, self.out_cache_loc),
            self.tables.indices,
            count,
            self._padding_page,
            self._padding_slot,
            PAGE_SIZE=self._page_size,
            LANES=self._lanes,
            num_warps=4,
        )


@cache
def _kernel() -> Any:
    return importlib.import_module("engine.execution.decode_inputs_kernel").decode_inputs_kernel

"""Attention on CUDA that gives a token the same result in every batch, chunk and step.

One kernel for prompts and for decode, so that KV written by either is the same to the last bit. It
goes through a request's tokens in order and never splits them by load, as faster kernels do: a long
context at a small batch takes longer for it.
"""

import importlib
import math
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from engine.execution.device import moved
from engine.execution.forward_batch import ForwardBatch
from engine.execution.page_table import PageTable, TableBuffers, host_int32, page_table
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.ops import FreshKV

_ROWS, _KEYS = 64, 64
"""A tile: (token, query head) pairs, and KV tokens that they meet at a time."""

MOST_QUERIES_A_KV_HEAD = _ROWS


class InvariantAttention:
    """`AttentionBackend`; bfloat16 and float16, KV in the same or in float8."""

    name = "invariant"

    def __init__(self, config: ModelConfig, kv_pool: PageMajorKVPool) -> None:
        self._pool = kv_pool
        self._group = config.num_heads // config.num_kv_heads
        self._tokens = _ROWS // self._group
        """Tokens a tile."""
        self._scale_log2 = math.log2(math.e) / math.sqrt(config.head_dim)
        self._plan = _Plan(*(torch.empty(0, dtype=torch.int32) for _ in range(3)))

    def plan(self, batch: ForwardBatch) -> None:
        table = page_table(batch, self._pool.page_size)
        self._plan = self._planned(table, batch.extend_lens, batch.seq_lens_cpu)

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        return self.run_planned(self._plan, layer, q)

    def for_graph(self, buffers: TableBuffers, rows: int) -> "InvariantGraphAttention":
        """Decode of `rows` requests, whose plan lies at fixed addresses."""
        return InvariantGraphAttention(self, buffers, rows, self._pool.page_size)

    def run_planned(self, plan: "_Plan", layer: int, q: torch.Tensor) -> torch.Tensor:
        """`run` with a plan of the caller's."""
        tokens, heads, head_dim = q.shape
        pool = self._pool
        out = torch.empty((tokens, heads * head_dim), dtype=q.dtype, device=q.device)
        row = pool.num_kv_heads * head_dim
        first_key = 2 * layer * pool.page_size * row
        _kernel()[(plan.tiles.shape[0], pool.num_kv_heads)](
            q,
            pool.data,
            out,
            plan.tiles,
            plan.page_starts,
            plan.pages,
            q.stride(0),
            2 * pool.num_layers * pool.page_size * row,
            first_key,
            first_key + pool.page_size * row,
            pool.num_kv_heads,
            self._scale_log2,
            GROUP=self._group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=pool.page_size,
            BLOCK_M=_ROWS,
            BLOCK_N=_KEYS,
            num_warps=4,
            num_stages=2,
            # A product and a sum fused or not is the compiler's choice otherwise.
            enable_fp_fusion=False,
        )
        return out

    def _planned(self, table: PageTable, counts: list[int], seq_lens: list[int]) -> "_Plan":
        tiles = []
        starts = [0, *accumulate(counts)]
        for row, (count, length) in enumerate(zip(counts, seq_lens, strict=True)):
            for done in range(0, count, self._tokens):
                taken = min(self._tokens, count - done)
                tiles.append((row, starts[row] + done, taken, length - count + done))
        device = self._pool.device
        return _Plan(
            moved(host_int32([value for tile in tiles for value in tile]), device).view(-1, 4),
            moved(table.indptr, device),
            table.indices,
        )


class _Plan:
    """int32, on the device."""

    __slots__ = ("page_starts", "pages", "tiles")

    def __init__(self, tiles: torch.Tensor, page_starts: torch.Tensor, pages: torch.Tensor) -> None:
        self.tiles = tiles
        """[n, 4]: request, first token in the step, tokens, position of the first."""
        self.page_starts = page_starts
        """[b + 1]: where each request's pages begin in `pages`."""
        self.pages = pages


class InvariantGraphAttention:
    """One captured batch size's attention: `plan` before each replay."""

    def __init__(
        self, shared: InvariantAttention, buffers: TableBuffers, rows: int, page_size: int
    ) -> None:
        self._shared = shared
        self._page_size = page_size
        tiles = torch.zeros((rows, 4), dtype=torch.int32, device=buffers.indices.device)
        self._plan = _Plan(tiles, buffers.indptr[: rows + 1], buffers.indices)

    def plan(self, pages: PageTable) -> None:
        """`pages` lists as many requests as were captured, each with one new token."""
        counts = (pages.indptr[1:] - pages.indptr[:-1]).tolist()
        last = pages.last_page_len.tolist()
        tiles = [
            value
            for row, (count, left) in enumerate(zip(counts, last, strict=True))
            for value in (row, row, 1, (count - 1) * self._page_size + left - 1)
        ]
        device = self._plan.tiles.device
        self._plan.tiles.copy_(moved(host_int32(tiles), device).view(-1, 4))
        self._plan.page_starts.copy_(moved(pages.indptr, device))
        self._plan.pages[: pages.indices.shape[0]].copy_(pages.indices)

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        return self._shared.run_planned(self._plan, layer, q)


@cache
def _kernel() -> Any:
    return importlib.import_module("engine.models.invariant_kernels").attention_kernel

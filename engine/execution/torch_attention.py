"""Attention in plain torch: the CPU's backend, and CUDA's where FlashInfer is not at hand.

One-token rows (decode, and prompts' last single tokens) of similar length are computed together:
their pages are gathered into one padded block, and the query heads that share a KV head are taken
as that head's queries, so that nothing is repeated in memory. Longer rows are computed request by
request in blocks of queries, which bounds the mask's size whatever the prompt's.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.execution.device import to_device
from engine.execution.forward_batch import ForwardBatch
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.ops import FreshKV

_QUERY_BLOCK = 512
"""Most queries in one masked call; a mask of that many rows is small beside the scores."""

_SHORT_PAGES = 2
"""Rows of at most this many pages are always computed together: padding costs less than a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleRows:
    """Requests with one input token that are computed together."""

    tokens: torch.Tensor | None
    """[n] int64 into the step's tokens; None: all of them, in order."""
    blocks: torch.Tensor
    """[2, n, pages]: KVPool.block_indices, padded to the longest."""
    lengths: torch.Tensor
    """[n] int64; tokens that each sees."""
    mask: torch.Tensor | None
    """[n, 1, 1, pages * page_size] in q's dtype: 0 to see, -inf to hide. None: `lengths` do."""


@dataclass(frozen=True, slots=True)
class _Extend:
    """One request with several input tokens."""

    start: int
    """Index of its first token in the step."""
    prefix: int
    length: int
    blocks: torch.Tensor
    """[2, 1, pages]."""


class TorchAttention:
    """`AttentionBackend` for any device and floating dtype."""

    name = "torch"

    def __init__(self, config: ModelConfig, kv_pool: PageMajorKVPool) -> None:
        self._pool = kv_pool
        self._groups = config.num_heads // config.num_kv_heads
        self._singles: list[SingleRows] = []
        self._extends: list[_Extend] = []
        self._causal = torch.empty(0)
        self._causal_prefix = 0

    def plan(self, batch: ForwardBatch) -> None:
        singles = [row for row, length in enumerate(batch.extend_lens) if length == 1]
        starts = [0]
        for length in batch.extend_lens:
            starts.append(starts[-1] + length)
        groups = self._similar_lengths(singles, batch.seq_lens_cpu)
        alone = len(groups) == 1 and len(singles) == len(batch.extend_lens)
        self._singles = [self._plan_singles(batch, rows, starts, alone) for rows in groups]
        self._extends = [
            _Extend(starts[row], batch.extend_prefix_lens[row], length, self._blocks(batch, [row]))
            for row, length in enumerate(batch.extend_lens)
            if length > 1
        ]
        self._plan_causal_mask()

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        # Query head h reads KV head h // groups.
        grouped = q.view(tokens, heads // self._groups, self._groups, head_dim)
        if len(self._singles) == 1 and self._singles[0].tokens is None:
            return self._run_singles(layer, grouped, self._singles[0]).reshape(tokens, -1)
        out = q.new_empty((tokens, heads // self._groups, self._groups, head_dim))
        for rows in self._singles:
            if rows.tokens is not None:
                attended = self._run_singles(layer, grouped.index_select(0, rows.tokens), rows)
                out.index_copy_(0, rows.tokens, attended)
        for extend in self._extends:
            self._run_extend(layer, grouped, extend, out)
        return out.view(tokens, -1)

    def _similar_lengths(self, rows: list[int], seq_lens: list[int]) -> list[list[int]]:
        """Groups whose longest row is at most twice the shortest, in pages, or short anyway: so
        that one long request does not make all others pay for its padding."""
        groups: list[list[int]] = []
        longest = 0
        for row in sorted(rows, key=lambda row: -seq_lens[row]):
            pages = self._pages_of(seq_lens[row])
            if not groups or (2 * pages < longest and longest > _SHORT_PAGES):
                groups.append([])
                longest = pages
            groups[-1].append(row)
        return [sorted(group) for group in groups]

    def _plan_singles(
        self, batch: ForwardBatch, rows: list[int], starts: list[int], alone: bool
    ) -> SingleRows:
        device = self._pool.device
        blocks = self._blocks(batch, rows)
        width = blocks.shape[2] * self._pool.page_size
        columns = torch.arange(width, device=device)
        lengths = to_device([batch.seq_lens_cpu[row] for row in rows], device)
        mask = torch.zeros((len(rows), 1, 1, width), dtype=self._pool.compute_dtype, device=device)
        mask.masked_fill_((columns >= lengths[:, None])[:, None, None], float("-inf"))
        tokens = None if alone else to_device([starts[row] for row in rows], device)
        return SingleRows(tokens=tokens, blocks=blocks, lengths=lengths, mask=mask)

    def _blocks(self, batch: ForwardBatch, rows: list[int]) -> torch.Tensor:
        """Block indices [2, n, pages] of `rows`; where a row has fewer pages than the longest, its
        first one stands in (the table holds anything beyond a row's length)."""
        device, page_size = self._pool.device, self._pool.page_size
        counts = [self._pages_of(batch.seq_lens_cpu[row]) for row in rows]
        columns = torch.arange(max(counts), device=device)
        if min(counts) != max(counts):
            columns = torch.where(columns < to_device(counts, device)[:, None], columns, 0)
        table_rows = batch.req_pool_indices
        if len(rows) != table_rows.shape[0]:
            table_rows = table_rows.index_select(0, to_device(rows, device))
        slots = batch.req_to_token[table_rows[:, None], columns * page_size]
        return self._pool.block_indices(slots.to(torch.int64) // page_size)

    def _plan_causal_mask(self) -> None:
        """One band serves every block of queries of every request: a block that starts after `c`
        visible tokens takes the columns from (largest c) - c on."""
        self._causal_prefix = 0
        block = 0
        for extend in self._extends:
            if extend.prefix or extend.length > _QUERY_BLOCK:
                last_start = (extend.length - 1) // _QUERY_BLOCK * _QUERY_BLOCK
                self._causal_prefix = max(self._causal_prefix, extend.prefix + last_start)
                block = max(block, min(extend.length, _QUERY_BLOCK))
        if not block:
            return
        width = self._causal_prefix + block
        self._causal = torch.full(
            (block, width), float("-inf"), dtype=self._pool.compute_dtype, device=self._pool.device
        ).triu_(self._causal_prefix + 1)

    def _run_singles(self, layer: int, q: torch.Tensor, rows: SingleRows) -> torch.Tensor:
        """[n, kv_heads, groups, head_dim] for q of that shape."""
        k, v = self._pool.read_blocks(layer, rows.blocks)
        return scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=rows.mask
        )

    def _run_extend(self, layer: int, q: torch.Tensor, extend: _Extend, out: torch.Tensor) -> None:
        k, v = self._pool.read_blocks(layer, extend.blocks)
        # [kv_heads, groups, tokens, head_dim]; a stride of 0 repeats the KV head for its group.
        shape = (-1, self._groups, -1, -1)
        k = k[0].transpose(0, 1).unsqueeze(1).expand(shape)
        v = v[0].transpose(0, 1).unsqueeze(1).expand(shape)
        for first in range(0, extend.length, _QUERY_BLOCK):
            count = min(_QUERY_BLOCK, extend.length - first)
            before = extend.prefix + first
            tokens = slice(extend.start + first, extend.start + first + count)
            mask = None
            if before:
                left = self._causal_prefix - before
                mask = self._causal[:count, left : left + before + count]
                if mask.is_cuda:
                    mask = mask.contiguous()  # its kernels want aligned rows
            attended = scaled_dot_product_attention(
                q[tokens].permute(1, 2, 0, 3),
                k[:, :, : before + count],
                v[:, :, : before + count],
                attn_mask=mask,
                is_causal=mask is None,
            )
            out[tokens] = attended.permute(2, 0, 1, 3)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._pool.page_size)

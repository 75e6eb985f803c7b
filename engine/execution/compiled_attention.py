"""A CPU's attention for float32: single tokens read their pages where they lie.

Plain torch gathers every page a decode step reads into a padded block first, which moves the whole
context through memory three times; here it is read once. Longer rows are plain torch's.
"""

import torch

from engine.execution.device import to_device
from engine.execution.forward_batch import ForwardBatch
from engine.execution.torch_attention import SingleRows, TorchAttention
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.cpu_library import CpuLibrary

_VECTOR = 8
"""Floats that are computed at a time; a head is a whole number of them."""


def can_attend(config: ModelConfig, kv_pool: PageMajorKVPool) -> bool:
    return (
        kv_pool.device.type == "cpu"
        and kv_pool.dtype is torch.float32
        and config.head_dim % _VECTOR == 0
    )


class CompiledAttention(TorchAttention):
    """`AttentionBackend` where `can_attend`."""

    name = "compiled"

    def __init__(self, config: ModelConfig, kv_pool: PageMajorKVPool, library: CpuLibrary) -> None:
        super().__init__(config, kv_pool)
        self._library = library

    def _similar_lengths(self, rows: list[int], seq_lens: list[int]) -> list[list[int]]:
        """All of them: nothing is padded."""
        return [rows] if rows else []

    def _plan_singles(
        self, batch: ForwardBatch, rows: list[int], starts: list[int], alone: bool
    ) -> SingleRows:
        device = self._pool.device
        return SingleRows(
            tokens=None if alone else to_device([starts[row] for row in rows], device),
            blocks=self._blocks(batch, rows).contiguous(),
            lengths=to_device([batch.seq_lens_cpu[row] for row in rows], device),
            mask=None,
        )

    def _run_singles(self, layer: int, q: torch.Tensor, rows: SingleRows) -> torch.Tensor:
        count, kv_heads, group, head_dim = q.shape
        if q.stride()[1:] != (group * head_dim, head_dim, 1):
            q = q.contiguous()
        pool = self._pool
        out = q.new_empty(q.shape)
        self._library.decode_attention(
            *(q.data_ptr(), q.stride(0), pool.data[0, layer].data_ptr()),
            *(rows.blocks.data_ptr(), rows.blocks.shape[2], rows.lengths.data_ptr()),
            *(out.data_ptr(), count, group, pool.page_size, kv_heads, head_dim),
        )
        return out

"""`Ops` for float32 on a CPU, as the functions of `cpu_kernels.c` and `cpu_products.c`."""

import torch

from engine.memory.kv_pool import PageMajorKVPool
from engine.models.cpu_library import CpuLibrary
from engine.models.ops import FreshKV, TorchOps
from engine.models.packed_weights import is_packed, outputs


class CpuOps(TorchOps):
    """`add_rms_norm` and `rotate_and_store` work in place."""

    def __init__(self, cos_sin_table: torch.Tensor, library: CpuLibrary) -> None:
        """`cos_sin_table` is rope.cos_sin_table's."""
        super().__init__(cos_sin_table)
        self._table = cos_sin_table.contiguous()
        self._library = library

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (positions.contiguous(),)

    def rotate(
        self, qk: torch.Tensor, num_heads: int, rotation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        return super().rotate(qk, num_heads, super().rotation(rotation[0]))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dim() != 2:  # queries and keys, head by head
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.add_rms_norm(
            *(x.data_ptr(), None, weight.data_ptr(), out.data_ptr()), *x.shape, eps
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        self._library.add_rms_norm(
            *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), x.data_ptr()), *x.shape, eps
        )
        return x, residual

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        rotation: tuple[torch.Tensor, ...],
        kv_pool: PageMajorKVPool,
        layer: int,
        kv_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, FreshKV]:
        if kv_pool.dtype is not torch.float32:
            return super().rotate_and_store(qkv, num_heads, rotation, kv_pool, layer, kv_rows)
        qkv, kv_rows = qkv.contiguous(), kv_rows.contiguous()
        tokens, _, head_dim = qkv.shape
        keys = kv_pool.data[0, layer]
        self._library.rotate_and_store(
            *(qkv.data_ptr(), rotation[0].data_ptr(), self._table.data_ptr()),
            *(keys[0].data_ptr(), keys[1].data_ptr(), kv_rows.data_ptr()),
            *(tokens, num_heads, kv_pool.num_kv_heads, head_dim),
        )
        num_qk_heads = num_heads + kv_pool.num_kv_heads
        return qkv[:, :num_heads], FreshKV(qkv[:, num_heads:num_qk_heads], qkv[:, num_qk_heads:])

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        rows, both = gate_up.shape
        out = gate_up.new_empty((rows, both // 2))
        self._library.silu_and_mul(gate_up.data_ptr(), out.data_ptr(), rows, both // 2)
        return out

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`weight` may be packed; then a row's result is the same, to the bit, whatever rows are
        computed beside it."""
        if not is_packed(weight):
            return super().linear(x, weight, bias)
        x = x.contiguous()
        rows, depth = x.shape
        out = x.new_empty((rows, outputs(weight)))
        narrow = weight.dtype is torch.bfloat16
        product = self._library.linear_bfloat16 if narrow else self._library.linear_float32
        product(
            *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(out.data_ptr(), rows, outputs(weight), depth),
        )
        return out

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = self.linear(x, weight)
        return product if out is None else out.copy_(product)

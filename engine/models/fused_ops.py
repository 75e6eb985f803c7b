"""`Ops` as FlashInfer's fused kernels, and the one door to the FlashInfer library."""

import importlib
import importlib.util
from typing import Any

import torch
from torch.nn import functional

from engine.memory.kv_pool import PageMajorKVPool
from engine.models.float32_residual import add_rms_norm, rms_norm
from engine.models.ops import FreshKV, room_for_logits
from engine.models.products import Products
from engine.models.rotary_store import (
    can_rotate_and_store,
    rotate_and_store,
    triton_installed,
)
from engine.models.single_row import single_row_linear

FUSED_DTYPES = (torch.bfloat16, torch.float16)
"""What FlashInfer's kernels are built for."""


def flashinfer_installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer_library() -> Any:
    """The `flashinfer` module. Untyped and optional: nothing else imports it.

    Raises ImportError where it, or something that it needs, is missing.
    """
    return importlib.import_module("flashinfer")


class FusedOps:
    """CUDA only; bfloat16 and float16. All but `rms_norm` and `silu_and_mul` work in place."""

    def __init__(self, cos_sin_table: torch.Tensor) -> None:
        """`cos_sin_table` is rope.cos_sin_table's, on the GPU."""
        library = flashinfer_library()
        self._rms_norm = library.rmsnorm
        self._add_rms_norm = library.fused_add_rmsnorm
        self._rotate = library.apply_rope_with_cos_sin_cache_inplace
        self._silu_and_mul = library.silu_and_mul
        self._table = cos_sin_table
        self._triton = triton_installed()
        self._products = Products(self.silu_and_mul, triton=self._triton)
        self._stores = can_rotate_and_store(cos_sin_table.shape[-1])

    @property
    def products(self) -> Products | None:
        return self._products

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (positions,)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype != weight.dtype:
            return rms_norm(x, weight, eps)
        result: torch.Tensor = self._rms_norm(x, weight, eps)
        return result

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._triton:
            return add_rms_norm(x, residual, weight, eps)
        self._add_rms_norm(x, residual, weight, eps)
        return x, residual

    def qk_norm(
        self,
        qk: torch.Tensor,
        num_heads: int,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        self._rms_norm(q, q_weight, eps, out=q)
        self._rms_norm(k, k_weight, eps, out=k)
        return qk

    def rotate(
        self, qk: torch.Tensor, num_heads: int, rotation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        tokens, _, head_dim = qk.shape
        # The library wants heads folded into one dimension. qk is a strided slice of the merged
        # projection: folding keeps the view, and the rotation happens in place.
        q = qk[:, :num_heads].view(tokens, -1)
        k = qk[:, num_heads:].view(tokens, -1)
        self._rotate(rotation[0], q, k, head_dim, self._table, is_neox=True)
        return qk

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        rotation: tuple[torch.Tensor, ...],
        kv_pool: PageMajorKVPool,
        layer: int,
        kv_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, FreshKV]:
        num_qk_heads = qkv.shape[1] - kv_pool.num_kv_heads
        fresh = FreshKV(qkv[:, num_heads:num_qk_heads], qkv[:, num_qk_heads:])
        if self._stores:
            rotate_and_store(qkv, num_heads, rotation[0], self._table, kv_pool, layer, kv_rows)
        else:
            self.rotate(qkv[:, :num_qk_heads], num_heads, rotation)
            kv_pool.write_rows(layer, kv_rows, *fresh)
        return qkv[:, :num_heads], fresh

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._silu_and_mul(gate_up)
        return result

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        way = self._products.chosen("gated", x.shape[0], weight)
        if way is not None:
            return way(x, weight, bias, None)
        return self.silu_and_mul(self.linear(x, weight, bias))

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        way = self._products.chosen("linear", x.shape[0], weight)
        if way is not None:
            return way(x, weight, bias, None)
        if self._triton and x.shape[0] == 1:
            return single_row_linear(x, weight, bias)
        return functional.linear(x, weight, bias)

    def linear_onto(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        way = self._products.chosen("onto", x.shape[0], weight)
        if way is None:
            return self.linear(x, weight, bias), residual
        return None, way(x, weight, bias, residual.to(torch.float32))

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if out is None:
            out = room_for_logits(x, weight)
        way = self._products.chosen("logits", x.shape[0], weight)
        if way is not None:
            return way(x, weight, None, out)
        if self._triton and x.shape[0] == 1:
            return single_row_linear(x, weight, None, out)
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

"""The elementwise steps between a decoder's matrix products, behind one small interface.

Plain torch here, readable and exact in float32; `fused_ops` computes the same with one kernel a
step on CUDA. A decoder calls them without knowing which it holds.
"""

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from engine.memory.kv_pool import PageMajorKVPool
from engine.models.products import Products


class FreshKV(NamedTuple):
    """What a step has just written to the pool, where it lies beside it: [t, kv_heads, head_dim],
    any strides."""

    keys: torch.Tensor
    """Rotated."""
    values: torch.Tensor


class Ops(Protocol):
    """Every method may overwrite the activations it is given: use what it returns."""

    @property
    def products(self) -> Products | None:
        """Where the kernel of a product may be chosen by its number of rows; None: there is one way
        for all."""
        ...

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `rotate` needs for tokens at `positions` [t] int64; once a step."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / RMS(x) * weight over the last dimension of x [t, hidden], in the dtype of `weight`; x
        may be a residual stream in float32."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual) in the dtype of x, x + residual in float32), both [t, hidden].

        The residual stream of a model in bfloat16 is not rounded from layer to layer: that rounding
        is what moves most argmaxes away from float32's.
        """
        ...

    def qk_norm(
        self,
        qk: torch.Tensor,
        num_heads: int,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """Per-head norm of qk [t, num_heads + kv_heads, head_dim], queries first."""
        ...

    def rotate(
        self, qk: torch.Tensor, num_heads: int, rotation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Rotary embedding of qk [t, num_heads + kv_heads, head_dim]; dimension i turns with
        dimension i + head_dim / 2."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        rotation: tuple[torch.Tensor, ...],
        kv_pool: PageMajorKVPool,
        layer: int,
        kv_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, FreshKV]:
        """Rotates queries and keys of qkv [t, num_heads + 2 * kv_heads, head_dim] (see `rotate`)
        and stores keys and values at `kv_rows` (see PageMajorKVPool.write_rows).

        The queries [t, num_heads, head_dim], and what was stored."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up for gate_up [t, 2 * n], gate first: [t, n]."""
        ...

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """silu_and_mul(linear(x, weight, bias))."""
        ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x @ weight.T + bias for x [t, k], weight [n, k] and bias [n]: [t, n]."""
        ...

    def linear_onto(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(linear(x, weight, bias), residual), whose sum is wanted next; (None, the sum in float32)
        where that comes with the product, and rounds once less."""
        ...

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x @ weight.T for x [t, k] and weight [n, k], in float32 as it was summed and never
        rounded to their dtype: [t, n], in `out` where one is given."""
        ...


_LOGITS_SLICE = 2048
"""Rows of the vocabulary that a CPU converts to float32 at a time: a few MiB, which its cache
holds."""

_FEW_ROWS = range(2, 65)
"""Where one product with a weight that lies output-major, written weight first, takes a CPU's
library half the time of `linear` (AMD EPYC, MKL 2024.2, fp32: 4.1 for 14 ms at 4 rows, 6.2 for 11.8
at 16, 12 for 21 at 64). Weights that lie input-major (see `weights`) need no such help."""


def room_for_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Room for the logits of `x` [t, k] by `weight` [n, k]."""
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


class TorchOps:
    """Plain torch: any device, any floating dtype; norms and rotations computed in float32."""

    products: Products | None = None

    def __init__(self, cos_sin_table: torch.Tensor) -> None:
        """`cos_sin_table` is rope.cos_sin_table's."""
        cos, sin = cos_sin_table.chunk(2, dim=-1)
        self._cos = torch.cat((cos, cos), dim=-1)
        # With the first half negated, rotating is a roll, a product and a sum.
        self._sin = torch.cat((-sin, sin), dim=-1)

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos = self._cos.index_select(0, positions).unsqueeze(1)
        sin = self._sin.index_select(0, positions).unsqueeze(1)
        return cos, sin

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        full = x.float()
        variance = full.pow(2).mean(-1, keepdim=True)
        return (weight * (full * torch.rsqrt(variance + eps))).to(weight.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual.float()
        return self.rms_norm(residual, weight, eps), residual

    def qk_norm(
        self,
        qk: torch.Tensor,
        num_heads: int,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        q = self.rms_norm(qk[:, :num_heads], q_weight, eps)
        k = self.rms_norm(qk[:, num_heads:], k_weight, eps)
        return torch.cat((q, k), dim=1)

    def rotate(
        self, qk: torch.Tensor, num_heads: int, rotation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        cos, sin = rotation
        full = qk.float()
        swapped = full.roll(full.shape[-1] // 2, dims=-1)
        return (full * cos).addcmul_(swapped, sin).to(qk.dtype)

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
        qk = self.rotate(qkv[:, :num_qk_heads], num_heads, rotation)
        fresh = FreshKV(qk[:, num_heads:], qkv[:, num_qk_heads:])
        kv_pool.write_rows(layer, kv_rows, *fresh)
        return qk[:, :num_heads], fresh

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.silu_and_mul(self.linear(x, weight, bias))

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.shape[0] in _FEW_ROWS and not x.is_cuda and weight.is_contiguous():
            product = torch.mm(weight, x.t()).t().contiguous()
            return product if bias is None else product.add_(bias)
        return functional.linear(x, weight, bias)

    def linear_onto(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        return self.linear(x, weight, bias), residual

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.dtype == torch.float32:
            product = self.linear(x, weight)
            return product if out is None else out.copy_(product)
        if out is None:
            out = room_for_logits(x, weight)
        if weight.is_cuda:
            return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        full = x.float()
        for start in range(0, weight.shape[0], _LOGITS_SLICE):
            rows = weight[start : start + _LOGITS_SLICE]
            out[:, start : start + _LOGITS_SLICE] = self.linear(full, rows.float())
        return out

"""Rotary embedding and the write of keys and values to the pool as one Triton kernel.

Without it a layer takes three launches for this (rotate, store keys, store values); at small decode
batches each costs more to launch and drain than to run.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch

from engine.memory.kv_pool import PageMajorKVPool
from engine.models.dependent_launch import dependent_launch

_HEADS_A_PROGRAM = 8


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_rotate_and_store(head_dim: int) -> bool:
    """Triton's blocks are powers of two."""
    return triton_installed() and head_dim >= 16 and head_dim & (head_dim - 1) == 0


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    positions: torch.Tensor,
    cos_sin_table: torch.Tensor,
    kv_pool: PageMajorKVPool,
    layer: int,
    kv_rows: torch.Tensor,
) -> None:
    """Rotates queries and keys of qkv [t, num_heads + 2 * kv_heads, head_dim] in place, and stores
    its keys and values in the pool's `layer`, at `kv_rows` = kv_pool.rows(loc) [t] int64.
    `positions` [t] int64; `cos_sin_table` is
    rope.cos_sin_table's, float32; all on one CUDA device, qkv contiguous.
    """
    tokens, heads, head_dim = qkv.shape
    kernel, cdiv = _kernel()
    kernel[(tokens, cdiv(heads, _HEADS_A_PROGRAM))](
        qkv,
        positions,
        cos_sin_table,
        kv_rows,
        kv_pool.data,
        2 * layer * kv_pool.page_size,
        kv_pool.page_size,
        num_heads,
        kv_pool.num_kv_heads,
        FP8=kv_pool.is_fp8,
        HALF=head_dim // 2,
        HEADS=_HEADS_A_PROGRAM,
        **dependent_launch(qkv.device),
        num_warps=2,
    )


@cache
def _kernel() -> tuple[Any, Any]:
    kernels = importlib.import_module("engine.models.triton_kernels")
    return kernels.rotate_and_store_kernel, kernels.triton.cdiv

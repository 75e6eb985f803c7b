"""`Ops` on CUDA whose results for a token do not depend on which tokens are computed beside it.

FlashInfer's norms, rotation and SiLU have a program for each row or element, so they are that
already. Products are not: a library picks its kernel, and with it the order of its sums, by the
number of rows. Here one order serves all sizes.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from engine.errors import ConfigError
from engine.models.fused_ops import FusedOps
from engine.models.ops import room_for_logits
from engine.models.products import Products


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a product is cut. Sums run over the depth in order, 16 at a time, in all of them."""

    up_to_rows: int
    m: int
    n: int
    k: int
    stages: int
    warps: int


_TILES = (
    _Tiles(64, m=64, n=32, k=128, stages=5, warps=4),
    _Tiles(512, m=128, n=64, k=128, stages=4, warps=4),
    _Tiles(2**31, m=128, n=256, k=64, stages=3, warps=8),
)
"""For few rows, where reading the weights is all, narrow tiles, so that all processors read."""

_GROUP = 8


class InvariantOps(FusedOps):
    """As `FusedOps`, with products of one order."""

    @property
    def products(self) -> Products | None:
        return None  # one way for all sizes is the point

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return invariant_linear(x, weight, bias)

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = room_for_logits(x, weight) if out is None else out
        return invariant_linear(x, weight, None, out=out)


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: _Tiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for x [t, k], weight [n, k] and bias [n], contiguous on one CUDA device,
    in one 16-bit dtype, summed in float32: [t, n], in `out` (any dtype) where one is given. A row
    of it is the same, bit for bit, whatever the other rows and however many there are."""
    rows, depth = x.shape
    columns = weight.shape[0]
    if tiles is None:
        tiles = next(tiles for tiles in _TILES if rows <= tiles.up_to_rows)
    if out is None:
        out = x.new_empty((rows, columns))
    grid = -(-rows // tiles.m) * -(-columns // tiles.n)
    _kernel()[(grid,)](
        x if x.is_contiguous() else x.contiguous(),
        weight,
        weight if bias is None else bias,
        out,
        rows,
        columns,
        depth,
        HAS_BIAS=bias is not None,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        GROUP=_GROUP,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def check_products(weight: torch.Tensor) -> None:
    """Raises ConfigError where this GPU's products do depend on how they are cut: better no start
    than tokens that are called deterministic."""
    x = torch.randn(600, weight.shape[1], device=weight.device, dtype=weight.dtype)
    whole = invariant_linear(x, weight, None)
    for tiles in _TILES:
        for first, count in ((0, 1), (63, 64), (17, 400)):
            part = invariant_linear(x[first : first + count], weight, None, tiles)
            if not torch.equal(part, whole[first : first + count]):
                raise ConfigError(
                    f"deterministic: on {torch.cuda.get_device_name(weight.device)} a product of "
                    f"{count} rows in tiles of {tiles.m} differs from the same rows among 600; "
                    "run without --deterministic"
                )


@cache
def _kernel() -> Any:
    return importlib.import_module("engine.models.invariant_kernels").matmul_kernel

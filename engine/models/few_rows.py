"""The linear layers of a decode step with few rows, as one Triton kernel.

Such a product reads its weight once and computes next to nothing. The library's kernels leave 15 to
60 % of an H200's memory idle at 8 rows, most of it at their begin and end; this one asks for its
weights while the kernel before it still runs, and does SiLU and product of a gated MLP on the way
out.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from engine.models.dependent_launch import dependent_launch

MOST_ROWS = 64

_PARTIAL_SUMS = 2**22


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut."""

    columns: int
    """Of the weight's rows, a program."""
    depth: int
    """Elements of each that are read at a time."""
    stages: int
    """So many of them are under way."""
    splits: int = 1
    """Programs that share a tile, each for a part of the depth, where there are too few tiles."""
    warps: int = 4
    ahead: int = 512
    """Elements of each row that are asked for before the kernel ahead has ended."""

    @property
    def short(self) -> str:
        name = f"{self.columns}x{self.depth}x{self.stages}" + f"/{self.splits}" * (self.splits > 1)
        return name if self.ahead else f"{name} not ahead"

    def fit(self, weight_rows: int, depth: int) -> bool:
        part = depth // self.splits
        return (
            weight_rows % self.columns == 0
            and depth % (self.depth * self.splits) == 0
            and part >= self.ahead
            and (self.splits == 1 or weight_rows * self.splits * MOST_ROWS <= _PARTIAL_SUMS)
        )


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for x [t, k], weight [n, k] and bias [n], contiguous on one CUDA device,
    in one 16-bit dtype, t at most MOST_ROWS and n, k such that `tiles` fit; summed in float32.
    [t, n], in `out` (any dtype) where one is given."""
    return _launch(x, weight, bias, tiles, weight.shape[0], out, gated=False)


def few_rows_gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles
) -> torch.Tensor:
    """silu(gate) * up for gate_up = x @ weight.T + bias [t, 2 * n], gate first, which is nowhere
    rounded: [t, n]. Otherwise as few_rows_linear; `tiles` must fit n."""
    return _launch(x, weight, bias, tiles, weight.shape[0] // 2, None, gated=True)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    columns: int,
    out: torch.Tensor | None,
    *,
    gated: bool,
) -> torch.Tensor:
    rows, depth = x.shape
    if out is None:
        out = x.new_empty((rows, columns))
    partial, arrivals = _room(x.device)
    _kernel()[(columns // tiles.columns, tiles.splits)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        partial,
        arrivals,
        rows,
        columns,
        depth,
        HAS_BIAS=bias is not None,
        GATED=gated,
        ROWS=max(16, 1 << (rows - 1).bit_length()),
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        SPLITS=tiles.splits,
        AHEAD=tiles.ahead,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **dependent_launch(x.device),
    )
    return out


@cache
def _room(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For partial sums and for how many of a tile's programs have left theirs, which is zero
    between products. One for all, as products follow one another."""
    partial = torch.empty(_PARTIAL_SUMS, dtype=torch.float32, device=device)
    return partial, torch.zeros(_PARTIAL_SUMS // 1024, dtype=torch.int32, device=device)


@cache
def _kernel() -> Any:
    return importlib.import_module("engine.models.triton_kernels").few_rows_kernel

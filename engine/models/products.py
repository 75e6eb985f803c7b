"""Which kernel computes a product: measured, for the numbers of rows that decode graphs have.

No library knows: cuBLAS and cuBLASLt pick by rules of their own, and are up to a tenth apart either
way; at few rows our own kernel may be faster than both. Which is best differs with rows, shape and
GPU, so each is timed once before a step is captured, as part of a step's layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch.nn import functional

from engine.models.few_rows import MOST_ROWS, Tiles, few_rows_gated, few_rows_linear
from engine.models.remembered_choices import RememberedChoices
from engine.models.single_row import single_row_linear
from engine.models.timing import replay_us
from engine.models.weights import ModelWeights

Kind = Literal["linear", "gated", "logits"]
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""(x, weight, bias, out) → the product, in `out` where the kind has one."""

LINEAR_TILES = (Tiles(64, 128, 5, splits=2), Tiles(64, 128, 5))
GATED_TILES = (Tiles(64, 64, 5), Tiles(64, 128, 3))
"""The best of many (`bench/gpu_tiles.py`)."""

_TOUCHED_BYTES = 300 << 20
"""Weights that a measurement goes through: several times what a cache holds."""

_WORTH = 0.998
"""Another way than the library's must take less than this share of its time."""


@dataclass(frozen=True, slots=True)
class Product:
    """One of a step's products, with the weights of all layers."""

    name: str
    kind: Kind
    weights: Sequence[torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        rows, depth = self.weights[0].shape
        return rows, depth


def products_of(weights: ModelWeights) -> list[Product]:
    layers = weights.layers
    return [
        Product("qkv", "linear", [layer.qkv for layer in layers]),
        Product("o", "linear", [layer.o for layer in layers]),
        Product("gate_up", "gated", [layer.gate_up for layer in layers]),
        Product("down", "linear", [layer.down for layer in layers]),
        Product("logits", "logits", [weights.output]),
    ]


class Products:
    """The chosen ways. Empty at first: nothing is known to be better than the library."""

    def __init__(
        self, silu_and_mul: Callable[[torch.Tensor], torch.Tensor], *, triton: bool
    ) -> None:
        """`triton`: our own kernels can be built."""
        self._silu_and_mul = silu_and_mul
        self._triton = triton
        self._chosen: dict[tuple[Kind, int, int, int], Way] = {}

    def chosen(self, kind: Kind, rows: int, weight: torch.Tensor) -> Way | None:
        """None where none was chosen for `rows` rows and a weight of this shape."""
        return self._chosen.get((kind, rows, *weight.shape))

    @torch.no_grad()
    def choose(
        self,
        weights: ModelWeights,
        sizes: Sequence[int],
        layers: Callable[[int], Callable[[], object]],
        remembered: RememberedChoices,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """From now on products of `sizes` rows are computed in the fastest way: the remembered one,
        or else the one that a measurement finds. What was chosen, a line a product; `progress` is
        told how many sizes are done.

        `layers`, for a number of rows: what runs some layers of a step, with all but attention's
        work in it. Ways are compared in it, one product after the other: how much of its beginning
        a kernel does while its predecessor runs shows nowhere else.
        """
        products = products_of(weights)
        taken: dict[str, list[str]] = {product.name: [] for product in products}
        for done, rows in enumerate(sizes):
            progress(done)
            names = {
                product.name: remembered.get(f"{product.kind} {rows} x {product.shape}")
                for product in products
            }
            for product in products:
                ways = self.ways(product.kind, rows, product.weights[0])
                if names[product.name] not in ways:
                    names[product.name] = ""
                self._take(product, rows, names[product.name] or list(ways)[-1])
            for product in products:
                if not names[product.name]:
                    found = self.measure(product, rows, layers(rows))
                    names[product.name] = fastest(found)
                    question = f"{product.kind} {rows} x {product.shape}"
                    remembered.put(question, names[product.name])
                self._take(product, rows, names[product.name])
                taken[product.name].append(names[product.name])
        remembered.save()
        return [f"{name}: {_runs(sizes, names)}" for name, names in taken.items()]

    def measure(
        self, product: Product, rows: int, layers: Callable[[], object]
    ) -> dict[str, float]:
        """Microseconds with every way, the library's first: of `layers`, or of the product alone
        where it is not part of them."""
        ways = self.ways(product.kind, rows, product.weights[0])
        if product.kind == "logits":
            weight = product.weights[0]
            out = weight.new_empty((rows, weight.shape[0]), dtype=torch.float32)
            return {name: time_us(way, rows, product.weights, out) for name, way in ways.items()}
        found = {}
        for name in ways:
            self._take(product, rows, name)
            layers()
            found[name] = replay_us(layers, product.weights[0].device)
        return found

    def _take(self, product: Product, rows: int, name: str) -> None:
        ways = self.ways(product.kind, rows, product.weights[0])
        self._chosen[(product.kind, rows, *product.shape)] = ways[name]

    def ways(self, kind: Kind, rows: int, weight: torch.Tensor) -> dict[str, Way]:
        """Those that can compute it: the library's first, the most promising last."""
        ways = {"library": self._whole(kind, _library), "cublaslt": self._whole(kind, _cublaslt)}
        if not self._triton or rows > MOST_ROWS:
            return ways
        out_rows, depth = weight.shape
        for tiles in GATED_TILES if kind == "gated" else LINEAR_TILES:
            if tiles.fit(out_rows // 2 if kind == "gated" else out_rows, depth):
                way = _gated_way(tiles) if kind == "gated" else _linear_way(tiles)
                ways[f"few rows {tiles.short}"] = way
        if rows == 1:
            ways["one row"] = self._whole(kind, single_row_linear)
        return ways

    def _whole(self, kind: Kind, linear: Way) -> Way:
        if kind != "gated":
            return linear
        return lambda x, weight, bias, out: self._silu_and_mul(linear(x, weight, bias, None))


def fastest(found: dict[str, float]) -> str:
    """The library, where nothing is clearly better: then a start chooses as the last did."""
    library = next(iter(found))
    best = min(found, key=lambda name: found[name])
    return best if found[best] < _WORTH * found[library] else library


def _runs(sizes: Sequence[int], names: Sequence[str]) -> str:
    """Neighbouring sizes of one way together."""
    parts = []
    for name, run in groupby(zip(sizes, names, strict=True), key=lambda pair: pair[1]):
        rows = [size for size, _ in run]
        parts.append(f"{rows[0]} to {rows[-1]} {name}" if len(rows) > 1 else f"{rows[0]} {name}")
    return ", ".join(parts)


def _library(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if out is None:
        return functional.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)


def _cublaslt(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    with _blas("cublaslt"):
        return _library(x, weight, bias, out)


def _linear_way(tiles: Tiles) -> Way:
    return lambda x, weight, bias, out: few_rows_linear(x, weight, bias, tiles, out)


def _gated_way(tiles: Tiles) -> Way:
    return lambda x, weight, bias, out: few_rows_gated(x, weight, bias, tiles)


@contextmanager
def _blas(library: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def time_us(
    way: Way,
    rows: int,
    weights: Sequence[torch.Tensor],
    out: torch.Tensor | None = None,
) -> float:
    """Of one product, in a graph of as many as it takes to leave no weight in a cache."""
    count = min(len(weights), -(-_TOUCHED_BYTES // weights[0].nbytes))
    x = torch.randn(rows, weights[0].shape[1], device=weights[0].device).to(weights[0].dtype)
    for weight in weights[:2]:
        way(x, weight, None, out)

    def step() -> None:
        for weight in weights[:count]:
            way(x, weight, None, out)

    return replay_us(step, x.device) / count

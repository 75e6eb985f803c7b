"""Which kernel computes a product: measured, for the numbers of rows that steps have.

No library knows: each picks by rules of its own, and is up to a tenth slower than it could be; at
few rows our own kernel may be faster than all of its algorithms. Which is best differs with rows,
shape and GPU, so they are timed once: for a decode step as part of its layers before it is
captured, for prompts alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch.nn import functional

from engine.models.blas_algorithms import BlasProduct, blas_products
from engine.models.few_rows import MOST_ROWS, Tiles, few_rows_gated, few_rows_linear
from engine.models.remembered_choices import RememberedChoices
from engine.models.single_row import single_row_linear
from engine.models.timing import replay_us, run_us
from engine.models.weights import ModelWeights

Kind = Literal["linear", "gated", "logits", "onto"]
"""`onto`: a prompt's product that is added to the residual stream in float32."""

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""(x, weight, bias, out) → the product, in `out` where the kind has one; `onto`: what `out` held
and the product."""

Recipe = dict[str, str]
"""The way of each product, both by name."""

LINEAR_TILES = (Tiles(64, 256, 3, splits=2), Tiles(64, 128, 5, splits=2), Tiles(64, 128, 5))
GATED_TILES = (Tiles(64, 64, 5), Tiles(64, 128, 3, ahead=0), Tiles(64, 128, 3))
"""The best of many (`bench/gpu_tiles.py`, and whole steps of 8 rows with one of them changed)."""

Algorithms = Callable[[int, torch.Tensor, torch.dtype], Sequence[BlasProduct]]
"""(rows, a weight, the dtype of what comes out) → the library's algorithms."""

ALGORITHM = "algorithm"

_ONTO_RESIDUAL = ("o", "down")
"""Products whose sum with the residual stream comes next. Where it is their kernel's last act, the
norm behind it reads half as much: a chunk of 8,192 tokens took 1.4 to 2.3 % less on an H200."""

_SHORTLISTED = 2
"""Of the library's algorithms, those that are compared in a step."""

_PASSES = 2
"""Over all products of a step."""

LEAST_PROMPT_ROWS = 1024
"""Steps of more rows are a prompt's, of any number."""

PROMPT_ROWS = (2048, 4096, 8192)
"""Their products are measured for so many rows; what is best for most is best for more."""

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
        self,
        silu_and_mul: Callable[[torch.Tensor], torch.Tensor],
        *,
        triton: bool,
        algorithms: Algorithms = blas_products,
    ) -> None:
        """`triton`: our own kernels can be built. `algorithms`: the library's."""
        self._silu_and_mul = silu_and_mul
        self._algorithms = algorithms
        self._triton = triton
        self._chosen: dict[tuple[Kind, int, int, int], Way] = {}

    def chosen(self, kind: Kind, rows: int, weight: torch.Tensor) -> Way | None:
        """None where none was chosen for `rows` rows and a weight of this shape."""
        exact = self._chosen.get((kind, rows, *weight.shape))
        if exact is not None or rows <= LEAST_PROMPT_ROWS:
            return exact
        return self._chosen.get((kind, _prompt_rows(rows), *weight.shape))

    @torch.no_grad()
    def choose_for_prompts(
        self, weights: ModelWeights, most_rows: int, remembered: RememberedChoices
    ) -> list[str]:
        """From now on products of a prompt's chunks, of more than LEAST_PROMPT_ROWS rows and as a
        rule of at most `most_rows`, are computed in the fastest way. What was chosen, a line a
        product."""
        largest = _prompt_rows(most_rows) if most_rows > LEAST_PROMPT_ROWS else 0
        sizes = [rows for rows in PROMPT_ROWS if rows <= largest]
        lines = []
        for product in self._products_of_prompts(weights):
            names = []
            onto = " onto the residual" if product.kind == "onto" else ""
            for rows in sizes:
                question = f"{product.name} of a prompt{onto}, {rows} x {product.shape}"
                name = remembered.get(question)
                ways = self.ways(product.kind, rows, product.weights[0])
                if name not in ways:
                    name = fastest(self.alone_us(ways, rows, product))
                    remembered.put(question, name)
                self._take([product], rows, {product.name: name})
                names.append(name)
            lines.append(f"{product.name}{onto}: {_runs(sizes, names)}")
        remembered.save()
        return lines

    def _products_of_prompts(self, weights: ModelWeights) -> list[Product]:
        products = products_of(weights)[:-1]
        return [
            replace(product, kind="onto") if self._can_add(product) else product
            for product in products
        ]

    def _can_add(self, product: Product) -> bool:
        """Taken wherever it exists: what it saves the norm behind it outweighs what it costs the
        product (measured on an H200: bench/README.md), which is not compared at a start."""
        return product.name in _ONTO_RESIDUAL and all(
            self.ways("onto", rows, product.weights[0]) for rows in PROMPT_ROWS
        )

    @torch.no_grad()
    def choose(
        self,
        weights: ModelWeights,
        sizes: Sequence[int],
        layers: Callable[[int], Callable[[], object]],
        remembered: RememberedChoices,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """From now on products of `sizes` rows, in rising order, are computed in the fastest way:
        the remembered one, or else the one that a measurement finds. What was chosen, a line a
        product; `progress` is told how many sizes are done.

        `layers`, for a number of rows: what runs some layers of a step and its logits.
        """
        products = products_of(weights)
        found: dict[int, Recipe] = {}
        for done, rows in enumerate(sizes):
            progress(done)
            measured = min(measured_for(rows), sizes[-1])
            if measured not in found:
                recipe = self._remembered(products, measured, remembered)
                if recipe is None:
                    recipe = self._find(products, measured, layers(measured))
                    for product in products:
                        remembered.put(_question(product, measured), recipe[product.name])
                found[measured] = recipe
            self._take(products, rows, found[measured])
        remembered.save()
        return [
            f"{name}: {_runs(sizes, [found[min(measured_for(n), sizes[-1])][name] for n in sizes])}"
            for name in (product.name for product in products)
        ]

    def _remembered(
        self, products: Sequence[Product], rows: int, remembered: RememberedChoices
    ) -> Recipe | None:
        """None where something is not known, or is a way that is gone."""
        recipe = {p.name: remembered.get(_question(p, rows)) for p in products}
        known = all(recipe[p.name] in self.ways(p.kind, rows, p.weights[0]) for p in products)
        return recipe if known else None

    def _find(self, products: Sequence[Product], rows: int, layers: Callable[[], object]) -> Recipe:
        """One product after the other, from the best of some beginnings on, until nothing changes.

        Ways cannot be judged by themselves: how much of its beginning a kernel does while its
        predecessor runs depends on both, and one product in the wrong way makes others look bad.
        """
        ways = {product.name: self._shortlist(product, rows) for product in products}
        recipe = library = {name: names[0] for name, names in ways.items()}
        if rows <= MOST_ROWS:
            ours = {name: names[-1] for name, names in ways.items()}
            beginnings = {"library": library, "ours": ours}
            beginnings |= {f"but {name}": ours | {name: library[name]} for name in ways}
            found = self.measure(beginnings, products, rows, layers)
            recipe = beginnings[min(found, key=lambda name: found[name])]
        for _ in range(_PASSES if rows <= MOST_ROWS else 1):
            before = recipe
            for name, names in ways.items():
                candidates = {way: recipe | {name: way} for way in names}
                best = fastest(self.measure(candidates, products, rows, layers))
                recipe = candidates[best]
            if recipe == before:
                break
        if recipe == library:
            return library
        both = self.measure({"library": library, "chosen": recipe}, products, rows, layers)
        return recipe if fastest(both) == "chosen" else library

    def _shortlist(self, product: Product, rows: int) -> list[str]:
        """All ways, but of the library's algorithms only those that are fastest alone."""
        ways = self.ways(product.kind, rows, product.weights[0])
        algorithms = {name: way for name, way in ways.items() if name.startswith(ALGORITHM)}
        if len(algorithms) <= _SHORTLISTED:
            return list(ways)
        alone = self.alone_us(algorithms, rows, product)
        kept = sorted(alone, key=lambda name: alone[name])[:_SHORTLISTED]
        return [name for name in ways if name not in algorithms or name in kept]

    def alone_us(self, ways: Mapping[str, Way], rows: int, product: Product) -> dict[str, float]:
        return alone_us(ways, rows, product)

    def measure(
        self,
        recipes: Mapping[str, Recipe],
        products: Sequence[Product],
        rows: int,
        layers: Callable[[], object],
    ) -> dict[str, float]:
        """Microseconds of `layers` with each of `recipes`."""

        def cooked(recipe: Recipe) -> Callable[[], object]:
            def step() -> None:
                self._take(products, rows, recipe)
                layers()

            return step

        steps = {name: cooked(recipe) for name, recipe in recipes.items()}
        return replay_us(steps, products[0].weights[0].device)

    def _take(self, products: Sequence[Product], rows: int, recipe: Recipe) -> None:
        for product in products:
            kind, weight = product.kind, product.weights[0]
            way = self.ways(kind, rows, weight)[recipe[product.name]]
            self._chosen[(kind, rows, *product.shape)] = way

    def ways(self, kind: Kind, rows: int, weight: torch.Tensor) -> dict[str, Way]:
        """Those that can compute it: the library's first, the most promising last."""
        if kind == "onto":
            return self._ways_onto(rows, weight)
        ways = {"library": self._whole(kind, _library)}
        out_dtype = torch.float32 if kind == "logits" else weight.dtype
        # Of the size that is measured, so that a name means the same to those beside it.
        for index, product in enumerate(self._algorithms(measured_for(rows), weight, out_dtype)):
            ways[f"{ALGORITHM} {index}"] = self._whole(kind, _algorithm_way(product))
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

    def _ways_onto(self, rows: int, weight: torch.Tensor) -> dict[str, Way]:
        """None where our norm cannot be built: the library's reads no residual in float32."""
        found = self._algorithms(rows, weight, torch.float32) if self._triton else ()
        return {f"{ALGORITHM} {index}": _onto_way(product) for index, product in enumerate(found)}

    def _whole(self, kind: Kind, linear: Way) -> Way:
        if kind != "gated":
            return linear
        return lambda x, weight, bias, out: self._silu_and_mul(linear(x, weight, bias, None))


def measured_for(rows: int) -> int:
    """The number of rows whose measurement decides for `rows`: neighbours choose alike, and a start
    is not to take longer than it must."""
    power = 1 << (rows - 1).bit_length()
    between = power // 4 * 3
    return between if rows <= between and between > MOST_ROWS else power


def _prompt_rows(rows: int) -> int:
    return next((size for size in PROMPT_ROWS if rows <= size), PROMPT_ROWS[-1])


def _question(product: Product, rows: int) -> str:
    return f"{product.name} of a step, {rows} x {product.shape}"


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


def _algorithm_way(product: BlasProduct) -> Way:
    def way(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        if bias is None:
            room = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
            if product(x, weight, room):
                return room
        return _library(x, weight, bias, out)

    return way


def _onto_way(product: BlasProduct) -> Way:
    def way(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        if out is None:
            raise ValueError("a product is added to something")
        if bias is None and product(x, weight, out, added=True):
            return out
        return out.add_(_library(x, weight, bias, None))

    return way


def _linear_way(tiles: Tiles) -> Way:
    return lambda x, weight, bias, out: few_rows_linear(x, weight, bias, tiles, out)


def _gated_way(tiles: Tiles) -> Way:
    return lambda x, weight, bias, out: few_rows_gated(x, weight, bias, tiles)


def alone_us(ways: Mapping[str, Way], rows: int, product: Product) -> dict[str, float]:
    """Of one product by each of `ways`, among as many as it takes to leave no weight in a cache."""
    weights = product.weights[: -(-_TOUCHED_BYTES // product.weights[0].nbytes)]
    columns, depth = product.shape
    x = torch.randn(rows, depth, device=weights[0].device).to(weights[0].dtype)
    float32 = product.kind in ("logits", "onto")
    out = x.new_zeros((rows, columns), dtype=torch.float32) if float32 else None

    def all_by(way: Way) -> Callable[[], None]:
        def step() -> None:
            for weight in weights:
                way(x, weight, None, out)

        return step

    steps = {name: all_by(way) for name, way in ways.items()}
    # Long products need no graph, whose memory each of them would take for itself.
    time = replay_us if rows < LEAST_PROMPT_ROWS else run_us
    return {name: us / len(weights) for name, us in time(steps, x.device).items()}

"""Which kernel computes a product: what is chosen by measurement, and what is remembered of it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from engine.model_config import ModelConfig
from engine.models.blas_algorithms import BlasProduct, blas_products
from engine.models.few_rows import MOST_ROWS, Tiles
from engine.models.products import Product, Products, Recipe, Way, fastest, measured_for
from engine.models.remembered_choices import RememberedChoices, keep_choices_in
from engine.models.weights import ModelWeights
from tests.engine.execution.trained import TINY


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    keep_choices_in(str(tmp_path / "kernels"))
    yield tmp_path / "kernels"
    keep_choices_in("")


@pytest.fixture
def weights() -> ModelWeights:
    config = ModelConfig.from_directory(TINY)
    return ModelWeights.allocate(config, device=torch.device("cpu"), dtype=torch.bfloat16)


def three_algorithms(
    rows: int, weight: torch.Tensor, out_dtype: torch.dtype
) -> Sequence[BlasProduct]:
    return [cast("BlasProduct", object())] * 3


class Measured(Products):
    """A step is the faster the more of its products are computed in the way `wins`, and takes
    `penalty` longer where not all of them are the library's."""

    def __init__(self, wins: str, penalty: float = 0.0) -> None:
        super().__init__(lambda gate_up: gate_up, triton=True, algorithms=three_algorithms)
        self.wins = wins
        self.penalty = penalty
        self.measured: list[int] = []
        self.alone: list[tuple[str, int]] = []

    def measure(
        self,
        recipes: Mapping[str, Recipe],
        products: Sequence[Product],
        rows: int,
        layers: Callable[[], object],
    ) -> dict[str, float]:
        self.measured.append(rows)
        return {name: self._step_us(recipe) for name, recipe in recipes.items()}

    def alone_us(self, ways: Mapping[str, Way], rows: int, product: Product) -> dict[str, float]:
        self.alone.append((product.name, rows))
        return {name: 10.0 - (name == self.wins) for name in ways}

    def _step_us(self, recipe: Recipe) -> float:
        ways = list(recipe.values())
        others = any(way != "library" for way in ways)
        return 100.0 - 10.0 * ways.count(self.wins) + self.penalty * others

    def choose_for(self, weights: ModelWeights, sizes: list[int], setting: str = "a") -> list[str]:
        return self.choose(weights, sizes, lambda rows: lambda: None, RememberedChoices(setting))


def test_the_library_stays_where_nothing_is_clearly_better() -> None:
    assert fastest({"library": 100.0, "other": 99.9}) == "library"
    assert fastest({"library": 100.0, "other": 90.0, "third": 80.0}) == "third"


def test_nothing_is_chosen_before_it_is_measured(weights: ModelWeights) -> None:
    products = Measured("algorithm 0")
    assert products.chosen("linear", 8, weights.layers[0].qkv) is None
    products.choose_for(weights, [8])
    assert products.chosen("linear", 8, weights.layers[0].qkv) is not None
    assert products.chosen("linear", 9, weights.layers[0].qkv) is None


def test_the_log_says_what_was_chosen_for_which_rows(weights: ModelWeights) -> None:
    lines = Measured("one row").choose_for(weights, [1, 2, 4])
    assert [line.partition(":")[0] for line in lines] == ["qkv", "o", "gate_up", "down", "logits"]
    assert {line.partition(": ")[2] for line in lines} == {"1 one row, 2 to 4 library"}


def test_what_was_measured_once_is_not_measured_again(
    directory: Path, weights: ModelWeights
) -> None:
    first, second = Measured("algorithm 0"), Measured("library")
    lines = first.choose_for(weights, [1, 8])
    assert set(first.measured) == {1, 8}
    assert second.choose_for(weights, [1, 8]) == lines
    assert second.measured == []
    second.choose_for(weights, [1, 8, 16])
    assert set(second.measured) == {16}


def test_neighbouring_sizes_are_measured_once(weights: ModelWeights) -> None:
    products = Measured("algorithm 0")
    products.choose_for(weights, [8, 24, 32, 40, 64, 80, 96, 112, 120])
    assert set(products.measured) == {8, 32, 64, 96, 120}, "none above the largest"
    assert products.chosen("linear", 40, weights.layers[0].qkv) is not None
    assert [measured_for(rows) for rows in (1, 2, 3, 65, 97, 160, 200)] == [
        *(1, 2, 4, 96, 128, 192, 256)
    ]


def test_products_that_are_fastest_one_by_one_must_be_so_together(weights: ModelWeights) -> None:
    alone = Measured("algorithm 0", penalty=60.0)
    assert {line.partition(": ")[2] for line in alone.choose_for(weights, [8])} == {"8 library"}
    lines = Measured("algorithm 0", penalty=5.0).choose_for(weights, [8])
    assert {line.partition(": ")[2] for line in lines} == {"8 algorithm 0"}


def test_another_gpu_or_library_measures_for_itself(directory: Path, weights: ModelWeights) -> None:
    Measured("algorithm 0").choose_for(weights, [8], "one GPU")
    other = Measured("library")
    other.choose_for(weights, [8], "another")
    assert set(other.measured) == {8}
    again = Measured("library")
    again.choose_for(weights, [8], "one GPU")
    assert again.measured == [], "the second did not overwrite what the first had found"


def test_a_way_that_is_gone_is_measured_anew(directory: Path, weights: ModelWeights) -> None:
    products = Measured("algorithm 0")
    products.choose_for(weights, [8])
    kept = directory / "choices.json"
    kept.write_text(kept.read_text().replace("algorithm 0", "a kernel of an older version"))
    products.measured.clear()
    products.choose_for(weights, [8])
    assert products.measured


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": [1]}'])
def test_a_broken_file_costs_measurements_and_nothing_else(
    directory: Path, weights: ModelWeights, content: str
) -> None:
    directory.mkdir()
    (directory / "choices.json").write_text(content)
    products = Measured("algorithm 0")
    products.choose_for(weights, [8])
    count = len(products.measured)
    assert count
    products.choose_for(weights, [8])
    assert len(products.measured) == count, "the file is whole again"


def test_a_directory_that_cannot_be_written_is_said_and_survived(
    tmp_path: Path, weights: ModelWeights, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    keep_choices_in(str(tmp_path / "file"))
    try:
        with caplog.at_level(logging.WARNING):
            Measured("algorithm 0").choose_for(weights, [8])
    finally:
        keep_choices_in("")
    assert "measured choices are not kept" in caplog.text


def test_one_product_in_the_wrong_way_does_not_hide_what_the_others_gain(
    weights: ModelWeights,
) -> None:
    class Together(Measured):
        """Our kernels are faster together, unless one of them computes `down`."""

        def _step_us(self, recipe: Recipe) -> float:
            ours = [name for name, way in recipe.items() if way == self.wins]
            return 150.0 if "down" in ours else 100.0 + 5 * (0 < len(ours) < 4) - len(ours)

    lines = Together("one row").choose_for(weights, [1])
    chosen = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert chosen.pop("down") == "1 library"
    assert set(chosen.values()) == {"1 one row"}


def test_of_the_librarys_algorithms_only_the_fastest_are_compared_in_a_step(
    weights: ModelWeights,
) -> None:
    products = Measured("algorithm 2")
    lines = products.choose_for(weights, [8])
    assert {line.partition(": ")[2] for line in lines} == {"8 algorithm 2"}
    assert {rows for _, rows in products.alone} == {8}


def test_a_prompts_products_are_chosen_for_any_number_of_rows(
    directory: Path, weights: ModelWeights
) -> None:
    products, qkv = Measured("algorithm 1"), weights.layers[0].qkv
    lines = products.choose_for_prompts(weights, 3000, RememberedChoices("a"))
    names = ("qkv", "o onto the residual", "gate_up", "down onto the residual")
    assert lines == [f"{name}: 2048 to 4096 algorithm 1" for name in names]
    assert products.chosen("linear", 1024, qkv) is None
    few, many = products.chosen("linear", 1025, qkv), products.chosen("linear", 3000, qkv)
    assert few is not None
    assert many is not None
    assert few is not many
    assert products.chosen("linear", 5000, qkv) is None
    again = Measured("library")
    assert again.choose_for_prompts(weights, 3000, RememberedChoices("a")) == lines
    assert again.alone == []
    none = Measured("algorithm 1")
    assert "algorithm" not in str(none.choose_for_prompts(weights, 1024, RememberedChoices("b")))
    assert none.alone == []


def test_an_algorithm_that_does_not_fit_leaves_the_product_to_the_library() -> None:
    def unfit(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
        return False

    products = Products(
        lambda gate_up: gate_up,
        triton=False,
        algorithms=lambda *_: [cast("BlasProduct", unfit)],
    )
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    way = products.ways("linear", 3, weight)["algorithm 0"]
    torch.testing.assert_close(way(x, weight, None, None), x @ weight.t())
    bias = torch.randn(5)
    torch.testing.assert_close(way(x, weight, bias, None), x @ weight.t() + bias)


def test_a_product_is_added_to_the_residual_by_whatever_can() -> None:
    def fit(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, added: bool) -> bool:
        if x.shape[0] > 3:
            return False
        out.add_(x @ weight.t()) if added else out.copy_(x @ weight.t())
        return True

    products = Products(
        lambda gate_up: gate_up,
        triton=True,
        algorithms=lambda *_: [cast("BlasProduct", fit)],
    )
    weight, bias = torch.randn(5, 8), torch.randn(5)
    (way,) = products.ways("onto", 2048, weight).values()
    for rows, extra in ((3, None), (4, None), (3, bias)):
        x, residual = torch.randn(rows, 8), torch.randn(rows, 5)
        expected = residual + torch.nn.functional.linear(x, weight, extra)
        assert way(x, weight, extra, residual) is residual
        torch.testing.assert_close(residual, expected)


def test_a_norm_of_the_librarys_is_given_no_float32_residual(weights: ModelWeights) -> None:
    products = Products(lambda gate_up: gate_up, triton=False, algorithms=three_algorithms)
    assert products.ways("onto", 2048, weights.layers[0].o) == {}
    assert [product.kind for product in products._products_of_prompts(weights)] == [
        *("linear", "linear", "gated", "linear")
    ]


def test_no_algorithms_are_asked_for_where_there_is_no_gpu() -> None:
    assert blas_products(8, torch.empty(4, 4), torch.float32) == ()


def test_our_kernels_are_offered_only_where_they_fit() -> None:
    products = Products(lambda gate_up: gate_up, triton=True)

    def names(rows: int, shape: tuple[int, int]) -> set[str]:
        weight = torch.empty(shape, device="meta")
        return set(products.ways("linear", rows, weight))

    assert any(name.startswith("few rows") for name in names(MOST_ROWS, (4096, 4096)))
    assert names(MOST_ROWS + 1, (4096, 4096)) == {"library"}
    assert names(8, (1000, 4096)) == {"library"}
    assert names(8, (4096, 320)) == {"library"}
    without = Products(lambda gate_up: gate_up, triton=False)
    assert len(without.ways("linear", 8, torch.empty(4096, 4096, device="meta"))) == 1


def test_a_split_tile_needs_its_part_of_the_depth() -> None:
    tiles = Tiles(64, 128, 5, splits=4)
    assert tiles.fit(4096, 4096)
    assert not tiles.fit(4096, 1024), "less than what is asked for ahead"
    assert not tiles.fit(4096, 4096 + 128), "parts of unequal size"
    assert not tiles.fit(128_256, 4096), "no room for so many partial sums"

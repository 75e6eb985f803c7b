"""Which kernel computes a product: what is chosen by measurement, and what is remembered of it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.model_config import ModelConfig
from engine.models.few_rows import MOST_ROWS, Tiles
from engine.models.products import Product, Products, fastest
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


class Measured(Products):
    """`wins` is the fastest way wherever it can be had."""

    def __init__(self, wins: str) -> None:
        super().__init__(lambda gate_up: gate_up, triton=True)
        self.wins = wins
        self.measured: list[tuple[str, int]] = []

    def measure(
        self, product: Product, rows: int, layers: Callable[[], object]
    ) -> dict[str, float]:
        self.measured.append((product.name, rows))
        names = self.ways(product.kind, rows, product.weights[0])
        return {name: 5.0 if name == self.wins else 10.0 for name in names}

    def choose_for(self, weights: ModelWeights, sizes: list[int], setting: str = "a") -> list[str]:
        return self.choose(weights, sizes, lambda rows: lambda: None, RememberedChoices(setting))


def test_the_library_stays_where_nothing_is_clearly_better() -> None:
    assert fastest({"library": 100.0, "other": 99.9}) == "library"
    assert fastest({"library": 100.0, "other": 90.0, "third": 80.0}) == "third"


def test_nothing_is_chosen_before_it_is_measured(weights: ModelWeights) -> None:
    products = Measured("cublaslt")
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
    first, second = Measured("cublaslt"), Measured("library")
    lines = first.choose_for(weights, [1, 8])
    assert len(first.measured) == 10
    assert second.choose_for(weights, [1, 8]) == lines
    assert second.measured == []
    second.choose_for(weights, [1, 8, 16])
    assert {rows for _, rows in second.measured} == {16}


def test_another_gpu_or_library_measures_for_itself(directory: Path, weights: ModelWeights) -> None:
    Measured("cublaslt").choose_for(weights, [8], "one GPU")
    other = Measured("library")
    other.choose_for(weights, [8], "another")
    assert len(other.measured) == 5
    again = Measured("library")
    again.choose_for(weights, [8], "one GPU")
    assert again.measured == [], "the second did not overwrite what the first had found"


def test_a_way_that_is_gone_is_measured_anew(directory: Path, weights: ModelWeights) -> None:
    products = Measured("cublaslt")
    products.choose_for(weights, [8])
    kept = directory / "choices.json"
    kept.write_text(kept.read_text().replace("cublaslt", "a kernel of an older version"))
    products.measured.clear()
    products.choose_for(weights, [8])
    assert len(products.measured) == 5


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"a": [1]}'])
def test_a_broken_file_costs_measurements_and_nothing_else(
    directory: Path, weights: ModelWeights, content: str
) -> None:
    directory.mkdir()
    (directory / "choices.json").write_text(content)
    products = Measured("cublaslt")
    products.choose_for(weights, [8])
    assert len(products.measured) == 5
    products.choose_for(weights, [8])
    assert len(products.measured) == 5, "the file is whole again"


def test_a_directory_that_cannot_be_written_is_said_and_survived(
    tmp_path: Path, weights: ModelWeights, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    keep_choices_in(str(tmp_path / "file"))
    try:
        with caplog.at_level(logging.WARNING):
            Measured("cublaslt").choose_for(weights, [8])
    finally:
        keep_choices_in("")
    assert "measured choices are not kept" in caplog.text


def test_our_kernels_are_offered_only_where_they_fit() -> None:
    products = Products(lambda gate_up: gate_up, triton=True)

    def names(rows: int, shape: tuple[int, int]) -> set[str]:
        weight = torch.empty(shape, device="meta")
        return set(products.ways("linear", rows, weight))

    assert any(name.startswith("few rows") for name in names(MOST_ROWS, (4096, 4096)))
    assert names(MOST_ROWS + 1, (4096, 4096)) == {"library", "cublaslt"}
    assert names(8, (1000, 4096)) == {"library", "cublaslt"}
    assert names(8, (4096, 320)) == {"library", "cublaslt"}
    without = Products(lambda gate_up: gate_up, triton=False)
    assert len(without.ways("linear", 8, torch.empty(4096, 4096, device="meta"))) == 2


def test_a_split_tile_needs_its_part_of_the_depth() -> None:
    tiles = Tiles(64, 128, 5, splits=4)
    assert tiles.fit(4096, 4096)
    assert not tiles.fit(4096, 1024), "less than what is asked for ahead"
    assert not tiles.fit(4096, 4096 + 128), "parts of unequal size"
    assert not tiles.fit(128_256, 4096), "no room for so many partial sums"

"""Whatever is switched on, a real model in float32 draws what each request draws alone.

Near ties: a logit computed in a batch of another shape differs in its last bits (measured: by 1e-5
at most, of logits up to 7), and that could turn over a choice between two tokens that are as close.
So a workload is only used if every choice of the plain run is ahead by `MARGIN`, which is asserted;
then any difference is a fault, and none is excused.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.model_config import ModelConfig
from tests.checkpoints import write_checkpoint
from tests.engine.scheduler.differential import (
    Ask,
    Features,
    handed_over,
    pairwise,
    plainly,
    random_asks,
    unified,
)

MARGIN = 1e-3
PAGE_SIZE = 16
WORKLOADS = (13, 14, 34)

FACTORS: dict[str, Any] = {
    "role": ["unified", "handed over"],
    "policy": ["fcfs", "lpm", "dfs-weight", "lof", "random"],
    "priorities": [False, True],
    "mixed": [False, True],
    "overlap": [False, True],
    "radix": [True, False],
    "host_tier": [False, True],
    "split": [False, True],
    "chunk": [None, 16, 48],
    "pages": [100, 12],
}
ROWS = pairwise(FACTORS, random.Random(0))


def runner_of(directory: Path) -> ModelRunner:
    return load_model_runner(
        ModelConfig.from_directory(directory),
        model_path=str(directory),
        device=torch.device("cpu"),
        dtype=torch.float32,
        page_size=PAGE_SIZE,
        max_total_tokens=128 * PAGE_SIZE,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelRunner, ModelRunner]:
    """The same weights over two pools."""
    directory = write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")
    return runner_of(directory), runner_of(directory)


@pytest.fixture(scope="module")
def plain(models: tuple[ModelRunner, ModelRunner]) -> Callable[[int], tuple[list[Ask], Any]]:
    """Workload → its requests and their tokens."""
    done: dict[int, tuple[list[Ask], list[list[int]]]] = {}

    def of(seed: int) -> tuple[list[Ask], list[list[int]]]:
        if seed not in done:
            asks = random_asks(seed, 10)
            alone = [plainly(models[0], ask) for ask in asks]
            least = min(run.margin for run in alone)
            assert least > MARGIN, f"workload {seed} has a near tie ({least}): take another seed"
            done[seed] = (asks, [run.tokens for run in alone])
        return done[seed]

    return of


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v) for v in row.values()))
def test_tokens_are_those_of_a_plain_run(
    row: dict[str, Any],
    models: tuple[ModelRunner, ModelRunner],
    plain: Callable[[int], tuple[list[Ask], list[list[int]]]],
) -> None:
    features = Features(**{name: value for name, value in row.items() if name != "role"})
    for seed in WORKLOADS:
        asks, expected = plain(seed)
        if row["role"] == "unified":
            got = unified(models[0], features, asks, seed)
        else:
            got = handed_over(*models, features, asks, seed)
        assert got.tokens == expected, f"workload {seed}"


def test_each_two_features_meet_in_each_way() -> None:
    for a in FACTORS:
        for b in FACTORS:
            if a < b:
                met = {(row[a], row[b]) for row in ROWS}
                assert len(met) == len(FACTORS[a]) * len(FACTORS[b])


def test_a_small_pool_sends_requests_back(
    models: tuple[ModelRunner, ModelRunner],
    plain: Callable[[int], tuple[list[Ask], list[list[int]]]],
) -> None:
    """Or the runs above would not show that a retraction changes nothing."""
    row = next(r for r in ROWS if r["role"] == "unified")
    features = Features(
        **{k: v for k, v in row.items() if k != "role"} | {"pages": 12, "host_tier": False}
    )
    retractions = 0
    for seed in WORKLOADS:
        asks, expected = plain(seed)
        got = unified(models[0], features, asks, seed)
        assert got.tokens == expected
        retractions += got.retractions
    assert retractions > 0

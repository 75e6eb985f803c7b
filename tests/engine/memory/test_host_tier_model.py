"""A real model whose KV moves between a pool that is far too small and host memory."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.hi_radix_cache import HiRadixCache
from engine.memory.host_pool import Rate
from engine.memory.page_copier import make_page_copier, runs
from engine.model_config import ModelConfig
from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.layout import PageLayout
from tests.checkpoints import random_prompt, write_checkpoint
from tests.engine.execution.scheduled import Ask, ScheduledModel, one_by_one

PAGE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


def load(checkpoint: Path, pages: int, device: str = "cpu") -> ModelRunner:
    return load_model_runner(
        ModelConfig.from_directory(checkpoint),
        model_path=str(checkpoint),
        device=torch.device(device),
        dtype=torch.float32,
        page_size=PAGE,
        max_total_tokens=pages * PAGE,
        attention="torch",
    )


def layout_of(model: ModelRunner) -> PageLayout:
    config = model.model_config
    return PageLayout(
        layers=config.num_layers,
        page_size=PAGE,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        itemsize=model.kv_pool.dtype.itemsize,
    )


def host_memory(model: ModelRunner, pages: int, retract: int, **more: Any) -> dict[str, Any]:
    layout = layout_of(model)

    def digest(pool: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        return digest_pages(pool, numbers, [PAGE] * len(numbers), layout)

    def copier(count: int) -> Any:
        return make_page_copier(model.kv_pool, count, digest) if count else None

    return {"host_copier": copier(pages), "retract_copier": copier(retract), **more}


def conversations(seed: int) -> list[Ask]:
    """Turns of five conversations, each longer than the one before it, in any order."""
    rng = random.Random(seed)
    histories = [random_prompt(60 + 10 * n, seed=seed * 10 + n) for n in range(5)]
    asks = []
    for turn in range(14):
        n = rng.randrange(5)
        histories[n] = histories[n] + random_prompt(rng.randint(1, 20), seed=turn)
        sampled = {"temperature": 0.9, "seed": turn} if turn % 2 else {}
        # Fewer than they may be: the estimate of memory hopes so, too, and then retracts.
        asks.append(Ask(list(histories[n]), {"max_new_tokens": 40, **sampled}))
    return asks


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Tokens of `conversations(3)`, each turn computed alone in a pool that holds everything."""
    return one_by_one(load(checkpoint, 64), conversations(3))


@pytest.mark.parametrize(
    ("write_policy", "overlap"), [("write_through", False), ("write_back", True)]
)
def test_tokens_are_those_of_a_pool_that_holds_everything(
    checkpoint: Path,
    expected: list[list[int]],
    write_policy: str,
    overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Speeds of a busy machine must not decide whether retracted KV is loaded or computed.
    monkeypatch.setattr(Rate, "observe", lambda *_: None)
    model = load(checkpoint, 26)
    engine = ScheduledModel(
        model,
        host=host_memory(model, 60, 60, host_write_policy=write_policy),
        schedule_conservativeness=0.02,
        chunked_prefill_size=48,
        enable_overlap=overlap,
    )
    assert engine.run(conversations(3)) == expected
    tree = engine.memory.tree_cache
    assert isinstance(tree, HiRadixCache)
    assert tree.host.counters.loaded > 0
    assert tree.host.counters.spoilt == 0
    assert engine.scheduler.num_retractions > 0
    assert engine.memory.retracted is not None
    assert engine.memory.retracted.host.counters.loaded > 0


def test_a_copys_digests_are_the_pages_seals(checkpoint: Path) -> None:
    model = load(checkpoint, 8)
    layout = layout_of(model)
    pool = model.kv_pool.as_bytes()
    pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8))
    copier = host_memory(model, 8, 0)["host_copier"]
    before = pool.clone()
    out = copier.to_host([3, 4, 1], [0, 1, 7])
    assert out.done()
    assert out.digests() == seals_of(digest_pages(pool, [3, 4, 1], [PAGE] * 3, layout))
    pool.zero_()
    back = copier.to_device([7, 0], [5, 6])
    assert back.digests() == [out.digests()[2], out.digests()[0]]
    assert torch.equal(pool[5], before[1])
    assert torch.equal(pool[6], before[3])
    assert copier.page_bytes == layout.page_bytes


def test_neighbours_are_copied_together() -> None:
    assert list(runs([3, 4, 5, 9, 10], [0, 1, 2, 3, 7])) == [(3, 0, 3), (9, 3, 1), (10, 7, 1)]
    assert list(runs([], [])) == []


def test_memory_that_the_host_does_not_have_is_refused_by_name(checkpoint: Path) -> None:
    model = load(checkpoint, 1)
    with pytest.raises(ConfigError, match="host-cache-tokens"):
        host_memory(model, 1 << 50, 0)

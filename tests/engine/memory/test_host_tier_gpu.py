"""On a CUDA device: copies on a stream of their own, behind what was launched."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.hi_radix_cache import HiRadixCache
from engine.memory.host_pool import Rate
from engine.memory.kv_pool import PageMajorKVPool
from engine.memory.page_copier import PageCopy, StreamPageCopier, make_page_copier
from engine.model_config import ModelConfig
from kvtransfer.digest import digest_pages, queue_digests, seals_of
from kvtransfer.layout import PageLayout
from tests.checkpoints import random_prompt, write_checkpoint
from tests.engine.execution.scheduled import Ask, ScheduledModel, one_by_one
from tests.gpu_waits import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGES = 32
LAYOUT = PageLayout(layers=32, page_size=64, kv_heads=8, head_dim=128, itemsize=2)
SLEEP_CYCLES = 400_000_000
"""A few tenths of a second of the device."""


def digest_for(layout: PageLayout) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    return lambda pool, pages: queue_digests(pool, pages, [layout.page_size] * len(pages), layout)


@pytest.fixture(scope="module")
def pool() -> PageMajorKVPool:
    """8 MiB a page, as an 8B Llama has them."""
    return PageMajorKVPool(
        num_pages=PAGES,
        page_size=LAYOUT.page_size,
        num_layers=LAYOUT.layers,
        num_kv_heads=LAYOUT.kv_heads,
        head_dim=LAYOUT.head_dim,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )


@pytest.fixture
def copier(pool: PageMajorKVPool) -> StreamPageCopier:
    made = make_page_copier(pool, PAGES, digest_for(LAYOUT))
    assert isinstance(made, StreamPageCopier)
    # The digest's weights go to the device once, and so do small blocks of pinned memory.
    for pages in ([0], [0, 1]):
        made.to_host(pages, pages).wait()
        made.to_device(pages, pages).wait()
    return made


def fill(pool: PageMajorKVPool, seed: int) -> torch.Tensor:
    """Random pages; a copy of them."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    pages = pool.as_bytes()
    pages.random_(0, 256, generator=generator)
    return pages.clone()


def ended(copy: PageCopy) -> None:
    deadline = time.monotonic() + 10
    while not copy.done():
        assert time.monotonic() < deadline


def test_pages_leave_and_return_as_they_were(
    pool: PageMajorKVPool, copier: StreamPageCopier
) -> None:
    before = fill(pool, 1)
    device, host = [3, 4, 5, 20, 9], [7, 8, 9, 0, 31]
    out = copier.to_host(device, host)
    ended(out)
    seals = seals_of(digest_pages(before.cpu(), device, [64] * 5, LAYOUT))
    assert out.digests() == seals
    pool.data.zero_()
    back = copier.to_device(host, [11, 12, 0, 1, 2])
    ended(back)
    assert back.digests() == seals
    for source, target in zip(device, [11, 12, 0, 1, 2], strict=True):
        assert torch.equal(pool.as_bytes()[target], before[source])
    assert 0 < back.duration_s() < 5


def test_a_copy_waits_for_what_was_launched_and_nobody_for_the_copy(
    pool: PageMajorKVPool, copier: StreamPageCopier
) -> None:
    fill(pool, 2)
    torch.cuda.synchronize()
    with no_waiting():
        torch.cuda._sleep(SLEEP_CYCLES)
        pool.as_bytes()[3].fill_(7)  # launched before the copy, runs long after it was asked for
        out = copier.to_host([3, 4], [0, 1])
        assert not out.done()
    ended(out)
    back = copier.to_device([0], [30])
    ended(back)
    assert bool((pool.as_bytes()[30] == 7).all())


def test_pages_are_filled_after_the_last_step_that_may_touch_them(
    pool: PageMajorKVPool, copier: StreamPageCopier
) -> None:
    before = fill(pool, 3)
    ended(copier.to_host([5], [2]))
    with no_waiting():
        torch.cuda._sleep(SLEEP_CYCLES)
        pool.as_bytes()[6].fill_(1)  # of a request that has ended by now
        back = copier.to_device([2], [6])
        assert not back.done()
    ended(back)
    torch.cuda.synchronize()
    assert torch.equal(pool.as_bytes()[6], before[5])


def test_a_spoilt_page_has_another_digest(pool: PageMajorKVPool, copier: StreamPageCopier) -> None:
    fill(pool, 4)
    out = copier.to_host([1], [1])
    ended(out)
    copier._host[1, 12345] ^= 1
    back = copier.to_device([1], [2])
    ended(back)
    assert back.digests() != out.digests()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


def load(checkpoint: Path, pages: int) -> ModelRunner:
    return load_model_runner(
        ModelConfig.from_directory(checkpoint),
        model_path=str(checkpoint),
        device=torch.device("cuda"),
        # In float32 a token does not hang on the batch's composition.
        dtype=torch.float32,
        page_size=16,
        max_total_tokens=pages * 16,
        attention="torch",
    )


def host_memory(model: ModelRunner, **more: Any) -> dict[str, Any]:
    config = model.model_config
    layout = PageLayout(
        layers=config.num_layers,
        page_size=16,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        itemsize=4,
    )
    digest = digest_for(layout)
    return {
        "host_copier": make_page_copier(model.kv_pool, 80, digest),
        "retract_copier": make_page_copier(model.kv_pool, 60, digest),
        **more,
    }


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("write_policy", ["write_through", "write_back"])
def test_tokens_are_those_of_a_pool_that_holds_everything(
    checkpoint: Path, overlap: bool, write_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Speeds must not decide whether retracted KV is loaded or computed.
    monkeypatch.setattr(Rate, "observe", lambda *_: None)
    prompts = [random_prompt(60 + 10 * (n % 5), seed=n % 5) for n in range(15)]
    asks = [Ask(prompt, {"max_new_tokens": 40}) for prompt in prompts]
    model = load(checkpoint, 26)
    engine = ScheduledModel(
        model,
        host=host_memory(model, host_write_policy=write_policy),
        schedule_conservativeness=0.02,
        chunked_prefill_size=48,
        enable_overlap=overlap,
    )
    assert engine.run(asks) == one_by_one(load(checkpoint, 64), asks)
    tree = engine.memory.tree_cache
    assert isinstance(tree, HiRadixCache)
    assert tree.host.counters.loaded > 0
    assert tree.host.counters.spoilt == 0
    assert engine.memory.retracted is not None
    assert engine.memory.retracted.host.counters.spoilt == 0

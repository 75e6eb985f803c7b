"""Host memory as a worker's settings ask for it."""

from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from engine.memory.kv_pool import PageMajorKVPool
from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.layout import PageLayout
from worker.config import WorkerConfig
from worker.host_memory import free_host_memory_bytes, host_cache_copier, retract_copier

LAYOUT = PageLayout(layers=2, page_size=16, kv_heads=2, head_dim=8, itemsize=4)
CONFIG = WorkerConfig(model="model", host_cache_tokens=50, retract_host_share=0.34)


@pytest.fixture
def pool() -> PageMajorKVPool:
    return PageMajorKVPool(
        num_pages=3,
        page_size=16,
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_tokens_become_whole_pages(pool: PageMajorKVPool) -> None:
    cache, retract = host_cache_copier(CONFIG, pool, LAYOUT), retract_copier(CONFIG, pool, LAYOUT)
    assert cache is not None
    assert retract is not None
    assert (cache.num_pages, retract.num_pages) == (4, 1)
    assert cache.page_bytes == LAYOUT.page_bytes


def test_by_default_prefixes_have_none_and_retracted_requests_a_small_share(
    pool: PageMajorKVPool,
) -> None:
    config = WorkerConfig(model="model")
    assert host_cache_copier(config, pool, LAYOUT) is None
    assert retract_copier(config, pool, LAYOUT) is None, "a sixteenth of three pages"
    pool.num_pages = 64
    retract = retract_copier(config, pool, LAYOUT)
    assert retract is not None
    assert retract.num_pages == 4
    assert retract_copier(replace(config, retract_host_share=0.0), pool, LAYOUT) is None
    parted = replace(config, tensor_parallel_size=2)
    assert retract_copier(parted, pool, LAYOUT) is None, "its pages are of one rank"


def test_a_host_without_room_gives_what_it_has(
    pool: PageMajorKVPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool.num_pages = 64
    monkeypatch.setattr(
        "worker.host_memory.free_host_memory_bytes", lambda: 8 * 3 * LAYOUT.page_bytes
    )
    retract = retract_copier(WorkerConfig(model="model"), pool, LAYOUT)
    assert retract is not None
    assert retract.num_pages == 3
    assert "48 retracted tokens, not for 64" in caplog.text
    monkeypatch.setattr("worker.host_memory.free_host_memory_bytes", lambda: 0)
    assert retract_copier(WorkerConfig(model="model"), pool, LAYOUT) is None


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 1 << 20 < free_host_memory_bytes() < 1 << 50


def test_a_page_leaves_under_its_seal(pool: PageMajorKVPool) -> None:
    pool.data.normal_()
    copier = host_cache_copier(CONFIG, pool, LAYOUT)
    assert copier is not None
    copy = copier.to_host([2, 0], [1, 3])
    assert copy.digests() == seals_of(digest_pages(pool.as_bytes(), [2, 0], [16, 16], LAYOUT))


def test_a_negative_size_is_refused_by_name(pool: PageMajorKVPool) -> None:
    config = replace(CONFIG, host_cache_tokens=-1, retract_host_share=-1.0)
    with pytest.raises(ConfigError, match="host_cache_tokens"):
        host_cache_copier(config, pool, LAYOUT)
    with pytest.raises(ConfigError, match="retract_host_share"):
        retract_copier(config, pool, LAYOUT)


def test_a_tier_under_no_cache_is_refused(pool: PageMajorKVPool) -> None:
    with pytest.raises(ConfigError, match="enable_radix_cache"):
        host_cache_copier(replace(CONFIG, enable_radix_cache=False), pool, LAYOUT)

"""The page-major pool: one page is one block, and views agree about where things lie."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from engine.memory.kv_pool import PageMajorKVPool


@pytest.fixture
def pool() -> PageMajorKVPool:
    return PageMajorKVPool(
        num_pages=5,
        page_size=4,
        num_layers=3,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def test_layout_is_page_major_with_a_padding_page(pool: PageMajorKVPool) -> None:
    assert pool.data.shape == (6, 3, 2, 4, 2, 8)
    assert pool.data.is_contiguous()
    assert pool.num_pages == 5
    assert pool.page_bytes == 3 * 2 * 4 * 2 * 8 * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_a_cpus_pool_takes_memory_only_where_it_is_written() -> None:
    before = resident_bytes()
    pool = PageMajorKVPool(
        num_pages=2000, page_size=64, num_layers=8, num_kv_heads=2, head_dim=64,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    assert pool.data.nbytes > 1e9
    assert not pool.data[1999].any()
    pool.data[7].fill_(1.0)
    assert resident_bytes() - before < 1e8


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_bytes_are_the_same_memory_without_the_padding_page(pool: PageMajorKVPool) -> None:
    view = pool.as_bytes()
    assert (view.shape, view.dtype) == ((5, pool.page_bytes), torch.uint8)
    assert view.data_ptr() == pool.data.data_ptr()
    pool.data[3].fill_(1.0)
    assert view[3].any()
    assert not view[[0, 1, 2, 4]].any()


def test_written_slots_are_read_back(pool: PageMajorKVPool) -> None:
    slots = torch.tensor([3 * 4 + 2, 0, 4 * 4 + 3])
    k, v = torch.randn(2, 3, 2, 8).bfloat16()
    pool.write(1, slots, k, v)
    for index, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, 4)
        assert torch.equal(pool.data[page, 1, 0, offset], k[index])
        assert torch.equal(pool.layer(1)[page, 1, offset], v[index])
    assert pool.data.count_nonzero() == k.count_nonzero() + v.count_nonzero()


def test_the_padding_page_can_be_written(pool: PageMajorKVPool) -> None:
    ones = torch.ones(1, 2, 8).bfloat16()
    pool.write(2, torch.tensor([5 * 4 + 3]), ones, ones)
    assert not pool.as_bytes().any()
    assert bool((pool.data[5, 2, :, 3] == 1).all())


def test_blocks_of_pages_are_gathered_in_order(pool: PageMajorKVPool) -> None:
    pool.data.copy_(torch.randn(pool.data.shape))
    pages = torch.tensor([[4, 0], [2, 2]])
    k, v = pool.read_blocks(2, pool.block_indices(pages))
    assert k.shape == v.shape == (2, 8, 2, 8)
    assert torch.equal(k[0], torch.cat((pool.data[4, 2, 0], pool.data[0, 2, 0])))
    assert torch.equal(v[1, 4:], pool.data[2, 2, 1])

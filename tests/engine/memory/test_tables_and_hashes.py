"""The request-to-token table, and the hash of a token chain."""

import hashlib

import pytest
import torch

from engine.errors import OutOfMemoryError
from engine.memory.chain_hash import chain_hash, page_chain_hashes
from engine.memory.pools import make_memory_pools
from engine.memory.req_to_token import ReqToTokenPool, RowAllocationError, page_slots


def test_rows_are_all_or_nothing_and_come_back_once() -> None:
    pool = ReqToTokenPool(2, 8)
    rows = pool.alloc(2)
    assert rows is not None
    assert sorted(rows) == [0, 1]
    assert pool.alloc(1) is None
    pool.free(rows)
    assert pool.available_size() == 2
    with pytest.raises(RowAllocationError):
        pool.free([0])
    with pytest.raises(RowAllocationError):
        pool.free([2])


def test_the_table_is_int32_and_takes_ranges_and_single_slots() -> None:
    pool = ReqToTokenPool(2, 6)
    pool.write(1, 2, torch.tensor([7, 8, 9]))
    pool.write_each(torch.tensor([0, 1]), torch.tensor([0, 5]), torch.tensor([3, 4]))
    assert pool.req_to_token.dtype == torch.int32
    assert pool.req_to_token.tolist() == [[3, 0, 0, 0, 0, 0], [0, 0, 7, 8, 9, 4]]


def test_slots_follow_the_pages_in_order() -> None:
    assert page_slots([5, 2], 4, 1, 7).tolist() == [21, 22, 23, 8, 9, 10]
    assert page_slots([5, 2], 4, 4, 6).tolist() == [8, 9]
    with pytest.raises(RowAllocationError):
        page_slots([5], 4, 0, 5)


def test_a_chain_hash_is_blake2b_over_the_hash_before_and_little_endian_ids() -> None:
    first = chain_hash(b"", [1, 2])
    assert (
        first
        == hashlib.blake2b(
            (1).to_bytes(8, "little") + (2).to_bytes(8, "little"), digest_size=16
        ).digest()
    )
    second = hashlib.blake2b(first + (2**40).to_bytes(8, "little"), digest_size=16).digest()
    assert page_chain_hashes([1, 2, 2**40], 2) == [first, second]


def test_a_chain_hash_depends_on_everything_before() -> None:
    assert page_chain_hashes([1, 2, 3, 4], 2)[1] != page_chain_hashes([9, 2, 3, 4], 2)[1]
    assert chain_hash(b"tenant", [1]) != chain_hash(b"", [1])


def test_running_out_of_pages_names_the_figures() -> None:
    memory = make_memory_pools(num_pages=4, page_size=2, num_rows=1, max_context_len=8)
    memory.tree_cache.insert([1, 2], memory.alloc_pages(1))
    memory.alloc_pages(1)
    with pytest.raises(OutOfMemoryError, match=r"4 pages asked, 3 free, 0 evictable"):
        memory.alloc_pages(4)
    assert memory.available_tokens() == 6


def test_pages_of_the_tree_are_evicted_before_memory_is_out() -> None:
    memory = make_memory_pools(num_pages=4, page_size=2, num_rows=1, max_context_len=8)
    memory.tree_cache.insert([1, 2, 3, 4, 5, 6], memory.alloc_pages(3))
    assert memory.available_tokens() == 8
    assert len(memory.alloc_pages(3)) == 3
    # Only the two that were missing went, from the end of the cached prefix.
    assert len(memory.tree_cache.match_prefix([1, 2, 3, 4, 5, 6]).pages) == 1

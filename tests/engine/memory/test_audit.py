"""The recount finds pages and rows that leaked or have two owners."""

import pytest

from engine.memory.audit import MemoryInvariantError, audit_pages, count_pages, count_rows
from engine.memory.pools import MemoryPools, make_memory_pools


@pytest.fixture
def memory() -> MemoryPools:
    return make_memory_pools(num_pages=8, page_size=2, num_rows=3, max_context_len=8)


def test_each_page_is_in_the_first_state_that_claims_it(memory: MemoryPools) -> None:
    pages = memory.alloc_pages(5)
    memory.tree_cache.insert([1, 2, 3, 4, 5, 6], pages[:3])
    counts = count_pages(
        allocator=memory.allocator,
        tree_cache=memory.tree_cache,
        request_pages=[[pages[0], pages[3]], [pages[0]]],
        held=[[pages[1], pages[3], pages[4]]],
    )
    assert (counts.in_use, counts.held, counts.cached, counts.free) == (2, 2, 1, 3)
    assert counts.balanced
    assert counts.total == 8


def test_a_page_without_an_owner_is_named(memory: MemoryPools) -> None:
    pages = memory.alloc_pages(2)
    audit = audit_pages(
        allocator=memory.allocator, tree_cache=memory.tree_cache, request_pages=[pages[:1]]
    )
    assert audit.unowned == (pages[1],)
    assert not audit.counts.balanced
    with pytest.raises(MemoryInvariantError, match=f"without an owner: \\({pages[1]},\\)"):
        audit.raise_if_broken()


def test_a_free_page_that_somebody_owns_is_named(memory: MemoryPools) -> None:
    pages = memory.alloc_pages(1)
    memory.free_pages(pages)
    with pytest.raises(MemoryInvariantError, match=f"contested: \\({pages[0]},\\)"):
        count_pages(allocator=memory.allocator, tree_cache=memory.tree_cache, other_in_use=[pages])


def test_two_requests_may_share_only_what_the_tree_has(memory: MemoryPools) -> None:
    pages = memory.alloc_pages(1)
    with pytest.raises(MemoryInvariantError, match="contested"):
        count_pages(
            allocator=memory.allocator,
            tree_cache=memory.tree_cache,
            request_pages=[pages, pages],
        )


def test_rows_are_counted_the_same_way(memory: MemoryPools) -> None:
    rows = memory.req_to_token.alloc(2)
    assert rows is not None
    counts = count_rows(req_to_token=memory.req_to_token, in_use=rows)
    assert (counts.free, counts.in_use, counts.total) == (1, 2, 3)
    for wrong in (rows[:1], [*rows, rows[0]], [0, 1, 2]):
        with pytest.raises(MemoryInvariantError):
            count_rows(req_to_token=memory.req_to_token, in_use=wrong)

"""Pages: all or nothing, in runs where it can be, never handed out twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.page_allocator import PageAllocationError, PageAllocator


def is_run(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))


def test_a_fresh_pool_hands_out_one_run() -> None:
    allocator = PageAllocator(10, 4)
    pages = allocator.alloc(6)
    assert pages is not None
    assert is_run(pages)
    assert allocator.available_size() == 16
    assert allocator.free_pages == 4


def test_more_than_is_free_takes_nothing() -> None:
    allocator = PageAllocator(4, 1)
    assert allocator.alloc(5) is None
    assert allocator.free_pages == 4


def test_freed_neighbours_become_one_run_again() -> None:
    allocator = PageAllocator(8, 1)
    taken = [allocator.alloc(1) for _ in range(8)]
    assert all(taken)
    for page in (2, 5, 3, 4):
        allocator.free([page])
    assert allocator.alloc(4) == [2, 3, 4, 5]


def test_the_closest_run_is_taken_so_that_long_ones_stay_whole() -> None:
    allocator = PageAllocator(16, 1)
    allocator.alloc(16)
    allocator.free([0, 1, 2, 3, 4, 5, 6, 7])
    allocator.free([10])
    allocator.free([12, 13, 14])
    assert allocator.alloc(1) == [10]
    assert allocator.alloc(3) == [12, 13, 14]
    assert allocator.alloc(8) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_request_without_a_run_of_its_size_takes_the_longest_first() -> None:
    allocator = PageAllocator(16, 1)
    allocator.alloc(16)
    allocator.free([0, 1, 2, 3])
    allocator.free([8])
    assert allocator.alloc(5) == [0, 1, 2, 3, 8]


def test_the_run_behind_the_last_page_is_preferred() -> None:
    allocator = PageAllocator(16, 1)
    first = allocator.alloc(3)
    other = allocator.alloc(2)
    assert (first, other) == ([0, 1, 2], [3, 4])
    allocator.free([0, 1])
    assert allocator.alloc(2) == [0, 1]
    assert allocator.alloc(3, after=4) == [5, 6, 7]
    assert allocator.alloc(1, after=2) == [8]  # 3 is taken


@pytest.mark.parametrize("pages", [[1], [0, 0], [-1], [4]])
def test_freeing_what_is_not_owned_is_refused_and_changes_nothing(pages: list[int]) -> None:
    allocator = PageAllocator(4, 1)
    allocator.alloc(1)
    with pytest.raises(PageAllocationError):
        allocator.free(pages)
    assert allocator.free_pages == 3
    assert allocator.free_list() == [1, 2, 3]


def test_generations_count_allocations() -> None:
    allocator = PageAllocator(1, 1)
    for expected in (1, 2, 3):
        allocator.alloc(1)
        assert allocator.generation(0) == expected
        allocator.free([0])


def test_a_step_given_up_restores_what_was_free_but_no_generation() -> None:
    allocator = PageAllocator(6, 1)
    allocator.alloc(2)
    state = allocator.backup_state()
    assert allocator.alloc(3) == [2, 3, 4]
    allocator.restore_state(state)
    assert allocator.free_list() == [2, 3, 4, 5]
    assert allocator.alloc(4) == [2, 3, 4, 5]
    assert allocator.generation(2) == 2


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60), st.integers(1, 40))
def test_no_page_is_lost_or_owned_twice(actions: list[tuple[bool, int]], size: int) -> None:
    allocator = PageAllocator(size, 2)
    owned: list[list[int]] = []
    for take, number in actions:
        if take:
            free_before = allocator.free_pages
            pages = allocator.alloc(number)
            assert (pages is None) == (number > free_before)
            if pages is not None:
                owned.append(pages)
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        in_use = [page for pages in owned for page in pages]
        assert len(set(in_use)) == len(in_use)
        assert sorted(in_use + allocator.free_list()) == list(range(size))
        assert allocator.free_pages == size - len(in_use)

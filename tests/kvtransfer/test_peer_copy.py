"""Which copies become one."""

from kvtransfer.peer_copy import joined

SIZE = 100


def test_neighbours_at_both_ends_are_one_copy() -> None:
    copies = [(3, 1000), (4, 1100), (5, 1200), (9, 1300), (10, 1500), (11, 1600)]
    assert joined(copies, SIZE, whole=True) == [(3, 1000, 3), (9, 1300, 1), (10, 1500, 2)]


def test_parts_of_pages_stay_apart() -> None:
    copies = [(3, 1000), (4, 1100)]
    assert joined(copies, SIZE, whole=False) == [(3, 1000, 1), (4, 1100, 1)]


def test_an_order_that_runs_backwards_joins_nothing() -> None:
    copies = [(4, 1100), (3, 1000)]
    assert joined(copies, SIZE, whole=True) == [(4, 1100, 1), (3, 1000, 1)]

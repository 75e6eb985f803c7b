"""The rule by which a ticket is granted, number by number, and what the scheduler adds to it."""

from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.scheduler.admission import (
    GrowingRequest,
    Promise,
    can_admit,
    default_max_new_tokens,
    fits_empty_worker,
)
from tests.engine.scheduler.stub import Engine, make_req


def ask(**changes: Any) -> bool:
    numbers: dict[str, Any] = {
        "prompt_len": 8,
        "prefix_len": 0,
        "max_new_tokens": 4,
        "free_and_evictable": 100,
        "page_size": 4,
        "decode_reserve_tokens": 10,
        "running": [],
        "in_transfer": [],
        "prebuilt": [],
        "returning": [],
        "free_rows": 1,
        "free_landing_slots": 1,
    }
    return can_admit(**{**numbers, **changes})


def test_an_idle_worker_admits_what_fits_to_its_end() -> None:
    assert ask(free_and_evictable=12)
    assert not ask(free_and_evictable=12, max_new_tokens=5)
    assert ask(free_and_evictable=8, prefix_len=4)


def test_a_row_and_a_landing_slot_must_be_free() -> None:
    assert not ask(free_rows=0)
    assert not ask(free_landing_slots=0)


def test_everybody_here_may_still_grow_by_the_reserve() -> None:
    running = [GrowingRequest(20, 40, 50), GrowingRequest(20, 47, 50)]  # 10 and 3 to grow
    assert ask(running=running, free_and_evictable=13 + 8 + 4)
    assert not ask(running=running, free_and_evictable=13 + 8 + 3)
    assert ask(running=running[:1], in_transfer=running[1:], free_and_evictable=25)
    assert not ask(running=running[:1], in_transfer=running[1:], free_and_evictable=24)


def test_one_request_must_be_able_to_end_if_all_others_are_retracted() -> None:
    running = [GrowingRequest(20, 0, 100)]
    # need_single = 100 + 20 - 20 = 100, more than the reserve of 10.
    assert ask(running=running, free_and_evictable=100 + 12)
    assert not ask(running=running, free_and_evictable=100 + 11)


def test_the_newcomer_must_be_able_to_end_if_all_others_are_retracted() -> None:
    running = [GrowingRequest(4, 2, 3)]
    # 8 + 60 - 6 = 62, more than its pages and reserve; 1 to grow for the one that runs.
    assert ask(running=running, max_new_tokens=60, free_and_evictable=62 + 1)
    assert not ask(running=running, max_new_tokens=60, free_and_evictable=62)


def test_arrived_and_returning_requests_come_on_top() -> None:
    running = [GrowingRequest(40, 0, 10)]
    base = 10 + 8 + 4
    assert ask(running=running, free_and_evictable=base)
    prebuilt = [GrowingRequest(8, 1, 6)]
    assert not ask(running=running, prebuilt=prebuilt, free_and_evictable=base + 4)
    assert ask(running=running, prebuilt=prebuilt, free_and_evictable=base + 5)
    returning = [GrowingRequest(9, 2, 7)]  # 12 tokens in pages, 5 to grow
    assert not ask(running=running, returning=returning, free_and_evictable=base + 16)
    assert ask(running=running, returning=returning, free_and_evictable=base + 17)


def test_the_door_asks_an_empty_worker_without_clipping() -> None:
    fits = {"prompt_len": 9, "total_tokens": 16, "page_size": 4}
    assert fits_empty_worker(max_new_tokens=7, **fits)
    assert not fits_empty_worker(max_new_tokens=8, **fits)
    assert default_max_new_tokens(prompt_len=9, total_tokens=16, context_length=12) == 3
    assert default_max_new_tokens(prompt_len=9, total_tokens=10, context_length=12) == 1
    with pytest.raises(InvalidRequestError):
        default_max_new_tokens(prompt_len=12, total_tokens=16, context_length=12)


def test_the_scheduler_counts_tickets_that_are_out() -> None:
    engine = Engine(pages=16, page_size=4, rows=3)
    admission = engine.scheduler.admission
    assert admission.can_admit(32, 0, 32)
    bound = Promise(prompt_len=16, max_new_tokens=8)
    unbound = Promise(prompt_len=16, max_new_tokens=8, pages_allocated=False)
    # 64 free; the ticket may grow by 8; unbound, its 16 tokens are spoken for, too.
    assert admission.can_admit(40, 0, 8, already_promised=[bound])
    assert not admission.can_admit(40, 0, 8, already_promised=[unbound])
    assert admission.can_admit(32, 0, 8, already_promised=[unbound])
    assert not admission.can_admit(4, 0, 4, already_promised=[bound] * 3)


def test_the_scheduler_counts_who_runs_and_who_waits() -> None:
    engine = Engine(pages=16, page_size=4, rows=8)
    engine.add(make_req("a", [1] * 16, max_new_tokens=8))
    assert engine.scheduler.admission.can_admit(32, 0, 8)
    assert not engine.scheduler.admission.can_admit(33, 0, 8)
    engine.step()
    assert engine.scheduler.admission.can_admit(32, 0, 8)
    engine.drain()
    assert engine.scheduler.admission.can_admit(56, 0, 8)

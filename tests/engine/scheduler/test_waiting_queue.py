"""The waiting queue beside a list that is sorted anew each time, and the heap of deadlines."""

import gc
import random
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.scheduler.deadlines import Deadlines
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.waiting_queue import Key, WaitingQueue
from tests.engine.scheduler.stub import make_req


def by_priority(req: Req) -> Key:
    return (req.priority, req.arrival_order)


def req_of(number: int, priority: int = 0) -> Req:
    req = make_req(f"r{number}", [1] * (number % 5 + 1), priority=priority)
    req.arrival_order = number
    return req


@given(st.lists(st.tuples(st.sampled_from(["come", "go", "back", "take"]), st.integers(0, 9))))
def test_it_is_a_sorted_list_whoever_comes_and_goes(moves: list[tuple[str, int]]) -> None:
    queue = WaitingQueue(by_priority, displaces=by_priority)
    plain: list[Req] = []
    gone: list[Req] = []
    for number, (move, choice) in enumerate(moves):
        if move == "come":
            plain.append(req_of(number, choice % 3))
            queue.append(plain[-1])
        elif move == "go" and plain:
            gone.append(plain.pop(choice % len(plain)))
            queue.remove(gone[-1])
        elif move == "back" and gone:
            plain.append(gone.pop(choice % len(gone)))
            queue.append(plain[-1])
        elif move == "take":  # a prefill's pass: the first few leave while it looks
            order = sorted(plain, key=by_priority)
            for expected, req in zip(order[:choice], queue.in_order(), strict=False):
                assert req is expected
                queue.remove(req)
                plain.remove(req)
                gone.append(req)
        assert list(queue.in_order()) == sorted(plain, key=by_priority)
        assert list(queue) == plain
        assert len(queue) == len(plain)
        assert queue.num_tokens == sum(req.seqlen for req in plain)
        assert queue.first() is min(plain, key=by_priority, default=None)
        assert queue.least_important() is max(plain, key=by_priority, default=None)
        assert all(req in queue for req in plain)
        assert not any(req in queue for req in gone)


def test_nobody_waits_twice_and_nobody_leaves_twice() -> None:
    queue = WaitingQueue(by_priority)
    req = req_of(1)
    queue.append(req)
    with pytest.raises(EngineError, match="waits already"):
        queue.append(req)
    queue.remove(req)
    with pytest.raises(EngineError, match="does not wait"):
        queue.remove(req)


def test_who_comes_during_a_look_is_refused_loudly_and_not_passed_over_quietly() -> None:
    queue = WaitingQueue(by_priority)
    queue.extend([req_of(1), req_of(2)])
    look = queue.in_order()
    next(look)
    queue.append(req_of(0))
    with pytest.raises(EngineError):
        next(look)


def test_who_was_retracted_gives_way_to_nobody() -> None:
    queue = WaitingQueue(by_priority, displaces=by_priority)
    started, fresh = req_of(1, priority=9), req_of(2, priority=5)
    started.retraction_count = 1
    queue.extend([started, fresh])
    assert queue.least_important() is fresh
    queue.remove(fresh)
    assert queue.least_important() is None


def test_those_gone_are_not_kept_alive_and_the_heaps_stay_small() -> None:
    queue = WaitingQueue(by_priority, displaces=by_priority)
    last = req_of(10**6)
    queue.append(last)
    seen = []
    for number in range(2000):  # each leaves from the middle, so no heap ever meets it at its top
        req = req_of(number, priority=-1 if number % 2 else 1)
        queue.append(req)
        seen.append(weakref.ref(req))
        queue.remove(req)
    del req
    gc.collect()
    assert not any(ref() for ref in seen)
    assert len(queue._heap) < 200
    assert len(queue._least) < 200


class Counted(float):
    """A key that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return super().__lt__(other)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)

    __hash__ = float.__hash__


def test_the_price_of_a_pass_does_not_grow_with_those_who_wait() -> None:
    def cost(waiting: int) -> int:
        queue = WaitingQueue(lambda req: (Counted(req.priority),))
        rng = random.Random(0)
        for number in range(waiting):
            queue.append(req_of(number, priority=rng.randrange(10**6)))
        Counted.comparisons = 0
        for _, req in zip(range(8), queue.in_order(), strict=False):
            queue.remove(req)
        for number in range(8):
            queue.append(req_of(-number, priority=rng.randrange(10**6)))
        queue.first()
        return Counted.comparisons

    # Some 30 comparisons for each that comes or goes, a few more in a deeper heap: not 1,000 times.
    assert cost(20_000) < 4 * cost(20) + 400


def test_deadlines_pass_in_order_and_the_ended_are_forgotten() -> None:
    deadlines = Deadlines()
    reqs = [req_of(number) for number in range(5)]
    for req, at in zip(reqs, (3.0, 1.0, 2.0, None, 9.0), strict=True):
        deadlines.watch(req, at)
    reqs[2].finish_reason = FinishReason.ABORT
    assert deadlines.take_expired(0.5) == []
    assert deadlines.take_expired(3.0) == [reqs[1], reqs[0]]
    assert deadlines.take_expired(3.0) == []
    del reqs[4], req
    gc.collect()
    assert deadlines.take_expired(10.0) == []


def test_far_deadlines_of_requests_long_gone_take_no_memory() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.watch(req_of(number), 1e9)
    assert len(deadlines._heap) < 2_000

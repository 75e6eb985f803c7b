"""Nobody computes for a client that has gone, and a full queue lets the important in."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DeadlineExceededError, QueueFullError
from engine.scheduler import scheduler as scheduler_module
from tests.engine.scheduler.handover import FakePrefillRole
from tests.engine.scheduler.stub import Engine, make_req, undisturbed


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scheduler_module, "time", clock)
    return clock


def test_a_request_that_is_late_is_dropped_before_it_costs_a_forward(clock: Clock) -> None:
    engine = Engine(max_running_requests=1)
    engine.add(
        make_req("runs", [1] * 4, max_new_tokens=6),
        make_req("late", [2] * 4, deadline=1005.0),
        make_req("in time", [3] * 4, deadline=1500.0),
    )
    engine.step()
    clock.now = 1006.0
    engine.step()
    error = engine.errors["late"]
    assert isinstance(error, DeadlineExceededError)
    assert (error.code, engine.scheduler.waiting_room.num_expired) == ("DEADLINE_EXCEEDED", 1)
    assert "1.000 s ago" in str(error)
    assert engine.released == ["late"]
    engine.drain()
    assert sorted(engine.outputs) == ["in time", "runs"]


def test_a_deadline_that_has_passed_on_arrival_costs_nothing(clock: Clock) -> None:
    engine = Engine()
    engine.add(make_req("late", [2] * 4, deadline=999.0))
    assert not engine.step().ran
    assert list(engine.errors) == ["late"]
    assert not engine.scheduler.has_work()


def test_one_that_runs_goes_on_and_is_dropped_if_it_has_to_wait_again(clock: Clock) -> None:
    engine = Engine(max_running_requests=1, priorities=True)
    low = make_req("low", [1] * 4, max_new_tokens=9, priority=50, deadline=1001.0)
    engine.add(low)
    engine.step()
    clock.now = 1002.0
    engine.step()
    assert len(engine.tokens("low")) == 2
    engine.add(make_req("high", [2] * 4, max_new_tokens=3))
    engine.step()
    assert engine.scheduler.num_preemptions == 1
    engine.step()
    assert isinstance(engine.errors["low"], DeadlineExceededError)
    engine.drain()
    assert engine.tokens("low") == undisturbed(low)[:2]


def test_a_late_one_that_is_aborted_is_ended_once(clock: Clock) -> None:
    engine = Engine(max_running_requests=1)
    engine.add(make_req("runs", [1], max_new_tokens=9), make_req("late", [2], deadline=1001.0))
    engine.step()
    engine.scheduler.abort_request(make_req("late", [2]).rid)
    clock.now = 1002.0
    engine.drain()
    assert (engine.aborted, engine.errors) == (["late"], {})


def test_on_a_prefill_worker_the_role_is_told(clock: Clock) -> None:
    told = []

    class Role(FakePrefillRole):
        def on_request_aborted(self, req: object) -> None:
            told.append(req)

    engine = Engine(role=Role())
    late = make_req("late", [2] * 4, deadline=999.0)
    engine.add(late)
    engine.step()
    assert told == [late]


@given(seed=st.integers(0, 2**32), overlap=st.booleans(), priorities=st.booleans())
@settings(max_examples=25)
def test_at_random_each_has_its_tokens_or_was_late(
    seed: int, overlap: bool, priorities: bool
) -> None:
    rng, clock = random.Random(seed), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "time", clock)
        engine = Engine(
            pages=24, rows=3, overlap=overlap, priorities=priorities, conservativeness=0.02,
            priority_preemption_threshold=0,
        )  # fmt: skip
        reqs = [
            make_req(
                f"r{n}",
                [rng.randrange(40) for _ in range(rng.choice([1, 9, 30]))],
                max_new_tokens=rng.choice([1, 8, 25]),
                priority=rng.choice([0, 1]),
                deadline=rng.choice([None, clock.now + rng.randint(0, 40)]),
            )
            for n in range(rng.randint(1, 12))
        ]
        waiting = list(reqs)
        while waiting or engine.scheduler.has_work():
            if waiting and rng.random() < 0.5:
                engine.add(waiting.pop())
            clock.now += rng.choice([0, 1, 1, 5])
            late = {
                req
                for req in engine.scheduler.waiting_queue
                if req.deadline is not None and req.deadline <= clock.now
            }
            engine.step()
            assert {req.rid for req in late} <= set(engine.errors)
    for req in reqs:
        if req.rid in engine.errors:
            assert isinstance(engine.errors[req.rid], DeadlineExceededError)
            assert engine.tokens(req.rid) == undisturbed(req)[: len(engine.tokens(req.rid))]
        else:
            assert engine.tokens(req.rid) == undisturbed(req)
    assert engine.scheduler.page_counts().in_use == 0


# ---- a full queue


def test_a_more_important_newcomer_displaces_the_least_important_newest() -> None:
    engine = Engine(priorities=True, max_queued_requests=3)
    engine.add(
        make_req("a", [1], priority=5),
        make_req("b", [1], priority=7),
        make_req("c", [1], priority=7),
    )
    engine.add(make_req("d", [1], priority=6))
    engine.add(make_req("e", [1], priority=0))
    engine.step()
    assert sorted(engine.errors) == ["b", "c"]
    assert all(isinstance(error, QueueFullError) for error in engine.errors.values())
    assert engine.errors["b"].code == "RESOURCE_EXHAUSTED"  # type: ignore[attr-defined]
    assert engine.scheduler.waiting_room.num_displaced == 2
    engine.drain()
    assert sorted(engine.outputs) == ["a", "d", "e"]


def test_an_equally_important_newcomer_is_refused_and_nothing_of_it_stays() -> None:
    engine = Engine(priorities=True, max_queued_requests=1)
    engine.add(make_req("a", [1], priority=5))
    for priority in (5, 6):
        with pytest.raises(QueueFullError):
            engine.add(make_req("b", [1], priority=priority))
    engine.drain()
    assert engine.released == ["a"]


def test_without_priorities_the_bound_holds_for_everybody() -> None:
    engine = Engine(max_queued_requests=1)
    engine.add(make_req("a", [1], priority=5))
    with pytest.raises(QueueFullError):
        engine.add(make_req("b", [1], priority=0))
    engine.drain()


def test_one_that_has_tokens_already_is_never_displaced() -> None:
    engine = Engine(priorities=True, max_queued_requests=1, max_running_requests=1)
    low = make_req("low", [1] * 4, max_new_tokens=9, priority=50)
    engine.add(low)
    engine.step()
    engine.add(make_req("high", [2] * 4, max_new_tokens=9))
    engine.step()
    assert list(engine.scheduler.waiting_queue) == [low]
    with pytest.raises(QueueFullError):
        engine.add(make_req("highest", [3], priority=-50))
    engine.drain()
    assert engine.tokens("low") == undisturbed(low)


def test_a_deadline_is_seconds_of_the_monotonic_clock() -> None:
    engine = Engine()
    engine.add(make_req("late", [1], deadline=time.monotonic() - 0.001))
    engine.add(make_req("in time", [1], deadline=time.monotonic() + 60))
    engine.drain()
    assert list(engine.errors) == ["late"]
    assert len(engine.tokens("in time")) == 4

"""Who gets decode memory first, who gives way, and who has waited long enough."""

from decode_service.reserve_queue import Reservation, ReserveQueue
from engine.sampling_params import SamplingParams
from engine.scheduler.req import Req
from engine.types import RequestId


def reservation(
    rid: str, *, priority: int = 0, arrived: float = 0.0, limit: float = 100.0,
    deadline: float | None = None,
) -> Reservation:  # fmt: skip
    req = Req(
        RequestId(rid), [1, 2], SamplingParams(max_new_tokens=2), priority=priority,
        t_arrival=arrived, deadline=deadline,
    )  # fmt: skip
    return Reservation(req.rid, req, "writer", limit)


def queue_of(*reservations: Reservation, by_priority: bool = True) -> ReserveQueue:
    queue = ReserveQueue(by_priority=by_priority)
    for entry in reservations:
        queue.append(entry)
    return queue


def rids(queue: ReserveQueue) -> list[str]:
    return [entry.rid for entry in queue.in_order()]


def test_tickets_go_by_arrival_or_by_priority_then_arrival() -> None:
    entries = [
        reservation("a", priority=5, arrived=1.0),
        reservation("b", priority=0, arrived=3.0),
        reservation("c", priority=0, arrived=2.0),
    ]
    assert rids(queue_of(*entries)) == ["c", "b", "a"]
    assert rids(queue_of(*entries, by_priority=False)) == ["a", "c", "b"]


def test_one_leaves_wherever_it_stands_and_only_once() -> None:
    queue = queue_of(*(reservation(rid) for rid in "abc"))
    left = queue.remove(RequestId("b"))
    assert left is not None
    assert left.rid == "b"
    assert queue.remove(RequestId("b")) is None
    assert (rids(queue), len(queue)) == (["a", "c"], 2)
    assert [entry.rid for entry in queue.take_all()] == ["a", "c"]
    assert len(queue) == 0


def test_those_who_are_served_may_leave_while_the_queue_is_walked() -> None:
    queue = queue_of(*(reservation(rid, arrived=float(n)) for n, rid in enumerate("abcd")))
    for entry in queue.in_order():
        if entry.rid in "abc":
            queue.remove(entry.rid)
    assert rids(queue) == ["d"]


def test_only_a_less_important_one_gives_way_and_only_by_priority() -> None:
    entries = [reservation("a", priority=3), reservation("b", priority=7, arrived=1.0)]
    newcomer = reservation("c", priority=5).req
    queue = queue_of(*entries)
    gives_way = queue.less_important_than(newcomer)
    assert gives_way is not None
    assert gives_way.rid == "b"
    assert queue.less_important_than(reservation("d", priority=7).req) is None
    assert queue_of(*entries, by_priority=False).less_important_than(newcomer) is None
    assert queue_of().less_important_than(newcomer) is None


def test_the_late_leave_behind_whomever_they_stand_and_for_either_reason() -> None:
    queue = queue_of(
        reservation("head", priority=0),
        reservation("waited", priority=9, limit=10.0),
        reservation("expired", priority=9, limit=50.0, deadline=5.0),
        reservation("both", priority=9, limit=6.0, deadline=70.0),
    )
    assert queue.take_late(4.0) == []
    assert [entry.rid for entry in queue.take_late(10.0)] == ["expired", "both", "waited"]
    assert queue.take_late(10.0) == []
    assert rids(queue) == ["head"]
    queue.remove(RequestId("head"))
    assert queue.take_late(1000.0) == []

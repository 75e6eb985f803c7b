"""Requests that wait for decode memory: in order, bounded, and each for so long and no longer."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.scheduler.deadlines import Deadlines
from engine.scheduler.req import Req
from engine.scheduler.waiting_queue import Key, WaitingQueue
from engine.types import RequestId


@dataclass(slots=True)
class Reservation:
    """A request that waits for memory."""

    rid: RequestId
    req: Req
    writer: str
    deadline: float
    """When it is refused for want of memory. time.monotonic() seconds."""
    loading_since: float | None = None
    """When the rest of its prefix was first seen on its way from host memory; the same clock."""


class ReserveQueue:
    """By arrival, or by (priority, arrival): tickets go to the more important first."""

    def __init__(self, *, by_priority: bool) -> None:
        self._queue = WaitingQueue(
            _by_priority if by_priority else _by_arrival,
            displaces=_by_priority if by_priority else None,
        )
        self._reservations: dict[RequestId, Reservation] = {}
        self._deadlines = Deadlines()

    def __len__(self) -> int:
        return len(self._reservations)

    def append(self, reservation: Reservation) -> None:
        req = reservation.req
        self._reservations[reservation.rid] = reservation
        self._queue.append(req)
        limit = reservation.deadline
        self._deadlines.watch(req, limit if req.deadline is None else min(limit, req.deadline))

    def remove(self, rid: RequestId) -> Reservation | None:
        """None: no such request waits."""
        reservation = self._reservations.pop(rid, None)
        if reservation is not None:
            self._queue.remove(reservation.req)
        return reservation

    def in_order(self) -> Iterator[Reservation]:
        """The next to be served first. They may leave meanwhile; none may come."""
        for req in self._queue.in_order():
            yield self._reservations[req.rid]

    def less_important_than(self, req: Req) -> Reservation | None:
        """Who gives way to a newcomer where the queue is full; None: nobody."""
        least = self._queue.least_important()
        if least is None or least.priority <= req.priority:
            return None
        return self._reservations[least.rid]

    def take_late(self, now: float) -> list[Reservation]:
        """Those that have waited as long as they may leave the queue."""
        late = [self._reservations.get(req.rid) for req in self._deadlines.take_expired(now)]
        waiting = [reservation for reservation in late if reservation is not None]
        for reservation in waiting:
            self.remove(reservation.rid)
        return waiting

    def take_all(self) -> list[Reservation]:
        everyone = list(self.in_order())
        for reservation in everyone:
            self.remove(reservation.rid)
        return everyone


def _by_arrival(req: Req) -> Key:
    return (req.t_arrival,)


def _by_priority(req: Req) -> Key:
    return (req.priority, req.t_arrival)

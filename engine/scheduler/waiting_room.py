"""Who may wait, for how long, and who gives way: the bounds around the waiting queue."""

from engine.errors import DeadlineExceededError, QueueFullError
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.deadlines import Deadlines
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.lora_slots import LoraSlots
from engine.scheduler.req import Req, RequestPhase
from engine.scheduler.waiting_queue import WaitingQueue


class WaitingRoom:
    """Lets requests into the queue and back into it, and ends those that waited too long."""

    def __init__(
        self,
        config: SchedulerConfig,
        queue: WaitingQueue,
        lifecycle: RequestLifecycle,
        lora_slots: LoraSlots,
    ) -> None:
        self._config = config
        self._queue = queue
        self._lifecycle = lifecycle
        self._lora_slots = lora_slots
        self._deadlines = Deadlines()
        self.num_expired = 0
        """Requests dropped since their deadline had passed."""
        self.num_displaced = 0
        """Requests that gave their place in a full queue to a more important one."""

    def make_room_for(self, req: Req, num_waiting: int) -> None:
        """Called before a newcomer is queued; `num_waiting` counts all that wait, here and
        elsewhere. With priorities on, a full queue lets a strictly more important newcomer in and
        the least important, newest one go. Raises `QueueFullError`.
        """
        if num_waiting < self._config.max_queued_requests:
            return
        least = self._queue.least_important()
        if least is None or least.priority <= req.priority:
            raise QueueFullError(
                f"request {req.rid}: {num_waiting} requests wait already, the bound "
                "(--max-queued-requests); try again later"
            )
        self._queue.remove(least)
        self.num_displaced += 1
        error = QueueFullError(
            f"request {least.rid} (priority {least.priority}): {num_waiting} requests wait, the "
            "bound (--max-queued-requests), and a more important one came; try again later"
        )
        self._lifecycle.fail(least, error)

    def watch(self, req: Req) -> None:
        """From now on `expired` tells when the request's deadline has passed."""
        self._deadlines.watch(req, req.deadline)

    def put_back(self, reqs: list[Req]) -> None:
        """Requests that ran and gave way: without row and pages, their tokens kept."""
        for req in reqs:
            self._lora_slots.release(req)
            self.watch(req)
            self._queue.append(req)

    def expired(self, now: float) -> list[Req]:
        """Those whose deadline has passed while they wait. `now`: `time.monotonic()` seconds."""
        late = self._deadlines.take_expired(now)
        # One that came back is watched twice.
        return [req for req in dict.fromkeys(late) if req.phase is RequestPhase.WAITING]

    def expire(self, req: Req, now: float) -> None:
        """Ends a request, after it has left whatever list it was in."""
        self.num_expired += 1
        late_s = now - (req.deadline if req.deadline is not None else now)
        error = DeadlineExceededError(
            f"request {req.rid}: its deadline passed {late_s:.3f} s ago while it waited "
            f"({now - req.t_arrival:.3f} s since it came)"
        )
        self._lifecycle.fail(req, error)

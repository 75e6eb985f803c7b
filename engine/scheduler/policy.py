"""In which order waiting requests are considered (scheduling.md section 6)."""

from typing import Literal

from engine.scheduler.req import Req

SchedulePolicyName = Literal["fcfs"]


class SchedulePolicy:
    """First come, first served; with priorities, the more important first."""

    def __init__(
        self, policy: SchedulePolicyName = "fcfs", *, enable_priority_scheduling: bool = False
    ) -> None:
        self.policy = policy
        self.enable_priority_scheduling = enable_priority_scheduling

    def calc_priority(self, waiting_queue: list[Req]) -> None:
        """Sorts in place. A retracted request keeps its arrival, so it comes back to the front."""
        if self.enable_priority_scheduling:
            waiting_queue.sort(key=lambda r: (r.priority, r.t_arrival, r.arrival_order))
        else:
            waiting_queue.sort(key=lambda r: (r.t_arrival, r.arrival_order))

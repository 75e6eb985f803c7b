"""Room for an important request that waits for a ticket on a decode worker.

A ticket is granted before any prefill runs, so its request never stands in the scheduler's queue,
where it would send less important ones back (`PrefillAdder.preempt_to_schedule`). The role names it
instead, and the same rule serves: as few victims as it takes, none if all of them would not do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.scheduler.preemption import choose_victims
from engine.scheduler.req import Req

if TYPE_CHECKING:
    from engine.scheduler.scheduler import Scheduler


class TicketRoom:
    """Asked once a pass, between two steps that are both handled."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def wanted_by(self) -> Req | None:
        """The request for whose ticket somebody who runs could give way."""
        scheduler = self._scheduler
        if not scheduler.config.enable_priority_scheduling:
            return None
        req = scheduler.role.waits_for_ticket()
        if req is None or not self._less_important(req):
            return None
        return req

    def make(self, req: Req) -> list[Req]:
        """Takes the victims out of the running batch and returns them, to be queued again; none
        where the ticket needs nobody's room, or would not fit all the same."""
        scheduler, batch = self._scheduler, self._scheduler.running_batch
        prefix_len = len(scheduler.lock_prefix(req)) * scheduler.page_size

        def fits(victims: list[Req], freed_tokens: int) -> bool:
            return scheduler.admission.can_admit(
                req.seqlen,
                prefix_len,
                req.remaining_new_tokens,
                priority=req.priority,
                without=victims,
                freed_tokens=freed_tokens,
            )

        victims: list[Req] = []
        if not fits([], 0):
            victims = choose_victims(
                self._less_important(req), page_size=scheduler.page_size, enough=fits
            )
        for victim in victims:
            batch.release_req(victim, returns=True)
            victim.reset_for_retract()
        scheduler.unlock_prefix(req)
        if victims:
            gone = set(victims)
            batch.filter_batch(
                keep_indices=[i for i, other in enumerate(batch.reqs) if other not in gone]
            )
        return victims

    def _less_important(self, req: Req) -> list[Req]:
        above = req.priority + self._scheduler.config.priority_preemption_threshold
        return [other for other in self._scheduler.running_batch.reqs if other.priority > above]

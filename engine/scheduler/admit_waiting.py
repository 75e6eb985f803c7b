"""The walk over the waiting queue that fills one prefill (scheduling.md section 2, step 4)."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.scheduler.lora_slots import LoraSlots
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import Req


@dataclass(slots=True, kw_only=True)
class WaitingAdmission:
    """One pass over the queue; made anew for each."""

    adder: PrefillAdder
    places: int
    """Requests that may still join: the running limit and the rows."""
    lora_slots: LoraSlots
    promised_loras: Collection[str]
    """Adapters of requests that will join by transfer."""
    preemption_threshold: int | None
    """None: nobody gives way."""
    out_of_places: bool = False

    def run(self, order: Iterable[Req]) -> None:
        """Stops at the first request that does not fit; passes over those whose adapter has no slot
        and those whose prefix another one is computing."""
        adder = self.adder
        for req in order:
            if not self.lora_slots.has_room_for(req.lora_id, self.promised_loras):
                continue
            if self.places <= 0 and not self._preempt(req, places_needed=1 - self.places):
                self.out_of_places = True
                return
            result = adder.add_req(req)
            refused = result is AddReqResult.NO_TOKEN and not adder.admitted_last(req)
            if refused and self._preempt(req):
                result = adder.add_req(req)
            if adder.admitted_last(req):
                self.places -= 1
                self.lora_slots.acquire(req)
            if result is not AddReqResult.CONTINUE:
                return
            if adder.shared is not None and adder.shared.looked_far_enough:
                return

    def _preempt(self, req: Req, *, places_needed: int = 0) -> bool:
        if self.preemption_threshold is None:
            return False
        before = len(self.adder.preempt_list)
        if not self.adder.preempt_to_schedule(
            req, self.preemption_threshold, slots_needed=places_needed
        ):
            return False
        self.places += len(self.adder.preempt_list) - before
        return True

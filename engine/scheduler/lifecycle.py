"""From arrival to the last page given back: who is live, and the one way to end.

Every path that ends a request (finished, aborted, failed, handed over) passes through here, so
pages and rows are returned once, and never under a reader: neither a transfer's nor a launched
step's.
"""

from engine.errors import DuplicateRequestError, EngineError
from engine.memory.pools import MemoryPools
from engine.scheduler.lora_slots import LoraSlots
from engine.scheduler.req import FinishReason, Req, RequestPhase
from engine.scheduler.role import SchedulerRole
from engine.scheduler.step_result import StepResult
from engine.types import RequestId


class RequestLifecycle:
    """The live requests of one scheduler, and those ended ones whose pages are still read."""

    def __init__(self, memory: MemoryPools, role: SchedulerRole, lora_slots: LoraSlots) -> None:
        self._memory = memory
        self._lora_slots = lora_slots
        self._role = role
        self.live: dict[RequestId, Req] = {}
        self.transferring: dict[RequestId, Req] = {}
        self.held: set[Req] = set()
        self.events = StepResult()
        """What happened since `take_events`."""
        self.num_endings = 0
        """Grows whenever a request ends, so that who looks for them knows when to."""
        self._arrivals = 0

    def take_events(self) -> StepResult:
        events, self.events = self.events, StepResult()
        return events

    def has_events(self) -> bool:
        return bool(self.events.errors or self.events.aborted or self.events.released)

    def check_new(self, rid: RequestId) -> None:
        """Raises `DuplicateRequestError` if a live request has this id."""
        if rid in self.live:
            raise DuplicateRequestError(f"request {rid} is live already")

    def add(self, req: Req, phase: RequestPhase) -> None:
        self._arrivals += 1
        req.arrival_order = self._arrivals
        req.phase = phase
        self.live[req.rid] = req

    def hand_over(self, req: Req) -> None:
        """The prompt is done on a prefill-only worker: out of the batch, pages and row stay."""
        self._lora_slots.release(req)
        req.phase = RequestPhase.TRANSFERRING
        self.transferring[req.rid] = req

    def finish(self, req: Req) -> None:
        """After its last token, or after one that its grammar does not take."""
        if req.grammar_error is not None:
            self.fail(req, req.grammar_error)
        else:
            self._end(req)

    def abort(self, req: Req) -> None:
        """After it has left whatever list it was in."""
        req.finish_reason = FinishReason.ABORT
        self.events.aborted.append(req.rid)
        self._role.on_request_aborted(req)
        self._end(req)

    def fail(self, req: Req, error: EngineError) -> None:
        """Ends it with an error to its client."""
        req.finish_reason = FinishReason.ERROR
        self.events.errors.append((req.rid, error))
        self._role.on_request_aborted(req)
        self._end(req)

    def release(self, req: Req) -> None:
        """The role lets go of a request that is in transfer, or held after its end. Nothing
        happens if it has let go already, or if it ended before it owned a page; where its abort is
        still to be settled, that gives the pages back. Raises `EngineError` for one that still
        runs or waits.
        """
        if req in self.held:
            self.held.discard(req)
        elif self.transferring.get(req.rid) is req:
            del self.transferring[req.rid]
            self.live.pop(req.rid)
        elif self.live.get(req.rid) is req and not req.finished():
            raise EngineError(f"request {req.rid} is {req.phase.name}: it cannot be released")
        else:
            return
        self._give_back(req)

    def on_step_ended(self, req: Req) -> None:
        """One of the launched steps with this request has ended and is handled."""
        req.in_flight -= 1
        if req.phase is RequestPhase.ENDING and req.in_flight == 0:
            self._end(req)

    def on_step_lost(self, req: Req, *, kv_len: int, error: EngineError | None) -> None:
        """A step with this request was not computed: it has KV of `kv_len` tokens, and ends with
        `error` unless it has ended."""
        req.kv_committed_len = min(req.kv_committed_len, kv_len)
        if error is None or req.finish_reason is not None:
            self.on_step_ended(req)
        else:
            req.in_flight -= 1
            self.fail(req, error)

    def _end(self, req: Req) -> None:
        self.num_endings += 1
        if req.in_flight:
            req.phase = RequestPhase.ENDING
            return
        self.live.pop(req.rid)
        self.transferring.pop(req.rid, None)
        self._lora_slots.release(req)
        if self._memory.retracted is not None:
            self._memory.retracted.claim(req)
        if req.pages and self._role.retain_pages(req):
            self._free_row(req)
            req.phase = RequestPhase.HELD
            self.held.add(req)
        else:
            self._give_back(req)

    def _give_back(self, req: Req) -> None:
        if req.pages:
            # A step that was launched before the request ended wrote KV for a token nobody knows.
            req.kv_committed_len = min(req.kv_committed_len, req.seqlen)
            self._memory.tree_cache.cache_finished_req(req, insert=req.kv_is_good())
        self._free_row(req)
        req.phase = RequestPhase.ENDED
        self.events.released.append(req.rid)

    def _free_row(self, req: Req) -> None:
        if req.req_pool_idx is not None:
            self._memory.req_to_token.free([req.req_pool_idx])
            req.req_pool_idx = None

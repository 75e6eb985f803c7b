"""Decides which waiting requests the next prefill takes (scheduling.md section 3).

The adder spends budgets (`PrefillBudgets`): memory that is there now (`cur_rem_tokens`), memory
that will be left when everybody admitted has grown (`rem_total_tokens`), and work for one pass
(`rem_input_tokens`, `rem_chunk_tokens`).
"""

from engine.memory.prefix_cache import LoadBack
from engine.memory.retracted_kv import KeptState
from engine.scheduler.preemption import choose_victims
from engine.scheduler.prefill_budgets import AddReqResult, PrefillBudgets
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch

__all__ = ["AddReqResult", "PrefillAdder"]


class PrefillAdder(PrefillBudgets):
    """One pass's admissions; made anew for each."""

    # ---- admissions

    def add_chunked_req(self, req: Req) -> Req | None:
        """Continues the chunked request, described to its end; it goes before all others. Returns
        it if its prompt is still not done, taken or not: where no memory or work is left, it is
        parked, since over-committing would kill what runs (sglang#30743).
        """
        rest = req.extend_input_len
        take = min(rest, self.rem_total_tokens)
        if self.rem_chunk_tokens is not None:
            take = min(take, self.rem_chunk_tokens)
        if take < rest:
            aligned = self._truncated(req, take, self.truncation_align_size)
            # Where memory is so short that nothing aligned is left, less keeps it going.
            take = aligned or self._truncated(req, take)
        if take <= 0:
            self.chunked_req_goes_on = True
            return req
        req.extend_input_len = take
        self.chunked_req_goes_on = take < rest
        self._charge(req, growth=0 if self.chunked_req_goes_on else self._growth(req))
        return req if self.chunked_req_goes_on else None

    def add_req(self, req: Req) -> AddReqResult:
        """Matches a waiting request against the tree and admits it if it fits; whether it did
        shows in `can_run_list`. One that does not, or that waits for another's prefix, is left
        owning nothing, but for the pages that are being loaded for it.
        """
        match self._kept_state(req):
            case KeptState.SAVING | KeptState.LOADING:
                return self._pass_over(req)
            case KeptState.LOADED:
                return self._add_restored_req(req)
        req.init_next_round_input(self.tree_cache)
        if self.shared is not None and self.shared.hold_back(req):
            req.drop_match()
            return AddReqResult.CONTINUE
        result = self.add_one_req(req)
        if not self.admitted_last(req):
            if self._kept_state(req) is not KeptState.LOADING:
                req.drop_match()
            return result
        if self._retracted is not None:
            self._retracted.claim(req)
        if self.shared is not None:
            self.shared.admitted(req)
        return result

    def admitted_last(self, req: Req) -> bool:
        """Whether `req` is the one that was admitted last."""
        return bool(self.can_run_list) and self.can_run_list[-1] is req

    def add_one_req(self, req: Req) -> AddReqResult:
        """Admits a matched request, whole or its first chunk, and locks its prefix."""
        if req.sampling_params.ignore_eos and self.tree_cache.disable:
            return self.add_one_req_ignore_eos(req)
        if not self._fits(req):
            return AddReqResult.NO_TOKEN
        self._lock(req)
        if not self._fits(req):
            self._unlock(req)
            return AddReqResult.NO_TOKEN
        return self._load_and_take(req)

    def add_one_req_ignore_eos(self, req: Req) -> AddReqResult:
        """Admits a request whose output length is known, without a tree: at each moment until all
        known ones have ended, memory must cover the next step of those that go on.
        """
        if not self._fits(req):
            return AddReqResult.NO_TOKEN
        self._lock(req)
        return self._load_and_take(req)

    # ---- KV in host memory

    def _kept_state(self, req: Req) -> KeptState | None:
        return None if self._retracted is None else self._retracted.state(req)

    def _load_and_take(self, req: Req) -> AddReqResult:
        """Takes a request that fits and whose prefix is locked, once what host memory has of it is
        back: all or nothing. While that is on its way the request is passed over."""
        if self._retracted is not None and self._kept_state(req) is KeptState.SAVED:
            match self._retracted.load(req):
                case LoadBack.PENDING:
                    return self._pass_over(req)
                case LoadBack.DONE:
                    return self._add_restored_req(req)
            if req.last_node is None:  # what was kept is spoilt, and all of it is forgotten
                req.init_next_round_input(self.tree_cache)
                self._lock(req)
        if req.host_hit_len > 0 and req.last_host_node is not None:
            match self.tree_cache.load_back(req.last_host_node):
                case LoadBack.PENDING:
                    self._unlock(req)
                    return self._pass_over(req)
                case LoadBack.DONE:
                    device_part = req.last_node
                    req.init_next_round_input(self.tree_cache)
                    self._lock(req)
                    if device_part is not None:
                        self.tree_cache.dec_lock_ref(device_part)
        return self._take(req)

    def _pass_over(self, req: Req) -> AddReqResult:
        """Nobody behind it may take the room that a request needs whose KV is on its way."""
        self._passed_over = True
        growth = self._growth(req)
        rest = self.ceil_page(req.seqlen - len(req.pages) * self.page_size - req.host_hit_len)
        self._total_offset += max(rest, 0) + growth + self.page_size
        self._cur_offset += max(rest, 0) + self.page_size
        return AddReqResult.CONTINUE

    def _add_restored_req(self, req: Req) -> AddReqResult:
        """Admits a retracted request whose KV has come back: its last token is all that is
        computed. If that does not fit, its pages go back; its KV stays in host memory."""
        retracted = self._retracted
        req.init_next_round_input()
        fits = self._fits(req)
        if retracted is None or not fits or self._extend_now(req) < req.extend_input_len:
            if retracted is not None:
                retracted.put_back(req)
            return AddReqResult.OTHER if fits else AddReqResult.NO_TOKEN
        retracted.claim(req)
        return self._take(req)

    def _take(self, req: Req) -> AddReqResult:
        """The whole request if this pass's work allows, else a first chunk of it."""
        extend = self._extend_now(req)
        if extend <= 0:
            self._unlock(req)
            return AddReqResult.OTHER
        if extend < req.extend_input_len:
            req.extend_input_len = extend
            self.new_chunked_req = req
        if req.last_node is not None:
            self.tree_cache.record_hit(req.last_node)
        self._charge(req, growth=0 if self.new_chunked_req is req else self._growth(req))
        return self.budget_state()

    def _extend_now(self, req: Req) -> int:
        """How much of the request this pass's work allows; 0: nothing."""
        extend = req.extend_input_len
        if self.rem_chunk_tokens is None:
            # An over-long first request passes, or it would starve.
            over_long = self.ceil_page(extend) > self.rem_input_tokens
            return 0 if over_long and self.can_run_list else extend
        if extend <= self.rem_chunk_tokens:
            return extend
        if self.chunked_req_goes_on:
            return 0
        return self._truncated(req, self.rem_chunk_tokens, self.truncation_align_size)

    # ---- preemption

    def preempt_to_schedule(self, req: Req, threshold: int, *, slots_needed: int = 0) -> bool:
        """Makes room for a waiting request: sends running ones back that are strictly less
        important by more than `threshold`, the least important and newest first, until memory
        holds `req` and `slots_needed` places are free. False: all of them would not do, and none
        is touched. A victim's KV stays in the tree as far as there is room.

        Called between two steps that are both handled: a victim has its last token, and none that
        has ended is among them.
        """
        if self._kept_state(req) in (KeptState.SAVING, KeptState.LOADING, KeptState.LOADED):
            return False  # its KV is on its way; it is looked at again when it is there
        req.init_next_round_input(self.tree_cache)
        if self.shared is not None and self.shared.hold_back(req):
            req.drop_match()
            return False
        self._lock(req)
        victims: list[Req] = []
        if self._extend_now(req) > 0:
            victims = choose_victims(
                (r for r in self.running_batch.reqs if r.priority - req.priority > threshold),
                page_size=self.page_size,
                enough=lambda victims, freed_tokens: (
                    len(victims) >= slots_needed
                    and self._fits(req, without=victims, freed_tokens=freed_tokens)
                ),
            )
        self._total_offset -= self._growth_of(victims)
        for victim in victims:
            self.running_batch.release_req(victim, returns=True)
            victim.reset_for_retract()
        self._unlock(req)
        req.drop_match()
        if not victims:
            return False
        gone = set(victims)
        self.preempt_list.extend(victims)
        self.running_batch.filter_batch(
            keep_indices=[i for i, r in enumerate(self.running_batch.reqs) if r not in gone]
        )
        return True

    def _truncated(self, req: Req, budget: int, align: int | None = None) -> int:
        """Of `budget` tokens, as many as end with a whole page, in multiples of `align`."""
        length = max(budget, 0)
        if align is not None:
            length = length // self.page_size * self.page_size // align * align
        end = (req.prefix_len + length) // self.page_size * self.page_size
        return end - req.prefix_len

    def _lock(self, req: Req) -> None:
        if req.last_node is not None:
            self.tree_cache.inc_lock_ref(req.last_node)

    def _unlock(self, req: Req) -> None:
        if req.last_node is not None:
            self.tree_cache.dec_lock_ref(req.last_node)

    def get_batch(self) -> ScheduleBatch | None:
        """Those admitted as a batch still to be prepared; None if there are none."""
        if not self.can_run_list:
            return None
        return ScheduleBatch(
            reqs=self.can_run_list,
            memory=self.running_batch.memory,
            vocab_size=self.running_batch.vocab_size,
            enable_overlap=self.running_batch.enable_overlap,
            is_prefill_only=self.prefill_only,
            chunked_req=self.new_chunked_req,
        )

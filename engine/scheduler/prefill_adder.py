"""Decides which waiting requests the next prefill takes (scheduling.md section 3).

The adder spends budgets: memory that is there now (`cur_rem_tokens`), memory that will be left
when everybody admitted has grown (`rem_total_tokens`), and work for one pass (`rem_input_tokens`,
`rem_chunk_tokens`). What is free is re-read at each use, since locking a prefix shrinks it.
"""

import math
from enum import Enum, auto

from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import BasePrefixCache
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch


class AddReqResult(Enum):
    CONTINUE = auto()
    """Taken; there may be room for more."""
    NO_TOKEN = auto()
    """KV memory is spent (with or without this request)."""
    OTHER = auto()
    """This pass's work is spent."""


class PrefillAdder:
    """One pass's admissions; made anew for each."""

    def __init__(
        self,
        page_size: int,
        tree_cache: BasePrefixCache,
        token_to_kv_pool_allocator: PageAllocator,
        running_batch: ScheduleBatch,
        new_token_ratio: float,
        rem_input_tokens: int,
        rem_chunk_tokens: int | None,
        mixed_with_decode_tokens: int = 0,
        *,
        prefill_only: bool = False,
        reserved_tokens: int = 0,
        truncation_align_size: int | None = None,
    ) -> None:
        """`mixed_with_decode_tokens`: rows of running requests that may join this step.
        `prefill_only`: requests leave after their first token, so that is all they may grow.
        `reserved_tokens`: free memory that is promised to tickets.
        """
        self.page_size = page_size
        self.tree_cache = tree_cache
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator
        self.running_batch = running_batch
        self.new_token_ratio = new_token_ratio
        self.prefill_only = prefill_only
        self.reserved_tokens = reserved_tokens
        self.truncation_align_size = truncation_align_size

        self.rem_input_tokens = rem_input_tokens - mixed_with_decode_tokens
        self.rem_chunk_tokens = rem_chunk_tokens
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= mixed_with_decode_tokens
        self._total_offset = mixed_with_decode_tokens + sum(
            self._expected_growth(req) for req in running_batch.reqs
        )
        self._cur_offset = mixed_with_decode_tokens

        self.can_run_list: list[Req] = []
        self.new_chunked_req: Req | None = None
        self.chunked_req_goes_on = False
        """The chunked request of earlier passes is still not done, so no other may be truncated."""
        self.log_hit_tokens = 0
        self.log_input_tokens = 0

    # ---- budgets

    @property
    def available_tokens(self) -> int:
        """A: what is free or evictable and not promised."""
        return (
            self.token_to_kv_pool_allocator.available_size()
            + self.tree_cache.evictable_size()
            - self.reserved_tokens
        )

    @property
    def rem_total_tokens(self) -> int:
        """What is left when everybody has grown as expected."""
        return math.floor(self.available_tokens - self._total_offset)

    @property
    def cur_rem_tokens(self) -> int:
        """What is left after this pass."""
        return self.available_tokens - self._cur_offset

    def budget_state(self) -> AddReqResult:
        if self.rem_total_tokens <= 0 or self.cur_rem_tokens <= 0:
            return AddReqResult.NO_TOKEN
        if self.rem_input_tokens <= 0:
            return AddReqResult.OTHER
        if self.rem_chunk_tokens is not None and self.rem_chunk_tokens <= 0:
            return AddReqResult.OTHER
        return AddReqResult.CONTINUE

    def ceil_page(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size

    def _growth(self, req: Req) -> int:
        return 1 if self.prefill_only else req.clipped_new_tokens

    def _expected_growth(self, req: Req) -> float:
        ratio = 1.0 if req.sampling_params.ignore_eos else self.new_token_ratio
        return req.clipped_new_tokens * ratio

    def _charge(self, req: Req, growth: int) -> None:
        extend = self.ceil_page(req.extend_input_len)
        self._total_offset += extend + growth + self.page_size
        self._cur_offset += extend + self.page_size
        self.rem_input_tokens -= extend
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= extend
        self.log_hit_tokens += req.prefix_len
        self.log_input_tokens += req.extend_input_len
        self.can_run_list.append(req)

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
            end = (req.prefix_len + max(take, 0)) // self.page_size * self.page_size
            take = end - req.prefix_len
        if take <= 0:
            self.chunked_req_goes_on = True
            return req
        req.extend_input_len = take
        self.chunked_req_goes_on = take < rest
        self._charge(req, growth=0 if self.chunked_req_goes_on else self._growth(req))
        return req if self.chunked_req_goes_on else None

    def add_req(self, req: Req) -> AddReqResult:
        """Matches a waiting request against the tree and admits it if it fits; whether it did
        shows in `can_run_list`. A refused one is left owning nothing.
        """
        req.init_next_round_input(self.tree_cache)
        admitted = len(self.can_run_list)
        result = self.add_one_req(req)
        if len(self.can_run_list) == admitted:
            req.drop_match()
        return result

    def add_one_req(self, req: Req) -> AddReqResult:
        """Admits a matched request, whole or its first chunk, and locks its prefix."""
        if req.sampling_params.ignore_eos and self.tree_cache.disable:
            return self.add_one_req_ignore_eos(req)
        needed = req.extend_input_len + self._growth(req) + self.page_size
        if needed >= self.rem_total_tokens and not self._fits_alone(req):
            return AddReqResult.NO_TOKEN
        self._lock(req)
        if needed >= self.rem_total_tokens and not self._fits_alone(req):
            self._unlock(req)
            return AddReqResult.NO_TOKEN
        return self._take(req)

    def add_one_req_ignore_eos(self, req: Req) -> AddReqResult:
        """Admits a request whose output length is known, without a tree: at each moment until all
        known ones have ended, memory must cover the next step of those that go on.
        """
        extend = self.ceil_page(req.extend_input_len)
        if extend > min(self.cur_rem_tokens, self.rem_total_tokens):
            return AddReqResult.NO_TOKEN
        if not self._survives(req) and not self._fits_alone(req):
            return AddReqResult.NO_TOKEN
        self._lock(req)
        return self._take(req)

    def _survives(self, candidate: Req) -> bool:
        rows = [(self._expected_growth(req), req.seqlen) for req in self.running_batch.reqs]
        for req in [*self.can_run_list, candidate]:
            growth = 1.0 if self.prefill_only else self._expected_growth(req)
            rows.append((growth, req.seqlen))
        rows.sort()
        free = float(self.cur_rem_tokens - self.ceil_page(candidate.extend_input_len))
        free -= sum(  # the later chunks of a prompt that is not done
            r.seqlen - r.prefix_len - r.extend_input_len for r in self.can_run_list
        )
        for i, (tokens_left, occupied) in enumerate(rows):
            going_on = len(rows) - i
            # A page each, as growth takes whole pages.
            if free - tokens_left * going_on < self.page_size * going_on:
                return False
            free += occupied
        return True

    def _fits_alone(self, req: Req) -> bool:
        """Whether an otherwise empty engine holds this request to its end. The budgets keep a page
        more per request than it needs, which must not shut out one that fills the memory.
        """
        if self.can_run_list or self.chunked_req_goes_on or not self.running_batch.is_empty():
            return False
        return self.ceil_page(req.extend_input_len + self._growth(req)) <= self.available_tokens

    def _take(self, req: Req) -> AddReqResult:
        """The whole request if this pass's work allows, else a first chunk of it."""
        extend = req.extend_input_len
        if self.rem_chunk_tokens is None:
            # An over-long first request passes, or it would starve.
            if self.ceil_page(extend) > self.rem_input_tokens and self.can_run_list:
                self._unlock(req)
                return AddReqResult.OTHER
        elif extend > self.rem_chunk_tokens:
            req.extend_input_len = self._truncated(req, self.rem_chunk_tokens)
            if req.extend_input_len <= 0 or self.chunked_req_goes_on:
                self._unlock(req)
                return AddReqResult.OTHER
            self.new_chunked_req = req
        self._charge(req, growth=0 if self.new_chunked_req is req else self._growth(req))
        return self.budget_state()

    def _truncated(self, req: Req, budget: int) -> int:
        length = max(budget, 0) // self.page_size * self.page_size
        if self.truncation_align_size is not None:
            length = length // self.truncation_align_size * self.truncation_align_size
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
            is_prefill_only=self.prefill_only,
            chunked_req=self.new_chunked_req,
        )

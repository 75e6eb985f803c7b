"""What a prefill may spend: memory now and later, and work (scheduling.md section 3).

What is free is re-read at each use, since locking a prefix shrinks it.
"""

import math
from collections.abc import Collection, Iterable
from enum import Enum, auto

from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import BasePrefixCache
from engine.scheduler.growth import Growth
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.shared_prefixes import SharedPrefixes


class AddReqResult(Enum):
    CONTINUE = auto()
    """Taken; there may be room for more."""
    NO_TOKEN = auto()
    """KV memory is spent (with or without this request)."""
    OTHER = auto()
    """This pass's work is spent."""


class PrefillBudgets:
    """What one pass may spend, and whether a request fits into it."""

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
        shared: SharedPrefixes | None = None,
    ) -> None:
        """`mixed_with_decode_tokens`: rows of running requests that may join this step.
        `prefill_only`: requests leave after their first token, so that is all they may grow.
        `reserved_tokens`: free memory that is promised to tickets. `shared`: prefixes that are
        being computed; None: every request is computed for itself.
        """
        self.page_size = page_size
        self.tree_cache = tree_cache
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator
        self.running_batch = running_batch
        self.new_token_ratio = new_token_ratio
        self.prefill_only = prefill_only
        self.reserved_tokens = reserved_tokens
        self.truncation_align_size = truncation_align_size
        self.shared = shared
        self._retracted = running_batch.memory.retracted
        self._passed_over = False
        """Somebody before the rest of the queue waits for KV that is on its way."""

        self.rem_input_tokens = rem_input_tokens - mixed_with_decode_tokens
        self.rem_chunk_tokens = rem_chunk_tokens
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= mixed_with_decode_tokens
        self._total_offset = mixed_with_decode_tokens + running_batch.growth().tokens(
            new_token_ratio
        )
        self._cur_offset = mixed_with_decode_tokens

        self.can_run_list: list[Req] = []
        self.preempt_list: list[Req] = []
        """Requests that ran and were sent back; the scheduler queues them again."""
        self.new_chunked_req: Req | None = None
        self.chunked_req_goes_on = False
        """The chunked request of earlier passes is still not done, so no other may be truncated."""
        self.log_hit_tokens = 0
        self.log_input_tokens = 0

    # ---- budgets

    @property
    def available_tokens(self) -> int:
        """A: what is free or evictable (now, or when a copy has ended) and not promised."""
        leaving = 0 if self._retracted is None else self._retracted.pages_leaving * self.page_size
        return (
            self.token_to_kv_pool_allocator.available_size()
            + self.tree_cache.evictable_size()
            + leaving
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

    def _growth_of(self, reqs: Iterable[Req]) -> float:
        return Growth.of(reqs).tokens(self.new_token_ratio)

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

    # ---- whether a request fits

    def _fits(self, req: Req, *, without: Collection[Req] = (), freed_tokens: int = 0) -> bool:
        """Whether memory holds `req` beside all others; with `without`, as if these running
        requests had gone and freed `freed_tokens`.
        """
        available = self.available_tokens + freed_tokens
        if self._fits_alone(req, available, without):
            return True
        offset = self._total_offset - self._growth_of(without)
        rem_total = math.floor(available - offset)
        if req.sampling_params.ignore_eos and self.tree_cache.disable:
            cur_rem = available - self._cur_offset
            if self.ceil_page(req.extend_input_len) > min(cur_rem, rem_total):
                return False
            return self._survives(req, cur_rem, without)
        return req.extend_input_len + self._growth(req) + self.page_size < rem_total

    def _survives(self, candidate: Req, cur_rem_tokens: int, without: Collection[Req]) -> bool:
        rows = [
            (self._expected_growth(req), req.seqlen)
            for req in self.running_batch.reqs
            if req not in without
        ]
        for req in [*self.can_run_list, candidate]:
            growth = 1.0 if self.prefill_only else self._expected_growth(req)
            rows.append((growth, req.seqlen))
        rows.sort()
        free = float(cur_rem_tokens - self.ceil_page(candidate.extend_input_len))
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

    def _fits_alone(self, req: Req, available_tokens: int, without: Collection[Req]) -> bool:
        """Whether an otherwise empty engine holds this request to its end. The budgets keep a page
        more per request than it needs, which must not shut out one that fills the memory.
        """
        if self.can_run_list or self.chunked_req_goes_on or self._passed_over:
            return False
        if len(without) < self.running_batch.batch_size():
            return False
        # Its last page may have room: KV that came back from host memory ends anywhere.
        end = self.ceil_page(req.prefix_len + req.extend_input_len + self._growth(req))
        return end - len(req.pages) * self.page_size <= available_tokens

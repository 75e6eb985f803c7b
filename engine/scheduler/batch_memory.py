"""What a batch takes from memory, and what it gives back (scheduling.md section 4)."""

import logging
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, overload

import torch

from engine.errors import OutOfMemoryError
from engine.execution.forward_batch import ForwardMode
from engine.memory.page_allocator import AllocatorState, PageAllocator
from engine.memory.pools import MemoryPools
from engine.memory.prefix_cache import BasePrefixCache
from engine.memory.req_to_token import ReqToTokenPool
from engine.scheduler.growth import Growth
from engine.scheduler.req import Req

logger = logging.getLogger(__name__)

RETRACT_DECODE_STEPS = 20
"""Decode steps that a batch should survive after a retraction without another one."""


@dataclass(frozen=True, slots=True)
class RetractResult:
    """What `retract_decode` did."""

    retracted: list[Req]
    """Out of the batch, without row and pages; to be queued again."""
    new_token_ratio: float
    """Estimate for the prefill adder: what those kept have really used."""
    does_not_fit: Req | None
    """The last one left, if even it has no room for its next token."""


@dataclass(eq=False, kw_only=True)
class BatchMemory:
    """Requests and the pools they live in; `ScheduleBatch` adds the tensors."""

    reqs: list[Req]
    memory: MemoryPools
    forward_mode: ForwardMode = ForwardMode.IDLE
    _growing: list[int] | None = field(default=None, init=False)
    """`rows_that_need_a_page` as last counted, while members and lengths are the same."""
    _growth: Growth | None = field(default=None, init=False)
    """`growth` as last counted, while members are the same and each takes every token."""

    @abstractmethod
    def filter_batch(
        self,
        chunked_req_to_exclude: Collection[Req] = (),
        keep_indices: list[int] | None = None,
    ) -> None:
        """Drops requests that take no further step and those to exclude, or all but
        `keep_indices`."""

    @property
    def req_to_token_pool(self) -> ReqToTokenPool:
        return self.memory.req_to_token

    @property
    def token_to_kv_pool_allocator(self) -> PageAllocator:
        return self.memory.allocator

    @property
    def tree_cache(self) -> BasePrefixCache:
        return self.memory.tree_cache

    @property
    def page_size(self) -> int:
        return self.memory.allocator.page_size

    @property
    def device(self) -> torch.device:
        return self.memory.req_to_token.device

    def is_empty(self) -> bool:
        return len(self.reqs) == 0

    def batch_size(self) -> int:
        return len(self.reqs)

    # ---- allocation

    def alloc_req_slots(self, num_reqs: int) -> list[int]:
        """Rows for `num_reqs` requests; raises `OutOfMemoryError`, with none taken."""
        rows = self.req_to_token_pool.alloc(num_reqs)
        if rows is None:
            raise OutOfMemoryError(
                f"request rows are short: {num_reqs} asked, "
                f"{self.req_to_token_pool.available_size()} of {self.req_to_token_pool.size} free; "
                "set a smaller --max-running-requests"
            )
        return rows

    @overload
    def alloc_token_slots(
        self, num_tokens: int, backup_state: Literal[False] = False, *, after: int | None = None
    ) -> list[int]: ...
    @overload
    def alloc_token_slots(
        self, num_tokens: int, backup_state: Literal[True], *, after: int | None = None
    ) -> tuple[list[int], AllocatorState]: ...
    def alloc_token_slots(
        self, num_tokens: int, backup_state: bool = False, *, after: int | None = None
    ) -> list[int] | tuple[list[int], AllocatorState]:
        """The pages that hold `num_tokens` more tokens, evicting from the tree first.

        With `backup_state` also the allocator's state before, so that a step which is given up can
        be undone. `after`: the page that the tokens follow. Raises `OutOfMemoryError`.
        """
        num_pages = -(-num_tokens // self.page_size)
        self.memory.evict_for(num_pages)
        state = self.token_to_kv_pool_allocator.backup_state() if backup_state else None
        try:
            pages = self.memory.alloc_pages(num_pages, after=after)
        except OutOfMemoryError as error:
            phase = "Prefill" if self.forward_mode.is_extend() else "Decode"
            logger.error(
                "%s is out of memory: %s\n%s", phase, error, self.tree_cache.pretty_print()
            )
            raise OutOfMemoryError(f"{phase} of {len(self.reqs)} requests: {error}") from error
        return pages if state is None else (pages, state)

    def require_pages(self, num_pages: int) -> None:
        """Makes room for all pages of a step at once, so that none is taken where some are short.
        This is exact where the rule of section 4 (extend + batch * page) is its upper bound, so
        no cached prefix is given up for a page that nobody takes.
        """
        self.memory.evict_for(num_pages)
        free = self.token_to_kv_pool_allocator.free_pages
        if num_pages > free:
            raise OutOfMemoryError(
                f"prefill of {len(self.reqs)} requests needs {num_pages} pages, {free} are free "
                "and none evictable: the prefill adder promised too much"
            )

    # ---- decode memory

    def growth(self) -> Growth:
        """What the members may still produce."""
        if self._growth is None:
            self._growth = Growth.of(self.reqs)
        return self._growth

    def on_results(self, reqs: list[Req]) -> None:
        """Called when a step's results are handled, which `reqs` took part in."""
        if self._growth is not None:
            steady = reqs is self.reqs
            self._growth = self._growth.after_a_token_each() if steady else None

    def rows_that_need_a_page(self) -> list[int]:
        """Places of the requests whose last page is full. Counted once a step."""
        if self._growing is None:
            size = self.page_size
            self._growing = [i for i, r in enumerate(self.reqs) if r.kv_committed_len % size == 0]
        return self._growing

    def _can_grow(self, pages: int, reserved_tokens: int) -> bool:
        if pages == 0:
            return True
        self.memory.evict_for(pages)
        room = self.memory.available_tokens() - reserved_tokens
        return (
            pages <= self.token_to_kv_pool_allocator.free_pages and pages * self.page_size <= room
        )

    def new_page_count_next_decode(self) -> int:
        """Pages the next decode step takes: one for each request whose last page is full."""
        return len(self.rows_that_need_a_page())

    def check_decode_mem(self, buf_multiplier: int = 1, *, reserved_tokens: int = 0) -> bool:
        """Whether `buf_multiplier` decode steps' pages are there, evicting if they are short.
        `reserved_tokens` are promised to others.
        """
        return self._can_grow(self.new_page_count_next_decode() * buf_multiplier, reserved_tokens)

    def retract_decode(self, *, reserved_tokens: int = 0) -> RetractResult:
        """Sends requests back to the queue until the rest can decode: those with the shortest
        output first, of these the longest prompt, as they lose least and free most. At least one
        goes; the last one stays whether it fits or not. What they computed stays in the tree as
        long as there is room, so their return is cheap.
        """
        order = sorted(
            range(len(self.reqs)),
            key=lambda i: (-len(self.reqs[i].output_ids), self.reqs[i].prompt_len),
        )
        retracted: list[Req] = []
        pages = self.new_page_count_next_decode()
        while len(order) > 1:
            victim = self.reqs[order.pop()]
            pages -= victim.kv_committed_len % self.page_size == 0
            self.release_req(victim, returns=True)
            victim.reset_for_retract()
            retracted.append(victim)
            if self._can_grow(pages, reserved_tokens):
                break
        self.filter_batch(keep_indices=sorted(order))
        # Promises to others bind only while somebody else could give way.
        fits = self.check_decode_mem(reserved_tokens=reserved_tokens if len(order) > 1 else 0)
        produced = sum(len(req.output_ids) for req in self.reqs)
        possible = sum(req.max_new_tokens for req in self.reqs)
        ratio = (produced + RETRACT_DECODE_STEPS * len(self.reqs)) / (possible + 1)
        return RetractResult(
            retracted=retracted,
            new_token_ratio=min(1.0, ratio),
            does_not_fit=None if fits else self.reqs[0],
        )

    def release_req(self, req: Req, *, returns: bool = False) -> None:
        """Gives back a member's pages (to the tree, as far as whole) and its row. `returns`: it is
        past its prompt and will be queued again, so its KV may be kept in host memory."""
        retracted = self.memory.retracted
        good = req.kv_is_good()
        if not (returns and good and retracted is not None and retracted.keep(req)):
            self.tree_cache.cache_finished_req(req, insert=good)
        if req.req_pool_idx is not None:
            self.req_to_token_pool.free([req.req_pool_idx])
            req.req_pool_idx = None

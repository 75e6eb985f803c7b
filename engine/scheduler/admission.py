"""Whether a decode worker may promise to take one more request (scheduling.md section 5).

A ticket is granted before any prefill runs, so memory must be judged by what everybody here may
still grow. The rule is a pure function of numbers; `DecodeAdmission` collects them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import InvalidRequestError
from engine.scheduler.config import CLIP_MAX_NEW_TOKENS
from engine.scheduler.req import Req

if TYPE_CHECKING:
    from engine.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class GrowingRequest:
    """A request here, as far as admission sees it."""

    prompt_len: int
    output_len: int
    max_new_tokens: int

    def reserve(self, decode_reserve_tokens: int) -> int:
        """R_r: tokens it may still grow, at most R."""
        return max(0, min(decode_reserve_tokens, self.max_new_tokens - self.output_len))


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A ticket that was granted and has not joined yet; its row binds when it is described
    (`Newcomers`), or when it joins."""

    prompt_len: int
    """Tokens whose KV will come, replayed outputs included."""
    max_new_tokens: int
    """Tokens it may still produce."""
    prefix_len: int = 0
    """Leading tokens whose KV is here already (whole pages, locked)."""
    pages_allocated: bool = True
    """False: the pages bind later, so the promised tokens are still among the free ones."""
    lora_id: str = ""
    """The adapter it will need a slot for."""


def ceil_page(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size) * page_size


def can_admit(
    *,
    prompt_len: int,
    prefix_len: int,
    max_new_tokens: int,
    free_and_evictable: int,
    page_size: int,
    decode_reserve_tokens: int,
    running: Iterable[GrowingRequest],
    in_transfer: Iterable[GrowingRequest],
    prebuilt: Iterable[GrowingRequest],
    returning: Iterable[GrowingRequest],
    free_rows: int,
    free_landing_slots: int,
) -> bool:
    """Section 5 as written. All lengths in tokens; `free_and_evictable` without what is promised
    but not bound yet. `in_transfer`: tickets whose KV is on its way. `prebuilt`: arrived, not
    merged. `returning`: requests of the waiting queue, which own no pages (retracted, or to be
    prefilled here).
    """
    if free_rows < 1 or free_landing_slots < 1:
        return False
    running, in_transfer, prebuilt, returning = (
        list(running), list(in_transfer), list(prebuilt), list(returning)
    )  # fmt: skip
    if not (running or in_transfer or prebuilt or returning):
        return ceil_page(prompt_len + max_new_tokens - prefix_len, page_size) <= free_and_evictable

    reserve = decode_reserve_tokens
    retractable = sum(r.prompt_len + r.output_len for r in running)
    need_single = max(
        (min(r.max_new_tokens, CLIP_MAX_NEW_TOKENS) + r.prompt_len - retractable for r in running),
        default=0,
    )
    growth = sum(r.reserve(reserve) for r in [*running, *in_transfer])
    allocatable = free_and_evictable - max(growth, need_single, 0)
    allocatable -= sum(r.reserve(reserve) for r in prebuilt)
    allocatable -= sum(
        ceil_page(r.prompt_len + r.output_len, page_size) + r.reserve(reserve) for r in returning
    )
    new_pages_tokens = ceil_page(prompt_len - prefix_len, page_size)
    own_growth = min(reserve, max_new_tokens)
    alone = prompt_len - prefix_len + min(max_new_tokens, CLIP_MAX_NEW_TOKENS) - retractable
    return max(new_pages_tokens + own_growth, alone) <= allocatable


def fits_empty_worker(
    *, prompt_len: int, max_new_tokens: int, total_tokens: int, page_size: int
) -> bool:
    """The door's question: could an empty worker of `total_tokens` ever hold it? Not clipped."""
    return ceil_page(prompt_len + max_new_tokens, page_size) <= total_tokens


def default_max_new_tokens(*, prompt_len: int, total_tokens: int, context_length: int) -> int:
    """What an absent max_tokens becomes: all that fits. Raises `InvalidRequestError` where not one
    token does.
    """
    room = min(total_tokens, context_length) - prompt_len
    if room < 1:
        raise InvalidRequestError(
            f"the prompt has {prompt_len} tokens; context ({context_length}) and KV memory "
            f"({total_tokens}) must hold it and at least one new token"
        )
    return room


class DecodeAdmission:
    """Asks `can_admit` about a scheduler as it is now."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def has_lora_slot_for(self, lora_id: str) -> bool:
        """Whether the adapter fits beside those in use and those promised. A request that must wait
        for it holds up nobody else (scheduling.md section 2)."""
        scheduler = self._scheduler
        promised = promised_loras(scheduler.role.promises(), scheduler.prebuilt)
        return scheduler.lora_slots.has_room_for(lora_id, promised)

    def can_admit(
        self,
        prompt_len: int,
        prefix_len: int,
        max_new_tokens: int,
        *,
        already_promised: Iterable[Promise] | None = None,
        free_landing_slots: int = 1,
        priority: int | None = None,
        without: Collection[Req] = (),
        freed_tokens: int = 0,
    ) -> bool:
        """`prompt_len` counts replayed outputs, `max_new_tokens` what may still be produced.
        `already_promised`: tickets that have not joined; None asks the scheduler's role.
        `priority`: where priorities count, nothing is kept for those who wait and would give way
        to it. `without`: as if these running requests had gone back to the queue and freed
        `freed_tokens`.
        """
        scheduler = self._scheduler
        promises = list(scheduler.role.promises() if already_promised is None else already_promised)
        unbound = sum(unbound_tokens(p, scheduler.page_size) for p in promises)
        rows = scheduler.memory.req_to_token.available_size() + len(without)
        rows += len(scheduler.newcomers.rows)  # theirs by promise, or as prebuilt
        running = [req for req in scheduler.running_requests() if req not in without]
        rows = min(rows, scheduler.config.max_running_requests - len(running))
        rows -= len(promises) + len(scheduler.prebuilt)
        return can_admit(
            prompt_len=prompt_len,
            prefix_len=prefix_len,
            max_new_tokens=max_new_tokens,
            free_and_evictable=scheduler.memory.available_tokens() + freed_tokens - unbound,
            page_size=scheduler.page_size,
            decode_reserve_tokens=scheduler.config.decode_reserve_tokens,
            running=[_growing(req) for req in running],
            in_transfer=[GrowingRequest(p.prompt_len, 0, p.max_new_tokens) for p in promises],
            prebuilt=[_growing(req) for req in scheduler.prebuilt],
            returning=[
                _growing(req)
                for req in scheduler.returning_requests()
                if not self._gives_way(req, priority)
            ],
            free_rows=rows,
            free_landing_slots=free_landing_slots,
        )

    def _gives_way(self, req: Req, priority: int | None) -> bool:
        config = self._scheduler.config
        if priority is None or not config.enable_priority_scheduling:
            return False
        # One in chunks holds memory already; it gives way to those of the queue alone.
        waits = req is not self._scheduler.chunked_req
        return waits and req.priority > priority + config.priority_preemption_threshold


def promised_loras(promises: Iterable[Promise], prebuilt: Iterable[Req]) -> set[str]:
    """Adapters that are not in use yet and will be."""
    return {p.lora_id for p in promises if p.lora_id} | {r.lora_id for r in prebuilt if r.lora_id}


def unbound_tokens(promise: Promise, page_size: int) -> int:
    """Free tokens that a promise has still to take."""
    if promise.pages_allocated:
        return 0
    return ceil_page(promise.prompt_len - promise.prefix_len, page_size)


def _growing(req: Req) -> GrowingRequest:
    return GrowingRequest(req.prompt_len, len(req.output_ids), req.max_new_tokens)

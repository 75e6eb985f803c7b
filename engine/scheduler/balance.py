"""The invariant of section 8, asked of one scheduler: each page, row, lock and LoRA slot has its
owner."""

from engine.memory.audit import (
    MemoryInvariantError,
    PageAudit,
    PageCounts,
    RowCounts,
    audit_pages,
    count_rows,
)
from engine.memory.pools import MemoryPools
from engine.scheduler.in_flight import StepsInFlight
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.lora_slots import LoraSlots
from engine.scheduler.newcomers import Newcomers
from engine.scheduler.role import SchedulerRole


class MemoryBalance:
    """Collects the owners; asked between two steps only."""

    def __init__(
        self,
        lifecycle: RequestLifecycle,
        memory: MemoryPools,
        role: SchedulerRole,
        in_flight: StepsInFlight,
        lora_slots: LoraSlots,
        newcomers: Newcomers,
    ) -> None:
        self._lora_slots = lora_slots
        self._newcomers = newcomers
        self._in_flight = in_flight
        self._lifecycle = lifecycle
        self._memory = memory
        self._role = role

    def audit(self) -> PageAudit:
        """Looks at every page."""
        owners = list(self._role.page_owners())
        return audit_pages(
            allocator=self._memory.allocator,
            tree_cache=self._memory.tree_cache,
            request_pages=(req.pages for req in self._lifecycle.live.values()),
            other_in_use=[pages for kind, pages in owners if kind == "in_use"],
            held=[
                *(pages for kind, pages in owners if kind == "held"),
                *(req.pages for req in self._lifecycle.held),
                self._in_flight.parked_pages,
                *self._memory.pages_under_copy(),
            ],
        )

    def estimate(self) -> PageCounts:
        """By the books' own counters, without a look at each page: for figures while steps run,
        never for a proof. What is neither free, nor cached, nor held counts as in use."""
        allocator = self._memory.allocator
        total, free = allocator.num_pages, allocator.free_pages
        cached = self._memory.tree_cache.evictable_size() // allocator.page_size
        held = sum(len(req.pages) for req in self._lifecycle.held)
        held = min(held, total - free - cached)
        return PageCounts(
            free=free, cached=cached, held=held, in_use=total - free - cached - held, total=total
        )

    def row_counts(self) -> RowCounts:
        """Raises `MemoryInvariantError` for a row without an owner, or with two."""
        rows = (req.req_pool_idx for req in self._lifecycle.live.values())
        return count_rows(
            req_to_token=self._memory.req_to_token,
            in_use=[*self._newcomers.rows, *(row for row in rows if row is not None)],
        )

    def check(self) -> None:
        """Raises `MemoryInvariantError` if a page, a row, a lock or a LoRA slot is not accounted
        for."""
        self.audit().raise_if_broken()
        self.row_counts()
        self._lora_slots.check(self._lifecycle.live.values())
        self._memory.check_host()
        tree = self._memory.tree_cache
        counted = tree.evictable_size() + tree.protected_size()
        if counted != tree.total_pages() * tree.page_size:
            raise MemoryInvariantError(
                f"the tree counts {counted} tokens and holds {tree.total_pages()} pages\n"
                f"{tree.pretty_print()}"
            )

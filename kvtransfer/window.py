"""The landing window: the only memory of a decode worker that a peer may write.

A slot is free, granted to one ticket, or quarantined: its writer went silent and may still write,
so nobody else gets it until the writer says it has stopped, or is known to be dead. A stray write
can then spoil a slot that nobody reads, never a page.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch

from kvtransfer.errors import NoSlotsError
from kvtransfer.huge_pages import HugePages


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Slots by state; the three always sum to `total`."""

    free: int
    granted: int
    quarantined: int
    total: int


class LandingWindow:
    """Accounting of the slots. Thread-safe; its lock is never held over I/O."""

    def __init__(self, memory: torch.Tensor, *, first_slot: int = 0) -> None:
        """`memory`: [slots, page_bytes] uint8; its slots are numbered from `first_slot` on."""
        self.memory = memory
        self.first_slot = first_slot
        self.huge_pages = HugePages(memory)
        self._lock = threading.Lock()
        self._free = set(range(first_slot, first_slot + memory.shape[0]))
        self._granted: dict[int, int] = {}
        self._quarantined: dict[int, int] = {}
        self._runs: dict[int, int] = {}
        """First slot of a run -> its length; slots that stand alone are left out."""
        self._epoch = 0

    @property
    def slots(self) -> int:
        return int(self.memory.shape[0])

    @property
    def epoch(self) -> int:
        """Number of grants so far; each ticket carries the epoch of its own."""
        return self._epoch

    def grant(self, count: int, owner: int, *, run: int = 1) -> tuple[tuple[int, ...], int]:
        """Up to `count` slots for ticket `owner`, lowest first so that runs stay together, and
        the new epoch. Raises NoSlotsError where some are asked and none is free.

        `run` > 1: each is the first of so many neighbours, which belong to it until its release.
        """
        with self._lock:
            slots = self._take(count, owner, run)
            if count and not slots:
                raise NoSlotsError(
                    f"all {self.slots} landing slots are taken "
                    f"({len(self._quarantined)} in quarantine)",
                    retry_after_s=0.1,
                )
            self._epoch += 1
            return slots, self._epoch

    def top_up(self, count: int, owner: int, *, run: int = 1) -> tuple[int, ...]:
        """Up to `count` further slots under the ticket's epoch; may be none."""
        with self._lock:
            return self._take(count, owner, run)

    def _take(self, count: int, owner: int, run: int) -> tuple[int, ...]:
        if run == 1:
            firsts = sorted(self._free)[: max(0, count)]
        else:
            # At multiples of their length, so that runs of one length leave no gaps between them.
            end = self.first_slot + self.slots
            aligned = range(self.first_slot, end - run + 1, run)
            free = (first for first in aligned if self._free.issuperset(range(first, first + run)))
            firsts = list(islice(free, max(0, count)))
            self._runs.update(dict.fromkeys(firsts, run))
        slots = self._with_neighbours(firsts)
        self._free.difference_update(slots)
        self._granted.update(dict.fromkeys(slots, owner))
        return tuple(firsts)

    def _with_neighbours(self, firsts: Iterable[int]) -> set[int]:
        return {slot for first in firsts for slot in range(first, first + self._runs.get(first, 1))}

    def release(self, slots: set[int], owner: int) -> None:
        """Gives granted or quarantined slots of `owner` back.

        Raises ValueError for a slot that is not the owner's: giving back twice would hand one slot
        to two writers.
        """
        with self._lock:
            every = self._with_neighbours(slots)
            self._check(every, owner)
            for slot in every:
                self._granted.pop(slot, None)
                self._quarantined.pop(slot, None)
                self._runs.pop(slot, None)
            self._free.update(every)
        for slot in every:
            self.huge_pages.used(slot - self.first_slot)

    def quarantine(self, slots: set[int], owner: int) -> None:
        """Keeps granted slots of `owner` from everybody until `release`."""
        with self._lock:
            every = self._with_neighbours(slots)
            self._check(every, owner)
            for slot in every:
                self._granted.pop(slot, None)
                self._quarantined[slot] = owner

    def _check(self, slots: set[int], owner: int) -> None:
        for slot in slots:
            holder = self._granted.get(slot, self._quarantined.get(slot))
            if holder != owner:
                raise ValueError(f"landing slot {slot} belongs to {holder}, not to ticket {owner}")

    def counts(self) -> SlotCounts:
        with self._lock:
            return SlotCounts(
                free=len(self._free),
                granted=len(self._granted),
                quarantined=len(self._quarantined),
                total=self.slots,
            )

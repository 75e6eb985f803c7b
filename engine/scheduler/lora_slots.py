"""How many adapters' weights are in use at once (scheduling.md section 2, `max_loras_per_batch`).

A request that is computed needs its adapter's weights beside the model's; the weights lie in a
fixed number of slots. A slot is in use while any request of its adapter is computed: from its
admission to its end, its retraction, or its handover to another worker.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.errors import EngineError
from engine.memory.audit import MemoryInvariantError
from engine.scheduler.req import Req


class LoraSlotError(EngineError):
    """A slot was taken where none is free: the caller did not ask first."""


@dataclass(frozen=True, slots=True)
class LoraSlotCounts:
    """Slots by state."""

    free: int
    in_use: int
    total: int


class LoraSlots:
    """`size` slots; requests of the base model need none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slot_of: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._free = list(range(size - 1, -1, -1))

    def has_room_for(self, lora_id: str, promised: Collection[str] = ()) -> bool:
        """Whether adapters in use, `promised` ones and this one fit together."""
        if not lora_id or lora_id in self._slot_of:
            return True
        return len({*self._slot_of, *promised, lora_id} - {""}) <= self.size

    def acquire(self, req: Req) -> None:
        """For a request that is about to be computed. Raises `LoraSlotError`."""
        lora_id = req.lora_id
        if not lora_id or req.lora_slot is not None:
            return
        if lora_id not in self._slot_of:
            if not self._free:
                raise LoraSlotError(
                    f"request {req.rid}: no slot for adapter {lora_id!r}, all {self.size} are used"
                )
            self._slot_of[lora_id] = self._free.pop()
            self._users[lora_id] = 0
        self._users[lora_id] += 1
        req.lora_slot = self._slot_of[lora_id]

    def try_acquire(self, req: Req) -> bool:
        """Takes the slot if there is one."""
        if not self.has_room_for(req.lora_id):
            return False
        self.acquire(req)
        return True

    def release(self, req: Req) -> None:
        """For a request that is not computed any more; one that holds none is left alone."""
        if req.lora_slot is None:
            return
        req.lora_slot = None
        self._users[req.lora_id] -= 1
        if self._users[req.lora_id] == 0:
            del self._users[req.lora_id]
            self._free.append(self._slot_of.pop(req.lora_id))

    def counts(self) -> LoraSlotCounts:
        return LoraSlotCounts(free=len(self._free), in_use=len(self._slot_of), total=self.size)

    def check(self, holders: Iterable[Req]) -> None:
        """Recounts from `holders`, all live requests. Raises `MemoryInvariantError`."""
        users: dict[str, int] = {}
        slots: dict[str, int] = {}
        for req in holders:
            if req.lora_slot is None:
                continue
            users[req.lora_id] = users.get(req.lora_id, 0) + 1
            if slots.setdefault(req.lora_id, req.lora_slot) != req.lora_slot:
                raise MemoryInvariantError(f"adapter {req.lora_id!r} is in two slots")
        counts = self.counts()
        distinct = len({*self._free, *slots.values()})
        if (
            users != self._users
            or slots != self._slot_of
            or counts.free + counts.in_use != self.size
            or distinct != self.size
        ):
            raise MemoryInvariantError(
                f"LoRA slots do not balance: {counts}; users {self._users}, counted {users}"
            )

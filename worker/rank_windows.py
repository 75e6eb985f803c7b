"""The landing windows of one rank beside those of the leading one.

Peers count a slot once for all ranks, so a rank's windows have as many slots as the leading one's,
with the same numbers; a further window is made when the leading rank makes its own, and none is
ever given up (kvtransfer/windows.py).
"""

import torch

from kvtransfer.errors import TransportError
from kvtransfer.windows import MakeMemory


class RankWindows:
    """By their first slots. A window is opened by one thread; of those that are, any may ask."""

    def __init__(self, slots: int, make: MakeMemory) -> None:
        """`slots` of each. `make`: the memory of the n-th, from 0; what it does not find room for
        raises torch's error, or TransportUnavailableError where a driver's memory is meant."""
        self.slots = slots
        self._make = make
        self._memory: dict[int, torch.Tensor] = {}

    def open(self, first_slot: int) -> torch.Tensor:
        """[slots, bytes] uint8 of the window that begins there; made if it is new. Raises
        TransportError where there can be none."""
        memory = self._memory.get(first_slot)
        if memory is not None:
            return memory
        number, rest = divmod(first_slot, max(1, self.slots))
        memory = None if rest or not self.slots else self._make(number)
        if memory is None:
            raise TransportError(f"this rank has no landing window of slots {first_slot} and on")
        self._memory[first_slot] = memory
        return memory

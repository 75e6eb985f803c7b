"""The request-to-token table: where on the device each request's tokens lie."""

from collections.abc import Iterable

import torch

from engine.errors import EngineError
from engine.execution.device import moved


class RowAllocationError(EngineError):
    """A row was freed twice, or does not exist: the owner's bookkeeping is broken."""


class ReqToTokenPool:
    """`size` rows of `max_context_len` token slots.

    The table is what attention kernels read; the host keeps every request's pages itself
    (`Req.pages`) and never reads the table back, which would wait for the device.
    """

    def __init__(self, size: int, max_context_len: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.max_context_len = max_context_len
        self.device = torch.device(device)
        self.req_to_token = torch.zeros(
            (size, max_context_len), dtype=torch.int32, device=self.device
        )
        """[size, max_context_len] int32: token slot (page * page_size + offset) of a position."""
        self._free_rows = list(range(size - 1, -1, -1))
        self._is_free = [True] * size

    def available_size(self) -> int:
        """Free rows."""
        return len(self._free_rows)

    def free_list(self) -> list[int]:
        """Every free row, in no order (for the audit)."""
        return list(self._free_rows)

    def alloc(self, n: int) -> list[int] | None:
        """`n` rows, or None and nothing taken where fewer are free."""
        if n > len(self._free_rows):
            return None
        rows = [self._free_rows.pop() for _ in range(n)]
        for row in rows:
            self._is_free[row] = False
        return rows

    def free(self, rows: Iterable[int]) -> None:
        """Takes rows back. Raises `RowAllocationError` for one that is free or does not exist."""
        for row in rows:
            if row < 0 or row >= self.size or self._is_free[row]:
                raise RowAllocationError(f"row {row} of {self.size} is not in use")
            self._is_free[row] = True
            self._free_rows.append(row)

    def write(self, row: int, start: int, slots: torch.Tensor) -> None:
        """Token slots `slots` ([n], any integer dtype, on the host) of positions `start ..`,
        behind the steps that were launched before; does not wait for them."""
        end = start + slots.numel()
        self.req_to_token[row, start:end] = moved(slots.to(torch.int32), self.device)

    def write_each(self, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """One slot a row, as a decode step needs; all [b] int64 on the table's device."""
        self.req_to_token[rows, positions] = slots.to(torch.int32)


def page_slots(pages: list[int], page_size: int, start: int, end: int) -> torch.Tensor:
    """Token slots of positions `start .. end - 1` of a request that owns `pages`; [n] int64 on
    the host. Raises `RowAllocationError` where the pages do not reach that far.
    """
    first_page, last_page = start // page_size, -(-end // page_size)
    if last_page > len(pages):
        raise RowAllocationError(f"{len(pages)} pages of {page_size} tokens do not reach {end}")
    heads = torch.tensor(pages[first_page:last_page], dtype=torch.int64) * page_size
    slots = (heads[:, None] + torch.arange(page_size)).flatten()
    return slots[start - first_page * page_size : end - first_page * page_size]

"""Memory as NIXL takes it: one row (address, bytes, device) for each page or slot."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def region(memory: torch.Tensor) -> tuple[str, npt.NDArray[np.uint64]]:
    """(NIXL's memory type, one descriptor a page) of [count, page_bytes] uint8."""
    if memory.dim() != 2 or not memory.is_contiguous() or memory.dtype != torch.uint8:
        raise ValueError("NIXL needs contiguous [count, page_bytes] uint8 memory")
    device = memory.device.index or 0
    kind = "VRAM" if memory.device.type == "cuda" else "DRAM"
    return kind, rows(memory.data_ptr(), memory.shape[1], device, memory.shape[0])


def claim(memory: torch.Tensor) -> list[object]:
    """A landing window as its offer names it."""
    kind, rows = region(memory)
    address, size, device = (int(x) for x in rows[0])
    return [kind, address, size, device, len(rows)]


def rows(
    address: int, size: int, device: int, count: int, *, length: int = 0
) -> npt.NDArray[np.uint64]:
    """A descriptor at each multiple of `size`, of `length` bytes (0: of `size`)."""
    rows = np.empty((count, 3), dtype=np.uint64)
    rows[:, 0] = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(size)
    rows[:, 1] = length or size
    rows[:, 2] = device
    return rows


def part_of(rows: npt.NDArray[np.uint64], part: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """The bytes `first .. end - 1` of each row's block."""
    first, end = part
    parts = rows.copy()
    parts[:, 0] += np.uint64(first)
    parts[:, 1] = end - first
    return parts


def within(indices: npt.NDArray[np.integer[Any]], count: int) -> bool:
    return bool(indices.size) and int(indices.min()) >= 0 and int(indices.max()) < count

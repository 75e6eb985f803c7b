"""A landing window becomes huge pages where it was used, keeps its bytes, takes no more memory."""

import os
from pathlib import Path

import pytest
import torch

from kvtransfer.huge_pages import HUGE_BYTES, HugePages
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.window import LandingWindow

SLOT = HUGE_BYTES // 4


def window(memory: SharedMemory, slots: int) -> torch.Tensor:
    return memory.tensor(slots, SLOT)


def taken(memory: SharedMemory) -> int:
    """Bytes of memory behind it."""
    return os.fstat(memory.fd).st_blocks * 512


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes that this process maps so."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{tensor.data_ptr():x}-"))
    [line] = [line for line in lines[start : start + 25] if line.startswith("ShmemPmdMapped")]
    return int(line.split()[1]) << 10


@pytest.fixture
def shared() -> SharedMemory:
    memory = SharedMemory.create(4 * HUGE_BYTES)
    probe = HugePages(window(memory, 16))
    window(memory, 16)[12:] = 1
    probe.used(15)
    probe.wait()
    if not probe.collapsed:
        pytest.skip("this kernel makes no huge pages of shared memory (MADV_COLLAPSE, Linux 6.1)")
    return memory


def test_what_was_used_becomes_huge_and_what_was_not_takes_no_memory(shared: SharedMemory) -> None:
    tensor = window(shared, 16)
    books = LandingWindow(tensor, first_slot=100)
    before = taken(shared), in_huge_pages(tensor)
    slots, _ = books.grant(5, 1)
    noise = torch.randint(0, 256, (4, SLOT), dtype=torch.uint8)
    tensor[:4] = noise
    books.release(set(slots), 1)
    books.huge_pages.wait()
    assert in_huge_pages(tensor) == before[1] + HUGE_BYTES
    assert taken(shared) == before[0] + HUGE_BYTES  # the fifth slot was granted, never written
    assert torch.equal(tensor[:4], noise)


def test_what_is_written_while_pages_are_put_together_stays(shared: SharedMemory) -> None:
    tensor = window(shared, 16)
    tensor[:12] = 3
    huge = HugePages(tensor)
    for slot in range(12):
        huge.used(slot)
    for value in range(50):
        tensor[:12] = value
        assert bool((tensor[:12] == value).all())
    huge.wait()
    assert huge.collapsed == 3


def test_memory_smaller_than_a_huge_page_starts_no_thread() -> None:
    huge = HugePages(torch.zeros((4, 1024), dtype=torch.uint8))
    huge.used(0)
    huge.wait()
    assert huge.collapsed == 0

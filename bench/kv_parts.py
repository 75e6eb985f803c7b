"""What the parts of a handover cost by themselves, in one process on two GPUs: page copies by the
copy engines, digests, both at once, the check, and the host's share of each.

    python bench/kv_parts.py
"""

import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from handover_sides import layout_of, random_memory  # noqa: E402

from kvtransfer.digest import copy_and_digest, digest_pages, start_digests  # noqa: E402
from kvtransfer.peer_copy import PeerCopier  # noqa: E402
from kvtransfer.pool_sealer import PoolSealer  # noqa: E402

SIZES = (32 << 20, 256 << 20, 1 << 30)
ROUNDS, WARM_UP = 9, 3


def measure(what: str, size: int, work: Callable[[], object], wait: Callable[[], object]) -> None:
    """`work` starts something, `wait` returns when it is done."""
    started, done = [], []
    for _ in range(ROUNDS + WARM_UP):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        started.append(time.perf_counter() - begin)
        wait()
        done.append(time.perf_counter() - begin)
    host, wall = median(started[WARM_UP:]), median(done[WARM_UP:])
    print(
        f"| {what} | {size >> 20} | {1e3 * host:.3f} | {1e3 * wall:.3f} "
        f"| {size / wall / 1e9:.0f} |",
        flush=True,
    )


def microseconds(what: str, work: Callable[[], object], rounds: int = 200) -> None:
    for _ in range(20):
        work()
    begin = time.perf_counter()
    for _ in range(rounds):
        work()
    print(f"{what}: {1e6 * (time.perf_counter() - begin) / rounds:.0f} us", flush=True)


def main() -> None:
    here, there = torch.device("cuda:0"), torch.device("cuda:1")
    torch.cuda.set_device(here)
    source = random_memory(SIZES[-1], here)
    target = torch.empty_like(source, device=there)
    target.copy_(source)  # makes torch join the two GPUs
    print("| what | MiB | host ms | wall ms | GB/s |\n|---|---|---|---|---|")
    for size in SIZES:
        into, out = target[:size], source[:size]
        measure(
            "plain copy",
            size,
            lambda into=into, out=out: into.copy_(out, non_blocking=True),  # type: ignore[misc]
            torch.cuda.synchronize,
        )
    for page_size in (64, 16):
        for size in SIZES:
            pages(source, target, page_size, size)
    event = threading.Event()
    microseconds("a wait of 20 us", lambda: event.wait(20e-6))


def pages(source: torch.Tensor, target: torch.Tensor, page_size: int, size: int) -> None:
    layout = layout_of(page_size)
    pool = source.view(-1, layout.page_bytes)
    count = size // layout.page_bytes
    order = list(range(count))
    random.Random(1).shuffle(order)
    valid = [page_size] * count
    places = [
        (page, target.data_ptr() + slot * layout.page_bytes) for slot, page in enumerate(order)
    ]
    copier, sealer, landing = PeerCopier(pool), PoolSealer(pool, layout), torch.empty_like(pool)
    title = f"{layout.page_bytes >> 20} MiB pages"
    pending: list[object] = []

    def copy() -> None:
        pending[:] = [copier.start(places)]

    def both() -> None:
        copy()
        sealer.start(order, valid)

    measure(f"copy engine, {title}, none neighbours", size, copy, torch.cuda.synchronize)
    measure(
        f"digest, {title}",
        size,
        lambda: start_digests(pool, order, valid, layout),
        torch.cuda.synchronize,
    )
    measure(f"both, {title}", size, both, torch.cuda.synchronize)
    measure(
        f"seal and wait, {title}",
        size,
        lambda: digest_pages(pool, order, valid, layout),
        lambda: None,
    )
    measure(
        f"copy out and check, {title}",
        size,
        lambda: copy_and_digest(pool, order, landing, order, valid, layout),
        lambda: None,
    )


if __name__ == "__main__":
    main()

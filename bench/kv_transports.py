"""GB/s of whole pages through NIXL between two processes, beside a plain copy and the digest; and
the milliseconds of their last two layers alone, which are left when the others have left before.

python bench/kv_transports.py                          # CPU: two processes, host memory
python bench/kv_transports.py --source cuda:0 --target cuda:1
"""

import argparse
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.execution.model_runner import LAST_LAYERS
from kvtransfer.digest import copy_and_digest, digest_pages
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import MessageArrived, WriteDone, WriteFailed

ROUNDS = 7


def memory(slots: int, page_bytes: int, device: str) -> torch.Tensor:
    """Random bytes, since zeros flatter."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(
        0, 256, (slots, page_bytes), dtype=torch.uint8, device=device, generator=generator
    )


def receive(pipe: Connection, slots: int, page_bytes: int, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    landing = memory(slots, page_bytes, device)
    transport = NixlTransport(instance_id="target", pool=None, landing=landing)
    pipe.send(transport.local_offer())
    transport.connect("source", pipe.recv())
    while not pipe.poll():
        for event in transport.poll():
            if isinstance(event, MessageArrived):
                pipe.send(time.monotonic())
    transport.close()


def write_once(transport: NixlTransport, pages: int, part: tuple[int, int] | None = None) -> float:
    begin = time.monotonic()
    transport.write("target", [(i, i) for i in range(pages)], b"done", part=part)
    while True:
        for event in transport.poll():
            if isinstance(event, WriteFailed):
                raise SystemExit(event.reason)
            if isinstance(event, WriteDone):
                return time.monotonic() - begin


def seconds(device: str, work: object) -> float:
    """Best of ROUNDS; waits for the device."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.monotonic()
        work()  # type: ignore[operator]
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.monotonic() - begin)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="cpu")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--page-mib", type=float, default=0.0, help="default 8 on CUDA, 1 on a CPU")
    parser.add_argument("--pages", default="4,32,128")
    arguments = parser.parse_args()
    on_cuda = arguments.source.startswith("cuda")
    mib = arguments.page_mib or (8 if on_cuda else 1)
    layout = PageLayout(
        layers=32 if on_cuda else 16,
        page_size=64,
        kv_heads=8,
        head_dim=round(mib * 2**20) // ((32 if on_cuda else 16) * 2 * 64 * 8 * 2),
        itemsize=2,
    )
    counts = [int(n) for n in arguments.pages.split(",")]
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(
        target=receive, args=(other, max(counts), layout.page_bytes, arguments.target), daemon=True
    )
    process.start()
    if on_cuda:
        torch.cuda.set_device(arguments.source)
    pool = memory(max(counts), layout.page_bytes, arguments.source)
    transport = NixlTransport(instance_id="source", pool=pool, landing=None)
    offer = pipe.recv()
    pipe.send(transport.local_offer())
    transport.connect("target", offer)
    print(f"pages of {layout.page_bytes / 2**20:.2f} MiB, {arguments.source} to {arguments.target}")
    print(
        "| pages | MiB | NIXL GB/s | plain copy GB/s | digest GB/s | copy + digest GB/s "
        "| NIXL ms | first layers ms | last layers ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    early = (layout.layers - LAST_LAYERS) * 2 * layout.row_bytes
    for count in counts:
        write_once(transport, count)
        nixl = min(write_once(transport, count) for _ in range(ROUNDS))
        pages, valid = list(range(count)), [layout.page_size] * count
        landed = memory(count, layout.page_bytes, arguments.target)
        copy = seconds(arguments.target, lambda n=count, t=landed: t.copy_(pool[:n]))
        digest = seconds(
            arguments.source, lambda p=pages, v=valid: digest_pages(pool, p, v, layout).cpu()
        )
        second = torch.empty_like(landed)
        both = seconds(
            arguments.target,
            lambda p=pages, v=valid, a=landed, b=second: copy_and_digest(
                a, p, b, p, v, layout
            ).cpu(),
        )
        parts = [
            min(write_once(transport, count, part) for _ in range(ROUNDS))
            for part in ((0, early), (early, layout.page_bytes))
        ]
        total = count * layout.page_bytes / 1e9
        figures = " | ".join(f"{total / t:.1f}" for t in (nixl, copy, digest, both))
        figures += "".join(f" | {1e3 * t:.2f}" for t in (nixl, *parts))
        print(f"| {count} | {total * 1e9 / 2**20:.0f} | {figures} |", flush=True)
    pipe.send("stop")
    process.join(10)
    transport.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

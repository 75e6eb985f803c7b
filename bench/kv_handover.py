"""A handover's speed: pages of an 8B Llama from a prefill pool into a decode pool, in one run.

Two processes with the transfer's real parts between them: sealed pages are pushed, written into
landing slots, copied out and checked there (the agents of kvtransfer; no model computes). Beside
that, with the same bytes: a plain copy between the two memories, NIXL with blocks as scattered as
per-layer pools make them, and NIXL's best single block.

    python bench/kv_handover.py                                # two GPUs (one, if there is one)
    python bench/kv_handover.py --device cpu                   # host memory: NIXL, gRPC, memcpy
    python bench/kv_handover.py --json out.json --plot out.svg
    python bench/kv_handover.py --timeline --transports cuda_ipc   # where one handover's time goes
"""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from handover_sides import (  # noqa: E402
    MEMORY,
    Reader,
    Run,
    Writer,
    layout_of,
    random_memory,
    synchronize,
)

from kvtransfer.nixl_transport import unavailable_reason  # noqa: E402
from kvtransfer.transport import WriteDone, WriteFailed  # noqa: E402

TOKENS = (256, 2048, 8192, 32768)
SCATTERED_BYTES = 64 << 10
"""K and V of one layer of 16 tokens: what a block of a per-layer pool holds."""
MAX_SCATTERED = 16_384
"""Descriptors of one scattered write; more would take seconds to post."""
ROUNDS, WARM_UP = 9, 3


@dataclass
class Row:
    """One line of the table."""

    what: str
    page: int
    tokens: int
    mib: float
    gbps: float
    """Bytes by the time from the first push until the last page was checked."""
    best_gbps: float
    wire_ms: float = 0.0
    """Until the last page had landed."""
    after_ms: float = 0.0
    """From then until it was copied out and checked."""
    seal_ms: float = 0.0
    """Sealing all pages, before the first push."""


def row(what: str, page: int, tokens: int, size: int, seconds: list[float]) -> Row:
    middle, best = statistics.median(seconds), min(seconds)
    return Row(what, page, tokens, size / 2**20, size / middle / 1e9, size / best / 1e9)


def measure_handover(
    writer: Writer, name: str, page: int, tokens: int, rounds: int, *, timeline: bool
) -> Row:
    """Through the agents, seals and digests on (unless the name says plain)."""
    runs = [writer.hand_over(name, page, tokens) for _ in range(rounds + WARM_UP)][WARM_UP:]
    if timeline:
        usual = sorted(runs, key=lambda run: run.total_s)[len(runs) // 2]
        print_timeline(f"{name}, {tokens} tokens, page {page}", usual)
    size = layout_of(page).pages_of(tokens) * layout_of(page).page_bytes
    result = row(name, page, tokens, size, [run.total_s for run in runs])
    result.wire_ms = 1e3 * statistics.median(run.wire_s for run in runs)
    result.after_ms = 1e3 * statistics.median(run.total_s - run.wire_s for run in runs)
    result.seal_ms = 1e3 * statistics.median(run.seal_s for run in runs)
    return result


def print_timeline(what: str, run: Run) -> None:
    """When each run of pages passed each point, in ms since the push."""
    moments: dict[str, list[float]] = {}
    for event, at in sorted(run.marks, key=lambda mark: mark[1]):
        moments.setdefault(event, []).append(1e3 * at)
    print(what, f"{1e3 * run.total_s:.2f} ms:")
    for event, times in moments.items():
        print(f"  {event:8s}", " ".join(f"{at:.2f}" for at in times), flush=True)


def timed(work: Callable[[], None], device: torch.device, rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds + WARM_UP):
        begin = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:]


def plain_copies(source: torch.Tensor, device: torch.device, rounds: int) -> list[Row]:
    """torch's copy, as fast as it goes: between two GPUs the copy engines'. On a CPU also the C
    library's, which large copies take past the caches."""
    target = random_memory(source.numel(), device)
    rows = []
    for tokens in TOKENS:
        size = tokens * MEMORY.token_bytes
        if size > source.numel():
            continue
        flat, into = source.view(-1)[:size], target.view(-1)[:size]

        def copy(flat: torch.Tensor = flat, into: torch.Tensor = into) -> None:
            into.copy_(flat, non_blocking=True)
            synchronize(source.device)

        rows.append(row("plain copy", 0, tokens, size, timed(copy, device, rounds)))
        if device.type == "cpu":
            move = partial(ctypes.memmove, into.data_ptr(), flat.data_ptr(), size)
            rows.append(row("libc memcpy", 0, tokens, size, timed(move, device, rounds)))
    return rows


def nixl_blocks(writer: Writer, block: int, counts: list[int], what: str, rounds: int) -> list[Row]:
    """Raw NIXL writes of `counts` blocks each, in an order of the source that merges nothing."""
    transport, peer = writer.raw_nixl(block)
    rows = []
    for count in counts:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
        copies = list(zip(order, range(count), strict=True))

        def write(copies: list[tuple[int, int]] = copies) -> None:
            transport.write(peer, copies, b"")
            while not any(map(_is_done, transport.poll())):
                pass

        seconds = timed(write, torch.device("cpu"), min(rounds, 5))
        size = count * block
        rows.append(row(what, block, size // MEMORY.token_bytes, size, seconds))
    writer.end_raw_nixl()
    return rows


def _is_done(event: object) -> bool:
    if isinstance(event, WriteFailed):
        raise SystemExit(event.reason)
    return isinstance(event, WriteDone)


def table(rows: list[Row], *, heading: bool = True) -> None:
    if heading:
        print(
            "| what | page | tokens | MiB | GB/s | best | wire ms | check after ms | % | seal ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        after = f"{r.after_ms:.3f} | {100 * r.after_ms / r.wire_ms:.1f}" if r.wire_ms else " | "
        print(
            f"| {r.what} | {r.page or ''} | {r.tokens} | {r.mib:.1f} | {r.gbps:.1f} "
            f"| {r.best_gbps:.1f} | {r.wire_ms:.3f} | {after} | {r.seal_ms:.3f} |",
            flush=True,
        )


def aims(rows: list[Row], *, on_gpu: bool) -> list[str]:
    """Each aim of the handover with what was measured."""

    def rate(what: str, tokens: int, page: int = 0) -> float:
        found = [r.gbps for r in rows if (r.what, r.tokens, r.page) == (what, tokens, page)]
        return found[0] if found else 0.0

    lines = []
    block = max((r.gbps for r in rows if r.what == "nixl one block"), default=0.0)
    for page in MEMORY.page_sizes:
        for tokens in [t for t in TOKENS if t >= 2048 and rate("plain copy", t)]:
            copy = rate("plain copy", tokens)
            if on_gpu and rate("cuda_ipc", tokens, page):
                share = 100 * rate("cuda_ipc", tokens, page) / copy
                lines.append(
                    f"cuda_ipc, {tokens} tokens, page {page}: {share:.0f} % of a copy (90)"
                )
            if on_gpu and block and rate("nixl", tokens, page):
                share = 100 * rate("nixl", tokens, page) / block
                lines.append(f"nixl, {tokens} tokens, page {page}: {share:.0f} % of one block (95)")
            libc = rate("libc memcpy", tokens)
            for name, aim in (
                ("nixl plain", " (75)"),
                ("nixl", ""),
                ("grpc plain", ""),
                ("grpc", ""),
            ):
                if not on_gpu and rate(name, tokens, page):
                    share, of_libc = (100 * rate(name, tokens, page) / r for r in (copy, libc))
                    lines.append(
                        f"{name}, {tokens} tokens, page {page}: {share:.0f} % of a copy{aim}, "
                        f"{of_libc:.0f} % of libc's"
                    )
    return lines


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key in dict.fromkeys((r.what, r.page if r.wire_ms else 0) for r in rows):
        line = [r for r in rows if (r.what, r.page if r.wire_ms else 0) == key]
        label = f"{key[0]}, {key[1]}-token pages" if key[1] else key[0]
        axes.plot([r.tokens for r in line], [r.gbps for r in line], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--transports", default="", help="default: all that work here")
    parser.add_argument("--max-tokens", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--timeline", action="store_true", help="of the usual handover, by run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count() if arguments.device == "auto" else 0
    source = torch.device("cuda", 0) if gpus else torch.device("cpu")
    target = torch.device("cuda", min(1, gpus - 1)) if gpus else torch.device("cpu")
    most = arguments.max_tokens or (32768 if gpus else 2048)
    names = arguments.transports.split(",") if arguments.transports else default_names(bool(gpus))
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    process = context.Process(target=read, args=(there, str(target), most), daemon=True)
    process.start()
    if gpus:
        torch.cuda.set_device(source)
    print(f"{source} to {target}: " + (torch.cuda.get_device_name(0) if gpus else "host memory"))
    memory = random_memory(most * MEMORY.token_bytes, source)
    writer = Writer(pipe, memory)
    rows = plain_copies(memory, target, arguments.rounds)
    for name in names:
        for page in MEMORY.page_sizes:
            for tokens in [t for t in TOKENS if t <= most]:
                rows.append(
                    measure_handover(
                        *(writer, name, page, tokens, arguments.rounds), timeline=arguments.timeline
                    )
                )
                table(rows[-1:], heading=False)
    if not unavailable_reason():
        blocks = [
            size for size in (32 << 20, 256 << 20, 1 << 30, 4 << 30) if size <= memory.numel()
        ]
        for size in blocks:
            rows += nixl_blocks(writer, size, [1], "nixl one block", arguments.rounds)
        counts = [t * MEMORY.token_bytes // SCATTERED_BYTES for t in TOKENS if t <= most]
        counts = [count for count in counts if count <= MAX_SCATTERED]
        rows += nixl_blocks(writer, SCATTERED_BYTES, counts, "nixl scattered", arguments.rounds)
    writer.end()
    process.join(20)
    print()
    table(rows)
    lines = aims(rows, on_gpu=bool(gpus))
    print("\n".join(lines), flush=True)
    if arguments.json:
        results: dict[str, Any] = {"rows": [vars(r) for r in rows], "aims": lines}
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


def default_names(on_gpu: bool) -> list[str]:
    nixl = [] if unavailable_reason() else ["nixl", "nixl plain"]
    return [
        *(["cuda_ipc", "cuda_ipc plain"] if on_gpu else []),
        *nixl,
        *([] if on_gpu else ["grpc", "grpc plain"]),
    ]


def read(pipe: Connection, device: str, tokens: int) -> None:
    Reader(pipe, torch.device(device), tokens).serve()


if __name__ == "__main__":
    sys.exit(main())

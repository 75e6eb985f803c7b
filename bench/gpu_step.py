"""A decode step's graph by itself, and where the offline workload's time goes.

    python bench/gpu_step.py                    # an H200, 8B-Llama shape, half a minute
    python bench/gpu_step.py --offline          # and as long again

1. The whole step at a context of 1,024, replayed without a scheduler: kernels one after the other
   and products by the library; kernels that begin before their predecessor has ended; products as
   measured at a start.
2. The mixed workload, its seconds by kind of step and by requests in it.
"""

import argparse
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B, Requests
from bench.gpu_scheduler import offline
from engine.execution import decode_graphs
from engine.execution.attention import GraphableAttention
from engine.execution.decode_graphs import DecodeGraphs
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.models import few_rows, float32_residual, rotary_store, single_row
from engine.models.dependent_launch import dependent_launch
from engine.parallel.group import ALONE

LAUNCHING = (few_rows, float32_residual, rotary_store, single_row)
EDGES = (16, 32, 64, 128, 256, 512)


def overlap_kernels(on: bool) -> None:
    way = dependent_launch if on else lambda device: {"PDL": False, "launch_pdl": False}
    for module in LAUNCHING:
        module.dependent_launch = way  # type: ignore[attr-defined]


def step_ms(runner: ModelRunner, batch: int, *, choose: bool) -> tuple[float, list[str]]:
    """A captured step's milliseconds, and which products were chosen for it."""
    lines: list[str] = []
    assert isinstance(runner.attention, GraphableAttention)
    if not choose:
        runner.decoder.choose_products = lambda *_: []  # type: ignore[method-assign]
    try:
        graphs = DecodeGraphs(
            runner.decoder,
            runner.kv_pool,
            runner.attention,
            max_batch=batch,
            progress=lines.append,
        )
    finally:
        vars(runner.decoder).pop("choose_products", None)
    requests = Requests(runner.kv_pool, [1024] * batch, 1100, LLAMA_8B.vocab_size)
    with torch.no_grad():
        graphs.forward_logits(requests.decode())
    graph = graphs._graphs[batch]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    graphs.release()
    chosen = [line.rpartition(": ")[2] for line in lines if line.startswith("products")]
    return min(times), chosen


def show_steps(runner: ModelRunner, batches: list[int]) -> None:
    whole_ladder = decode_graphs.ladder
    decode_graphs.ladder = lambda largest: [largest]  # type: ignore[assignment]
    print("\n1. a step at context 1,024, ms")
    print("   batch  one by one  overlapping  products as measured")
    for batch in batches:
        overlap_kernels(False)
        plain, _ = step_ms(runner, batch, choose=False)
        overlap_kernels(True)
        overlapping, _ = step_ms(runner, batch, choose=False)
        begin = time.perf_counter()
        best, names = step_ms(runner, batch, choose=True)
        took = time.perf_counter() - begin
        print(
            f"   {batch:5}  {plain:10.3f}  {overlapping:11.3f}  {best:8.3f}  "
            f"{', '.join(names)} ({took:.1f} s)",
            flush=True,
        )
    decode_graphs.ladder = whole_ladder


def show_offline(runner: ModelRunner, rows: int) -> None:
    """Wall time from one launch to the next, by what was launched."""
    marks: list[tuple[float, str]] = []
    forward = runner.forward

    def noted(batch: Any) -> Any:
        requests, tokens = len(batch.seq_lens_cpu), sum(batch.extend_lens)
        label = f"{batch.forward_mode.name} of {'8,192' if tokens == 8192 else 'fewer'} tokens"
        if batch.forward_mode.is_decode():
            label = f"DECODE up to {next(edge for edge in EDGES if requests <= edge)}"
        marks.append((time.perf_counter(), label))
        return forward(batch)

    runner.forward = noted  # type: ignore[method-assign]
    got = offline(runner, runner.kv_pool.page_size, 512, rows, 1.0, True, False)
    runner.forward = forward  # type: ignore[method-assign]
    marks.append((time.perf_counter(), "end"))
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for (begin, label), (end, _) in pairwise(marks):
        seconds[label] += end - begin
        count[label] += 1
    print(f"\n2. offline, {got['seconds']:.2f} s, {got['steps']} steps")
    for label in sorted(seconds, key=lambda name: -seconds[name]):
        each = seconds[label] / count[label] * 1e3
        print(f"   {label:24} {seconds[label]:6.2f} s  {count[label]:5} x {each:7.2f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--offline", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    runner = load_model_runner(
        LLAMA_8B,
        model_path="",
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        page_size=64,
        max_total_tokens=690_000,
        load_format="dummy",
    )
    runner.kv_pool.data.normal_()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {runner.attention.name}")
    batches = [int(batch) for batch in arguments.batches.split(",") if batch]
    with torch.no_grad():
        show_steps(runner, batches)
    if arguments.offline:
        rows = 512
        runner.capture(rows, ALONE, lambda line: print(f"   {line}", file=sys.stderr))
        show_offline(runner, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

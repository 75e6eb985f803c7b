"""The products of a decode step, one by one, beside the time that reading their weights takes.

    python bench/gpu_products.py                      # an H200, 8B-Llama shapes, half a minute

At few rows a product only reads its weight once, so bytes over the memory's rate is its floor. Each
is captured as a graph that goes through several weights in turn, so that no cache helps; the
library's choice (cuBLAS), cuBLASLt's, and Baton's kernel for one row and for batches of any size in
deterministic mode.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import functional

from engine.models.invariant_ops import invariant_linear
from engine.models.single_row import single_row_linear

# (name, rows of the weight, its columns, how often a step has it)
SHAPES = [
    ("qkv", 6144, 4096, 32),
    ("o", 4096, 4096, 32),
    ("gate_up", 28672, 4096, 32),
    ("down", 4096, 14336, 32),
    ("vocabulary", 128256, 4096, 1),
]
TOUCHED_BYTES = 400 << 20
"""Weights in rotation are this large together, several times the cache."""


def time_us(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Of one product, the mean over a graph of them, the best of nine replays."""
    for weight in weights:
        run(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(9):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(weights))
    return min(times)


def read_rate() -> float:
    """GB/s of reading device memory."""
    data = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").view(torch.float32)
    took_us = time_us(lambda tensor: tensor.sum(), [data])
    return data.nbytes / took_us / 1e3


def products(rows: int, weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], object]]:
    x = torch.randn(rows, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "library": lambda w: functional.linear(x, w),
        "float32 out": lambda w: torch.mm(x, w.t(), out_dtype=torch.float32),
        "invariant": lambda w: invariant_linear(x, w, None),
    }
    if rows == 1:
        ways["one row"] = lambda w: single_row_linear(x, w, None)
    return ways


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: reads {rate:.0f} GB/s")
    print("   us: rows  product        floor   library  cublaslt  float32  invariant  one row")
    figures: dict[str, dict[str, float]] = {}
    for rows in arguments.rows:
        step: dict[str, float] = {}
        for name, out, depth, times in SHAPES:
            count = max(1, TOUCHED_BYTES // (out * depth * 2))
            weights = [
                torch.randn(out, depth, device="cuda", dtype=torch.bfloat16) for _ in range(count)
            ]
            found = {"floor": weights[0].nbytes / rate / 1e3}
            for way, run in products(rows, weights[0]).items():
                found[way] = time_us(run, weights)
                if way == "library":
                    torch.backends.cuda.preferred_blas_library("cublaslt")
                    found["cublaslt"] = time_us(run, weights)
                    torch.backends.cuda.preferred_blas_library("default")
            figures[f"{name}_{rows}"] = found
            for way, us in found.items():
                step[way] = step.get(way, 0.0) + us * times
            row = [
                found.get(way)
                for way in ("floor", "library", "cublaslt", "float32 out", "invariant", "one row")
            ]
            cells = "  ".join(f"{us:8.1f}" if us is not None else "       -" for us in row)
            print(f"       {rows:5}  {name:11} {cells}", flush=True)
        cells = ", ".join(f"{way} {us / 1e3:.2f}" for way, us in step.items() if way != "one row")
        print(f"       {rows:5}  a step's, ms: {cells}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

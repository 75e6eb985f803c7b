"""One engine with its scheduler on one GPU, without services: where do a decode step's
milliseconds go, and how long does the mixed workload take?

    python bench/gpu_scheduler.py                        # an H200, 8B-Llama shape, minutes
    python bench/gpu_scheduler.py --device cpu --tiny    # the same in miniature, seconds

1. Decode at a context of 1,024 with overlap off and on: time between steps, and, from a profiler's
   trace, the share of it in which the GPU does nothing, with the kernels that take the rest.
2. Prefill (`--prefill`): tokens per second in chunks of 8,192.
3. 512 requests of the mixed workload, all waiting from the start (offline).
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B, TINY, prefill_rate
from bench.idle_figure import Trace, draw
from bench.workloads import mix
from engine.execution.device import resolve_device, resolve_dtype
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.pools import make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId

PROFILED_STEPS = 24

PAUSE_US = 3.0
"""Kernels of one captured graph follow each other within about a microsecond."""


def scheduler_of(
    runner: ModelRunner, page_size: int, overlap: bool, rows: int, **settings: Any
) -> Scheduler:
    pool, config = runner.kv_pool, runner.model_config
    memory = make_memory_pools(
        num_pages=pool.num_pages,
        page_size=page_size,
        num_rows=rows,
        max_context_len=config.context_length,
        device=str(pool.device),
        enable_radix_cache=False,
    )
    return Scheduler(
        SchedulerConfig(
            page_size=page_size,
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            max_running_requests=rows,
            enable_overlap=overlap,
            **settings,
        ),
        runner,
        memory,
        device=pool.device,
    )


def request(name: str, prompt: int, output: int, vocab: int, rng: random.Random) -> Req:
    params = SamplingParams(max_new_tokens=output, temperature=0.0, ignore_eos=True)
    return Req(RequestId(name), [rng.randrange(vocab) for _ in range(prompt)], params)


# ---- 1. decode -----------------------------------------------------------------------------------


def decode(
    runner: ModelRunner, page_size: int, batch: int, context: int, overlap: bool
) -> dict[str, Any]:
    scheduler = scheduler_of(runner, page_size, overlap, batch)
    rng = random.Random(batch)
    vocab = runner.model_config.vocab_size
    for index in range(batch):
        scheduler.add_request(request(f"r{index}", context, 4 * PROFILED_STEPS + 60, vocab, rng))
    while sum(1 for _ in scheduler.running_requests()) < batch:
        scheduler.step()
    for _ in range(16):
        scheduler.step()
    times = []
    for _ in range(2 * PROFILED_STEPS):
        begin = time.perf_counter()
        scheduler.step()
        times.append((time.perf_counter() - begin) * 1e3)
    result: dict[str, Any] = {
        "itl_ms": statistics.median(times),
        "p90_ms": sorted(times)[int(0.9 * len(times))],
    }
    if runner.kv_pool.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED_STEPS):
                scheduler.step()
            torch.cuda.synchronize()
        result |= idle_share(profile)
    for index in range(batch):
        scheduler.abort_request(RequestId(f"r{index}"))
    while scheduler.has_work():
        scheduler.step()
    scheduler.check_invariant()
    return result


def idle_share(profile: Any) -> dict[str, Any]:
    """From the trace: GPU time covered by kernels and copies between the first and the last, the
    pauses (between steps: longer than a captured graph ever leaves between two of its kernels),
    what stands before and behind them, and the kernels that took most, microseconds a step."""
    spans: list[tuple[float, float, str]] = []
    by_name: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    pauses: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if str(event.device_type).endswith("CUDA"):
            start, end = event.time_range.start, event.time_range.end
            spans.append((start, end, event.name))
            by_name[event.name] += end - start
            count[event.name] += 1
    if not spans:
        return {}
    spans.sort()
    covered, between, reached, last = 0.0, 0.0, spans[0][0], ""
    for start, end, name in spans:
        covered += max(0.0, end - max(start, reached))
        if start - reached > PAUSE_US:
            between += start - reached
            pauses[f"{last[:50]} -> {name[:50]}"] += start - reached
        if end > reached:
            reached, last = end, name
    whole = reached - spans[0][0]
    top = sorted(by_name.items(), key=lambda item: -item[1])
    return {
        "gpu_idle": 1 - covered / whole,
        "idle_between_steps": between / whole,
        "kernels_a_step": len(spans) / PROFILED_STEPS,
        "busy_us_a_step": covered / PROFILED_STEPS,
        "step_us": whole / PROFILED_STEPS,
        "spans": [span[:2] for span in spans[: 5 * len(spans) // PROFILED_STEPS]],
        "pauses": [
            (round(us / PROFILED_STEPS, 1), between)
            for between, us in sorted(pauses.items(), key=lambda item: -item[1])[:8]
        ],
        "kernels": [
            (round(us / PROFILED_STEPS, 1), round(count[name] / PROFILED_STEPS, 1), name[:90])
            for name, us in top[:16]
        ],
    }


# ---- 2. offline ----------------------------------------------------------------------------------


def offline(
    runner: ModelRunner,
    page_size: int,
    requests: int,
    rows: int,
    scale: float,
    overlap: bool,
    mixed: bool,
    chunk: int = 8192,
) -> dict[str, float]:
    lengths, outputs = mix(requests)
    rng = random.Random(0)
    vocab = runner.model_config.vocab_size
    scheduler = scheduler_of(
        *(runner, page_size, overlap, rows),
        enable_mixed_chunk=mixed,
        chunked_prefill_size=chunk,
        max_prefill_tokens=max(chunk, 16384),
    )
    reqs = [
        request(f"o{i}", max(1, int(n * scale)), max(1, int(m * scale)), vocab, rng)
        for i, (n, m) in enumerate(zip(lengths, outputs, strict=True))
    ]
    begin = time.perf_counter()
    for req in reqs:
        scheduler.add_request(req)
    done = 0
    produced = 0
    steps = 0
    while scheduler.has_work():
        result = scheduler.step()
        produced += len(result.outputs)
        done += len(result.released)
        steps += 1
        if steps % 200 == 0:
            print(f"   {done} of {requests} done", end="\r", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begin
    scheduler.check_invariant()
    if produced != sum(len(req.output_ids) for req in reqs) or done != requests:
        raise SystemExit(f"{done} of {requests} requests ended, {produced} tokens came")
    return {
        "seconds": seconds,
        "tokens_out": produced,
        "steps": steps,
        "retractions": scheduler.num_retractions,
    }


def show_decode(
    runner: ModelRunner,
    arguments: argparse.Namespace,
    page_size: int,
    batches: list[int],
    context: int,
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    traces: list[Trace] = []
    print(f"\n1. decode, context {context}")
    print("   batch  overlap  ITL ms  p90 ms  GPU idle  between steps  kernels  busy us")
    listed = {int(batch) for batch in arguments.kernels.split(",") if batch}
    for batch in batches:
        for mode in arguments.overlap.split(","):
            got = decode(runner, page_size, batch, context, mode == "on")
            figures[f"decode_{batch}_{mode}"] = got
            spans = got.pop("spans", None)
            if spans and mode == "on":
                shares = got["gpu_idle"], got["idle_between_steps"]
                traces.append(Trace(batch, spans, got["step_us"], *shares))
            idle, pauses = got.get("gpu_idle", math.nan), got.get("idle_between_steps", math.nan)
            kernels, busy = got.get("kernels_a_step", math.nan), got.get("busy_us_a_step", math.nan)
            print(
                f"   {batch:5}  {mode:7}  {got['itl_ms']:6.2f}  {got['p90_ms']:6.2f}  {idle:8.1%}  "
                f"{pauses:13.1%}  {kernels:7.0f}  {busy:7.0f}",
                flush=True,
            )
            if batch in listed and mode == "on":
                for us, calls, kernel in got.get("kernels", []):
                    print(f"            {us:8.1f} us  {calls:6.1f} x  {kernel}")
                for us, kernels in got.get("pauses", []):
                    print(f"            {us:8.1f} us  pause    {kernels}")
    if arguments.figure and traces:
        shown = [trace for trace in traces if trace.batch in (1, 64, 256)] or traces
        draw(shown, arguments.figure, "Decode steps on the GPU, overlap on, context 1,024")
    return figures


def show_prefill(runner: ModelRunner, tiny: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    print("\n2. prefill in chunks of 8,192")
    for count, length in ((2, 128), (4, 64)) if tiny else ((16, 4096), (64, 1024)):
        with torch.no_grad():
            rate = prefill_rate(runner, count, length, 8192)
        figures[f"prefill_{count}x{length}"] = rate
        print(f"   {count:3} x {length:5}: {rate:9.0f} tok/s", flush=True)
    return figures


def show_offline(
    runner: ModelRunner,
    tiny: bool,
    page_size: int,
    rows: int,
    mixes: tuple[bool, ...],
    chunks: list[int],
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    requests, scale = (24, 0.05) if tiny else (512, 1.0)
    print(f"\n3. {requests} requests of the mixed workload, offline, at most {rows} at once")
    print("   chunk  mixed  seconds  tokens out  steps  retractions")
    for mixed, chunk in product(mixes, chunks):
        got = offline(runner, page_size, requests, rows, scale, True, mixed, chunk)
        figures[f"offline_{'mixed' if mixed else 'plain'}_{chunk}"] = got
        print(
            f"   {chunk:5}  {'yes' if mixed else 'no':5}  {got['seconds']:7.2f}  "
            f"{got['tokens_out']:10.0f}  {got['steps']:5.0f}  {got['retractions']:11.0f}",
            flush=True,
        )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--rows", type=int, default=512, help="requests that run at once, offline")
    parser.add_argument("--overlap", default="off,on")
    parser.add_argument("--no-offline", action="store_true")
    parser.add_argument("--kernels", default="1,64", help="batches whose kernels are listed")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8_e4m3"), default="auto")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--no-mixed", action="store_true", help="offline: without mixed chunks only"
    )
    parser.add_argument("--chunks", default="8192", help="offline: most tokens of a prompt's step")
    parser.add_argument("--prefill", action="store_true", help="also 16 x 4,096 and 64 x 1,024")
    parser.add_argument("--figure", type=Path, help="SVG of the GPU's idle time, with a trace")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype("auto", device)
    model = TINY.model if arguments.tiny else LLAMA_8B
    page_size = 16 if arguments.tiny else arguments.page_size
    batches = [1, 4] if arguments.tiny else [int(b) for b in arguments.batches.split(",") if b]
    context = 64 if arguments.tiny else 1024
    rows = max(batches) if arguments.tiny else max([arguments.rows, *batches])
    begin = time.perf_counter()
    runner = load_model_runner(
        model,
        model_path="",
        device=device,
        dtype=dtype,
        page_size=page_size,
        max_total_tokens=8192 if arguments.tiny else 690_000,
        load_format="dummy",
        graphs_up_to=0 if arguments.no_graphs else rows,
        kv_cache_dtype=arguments.kv_cache_dtype,
        deterministic=arguments.deterministic,
        progress=lambda line: print(f"   {line}", file=sys.stderr),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}, attention {runner.attention.name}")
    figures: dict[str, Any] = {}
    print(f"start: {time.perf_counter() - begin:.1f} s, {runner.kv_pool.num_pages} pages")
    if batches:
        figures |= show_decode(runner, arguments, page_size, batches, context)
    if arguments.prefill:
        figures |= show_prefill(runner, arguments.tiny)
    if not arguments.no_offline:
        mixes = (False,) if arguments.no_mixed else (False, True)
        chunks = [int(chunk) for chunk in arguments.chunks.split(",")]
        figures |= show_offline(runner, arguments.tiny, page_size, rows, mixes, chunks)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

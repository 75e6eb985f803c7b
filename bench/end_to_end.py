"""TTFT, ITL and handover through the whole path: client, router, prefill, KV transfer, decode.

Starts `baton up` with random weights and asks over gRPC: first one request at a time (what an idle
system needs for prompts of several lengths), then Poisson arrivals of the mixed workload
(workloads.py). Random weights give random tokens; the timing does not care.

    python bench/end_to_end.py --shape tiny                        # a laptop's CPU, NIXL and gRPC
    python bench/end_to_end.py --shape 8b --rates 5,10,20          # GPUs; one or two, as visible
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from workloads import poisson, tokens  # noqa: E402

from baton import AsyncClient  # noqa: E402
from baton.random_model import Shape, write_model_shell  # noqa: E402
from worker.handover_trace import phases_ms, read_trace  # noqa: E402

SHAPES = {
    "tiny": Shape(),
    "8b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        vocab_size=128256,
    ),
}
LENGTHS = {"tiny": [64, 512, 2048], "8b": [256, 2048, 8000]}
REPEATS = 5
NEW_TOKENS = 32
TTFT_LIMIT_MS = 500.0
BEFORE_FIRST_TOKEN = ("admission", "reserve", "queue", "prefill", "network")
"""Phases of a report."""


@dataclass
class Sample:
    """One request as its client saw it; seconds of time.perf_counter()."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    phases_ms: dict[str, float] = field(default_factory=dict)
    kv_bytes: int = 0
    transport: str = ""
    error: str = ""

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals[0] - self.sent) * 1e3

    @property
    def itl_ms(self) -> list[float]:
        return list(np.diff(self.arrivals) * 1e3)


async def ask(client: AsyncClient, prompt: list[int], new: int) -> Sample:
    sample = Sample(time.perf_counter())
    try:
        async with client.generate(
            prompt, max_tokens=new, temperature=0, ignore_eos=True, timeout=120
        ) as stream:
            async for chunk in stream:
                sample.arrivals += [time.perf_counter()] * len(chunk.tokens)
                if chunk.report is not None:
                    sample.phases_ms = chunk.report.phases_ms
                    sample.kv_bytes = chunk.report.kv_bytes
                    sample.transport = chunk.report.transport
    except Exception as error:  # a benchmark counts failures, it does not stop at one
        sample.error = f"{type(error).__name__}: {error}"
    return sample


def start(model: Path, flags: list[str], log: Path) -> tuple[subprocess.Popen[str], str]:
    """`baton up`, ready; its process and the router's gRPC address."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", "up", "--model", str(model), "--load-format", "dummy",
             "--http-port", "0", "--grpc-port", "0", *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        )  # fmt: skip
    line = process.stdout.readline() if process.stdout is not None else ""
    found = re.search(r"grpc://(\S+)", line)
    if found is None:
        raise SystemExit(f"baton up did not start:\n{log.read_text()[-3000:]}")
    print(line.strip(), flush=True)
    return process, found.group(1)


async def one_at_a_time(address: str, lengths: list[int], vocab: int) -> list[dict[str, Any]]:
    rows = []
    async with AsyncClient(address) as client:
        for length in lengths:
            prompts = [
                [t % (vocab - 10) + 5 for t in p]
                for p in tokens([length] * (REPEATS + 2), seed=length)
            ]
            samples = [await ask(client, prompt, NEW_TOKENS) for prompt in prompts][2:]
            good = [s for s in samples if not s.error]
            if not good:
                raise SystemExit(f"no request of {length} tokens succeeded: {samples[0].error}")
            row: dict[str, Any] = {
                "prompt": length,
                "transport": good[0].transport,
                "kv_MiB": good[0].kv_bytes / 2**20,
                "ttft_ms": median(s.ttft_ms for s in good),
                "itl_ms": median(i for s in good for i in s.itl_ms[1:]),
            }
            names = ("admission", "reserve", "queue", "prefill", "network", "handover", "verify",
                     "transfer_tail", "join", "first_decode_step", "handover_network")  # fmt: skip
            row |= {name: median(s.phases_ms[name] for s in good) for name in names}
            rows.append(row)
    return rows


async def arrivals(address: str, rate: float, duration: float, vocab: int) -> dict[str, Any]:
    plan = poisson(rate, duration)
    # Other tokens at each rate: the same ones would be hits in the prefix caches.
    drawn = tokens([length for _, length, _ in plan], seed=1 + round(rate * 1000))
    prompts = [[t % (vocab - 10) + 5 for t in p] for p in drawn]
    async with AsyncClient(address) as client:
        begin = time.perf_counter()
        tasks = []
        for (at, _, out), prompt in zip(plan, prompts, strict=True):
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, prompt, out)))
        samples = await asyncio.gather(*tasks)
    good = [s for s in samples if not s.error]
    itl = [i for s in good for i in s.itl_ms]
    handover = [s.itl_ms[0] for s in good if len(s.arrivals) > 1]
    means = [float(np.mean(s.itl_ms)) if len(s.arrivals) > 1 else 0.0 for s in good]
    tails = [float(np.percentile(s.itl_ms, 99)) if len(s.arrivals) > 1 else 0.0 for s in good]
    prompt = [s.ttft_ms <= TTFT_LIMIT_MS for s in good]
    late = [
        f"{at:.2f} s: {length} tokens, {s.ttft_ms:.0f} ms ({longest_phase(s.phases_ms)})"
        for (at, length, _), s in zip(plan, samples, strict=True)
        if not s.error and s.ttft_ms > TTFT_LIMIT_MS
    ]
    if late:
        print(f"first tokens later than {TTFT_LIMIT_MS:.0f} ms, by arrival: " + "; ".join(late))
    return {
        "rate": rate,
        "requests": len(samples),
        "errors": len(samples) - len(good),
        **percentiles("ttft", [s.ttft_ms for s in good], (50, 90)),
        **percentiles("itl", itl, (50, 90, 99)),
        **percentiles("handover", handover, (50, 90)),
        # Shares of all requests: TTFT within 500 ms and, in turn, mean and own p99 of ITL.
        "mean_25": share(zip(prompt, means, strict=True), 25, len(samples)),
        "mean_12": share(zip(prompt, means, strict=True), 12, len(samples)),
        "p99_25": share(zip(prompt, tails, strict=True), 25, len(samples)),
    }


def longest_phase(phases_ms: dict[str, float]) -> str:
    """What a first token waited for most."""
    name = max(BEFORE_FIRST_TOKEN, key=lambda phase: phases_ms.get(phase, 0.0))
    return f"{name} {phases_ms.get(name, 0.0):.0f}"


def handover_phases(trace: Path, since: int) -> tuple[list[dict[str, Any]], int]:
    """p50 and p90 in ms of what the engines wrote down after the first `since` requests, and how
    many there are now. `gap`: from the end of prefill's last step to the launch of decode's first;
    the phases before it sum up to it."""
    requests = list(read_trace(trace).values()) if trace.exists() else []
    phases = [found for events in requests[since:] if (found := phases_ms(events))]
    rows = [
        {"handover": f"p{p}", "requests": len(phases)}
        | {name: float(np.percentile([each[name] for each in phases], p)) for name in phases[0]}
        for p in ((50, 90) if phases else ())
    ]
    return rows, len(requests)


def share(requests: Iterable[tuple[bool, float]], limit_ms: float, count: int) -> float:
    return 100 * sum(prompt and value <= limit_ms for prompt, value in requests) / max(1, count)


def percentiles(name: str, values: list[float], points: tuple[int, ...]) -> dict[str, float]:
    return {f"{name}_p{p}": float(np.percentile(values, p)) if values else 0.0 for p in points}


def median(values: Any) -> float:
    return float(np.median(list(values)))


def table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rates", default="", help="requests a second, comma separated")
    parser.add_argument("--duration", type=float, default=15.0, help="seconds a rate")
    parser.add_argument("--transports", default="nixl,grpc")
    parser.add_argument("--lengths", default="", help="prompts one at a time, comma separated")
    parser.add_argument("--flags", default="", help="further flags of `baton up`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    lengths = [int(n) for n in arguments.lengths.split(",") if n] or LENGTHS[arguments.shape]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / arguments.shape
        write_model_shell(model, shape)
        for transport in arguments.transports.split(","):
            trace = Path(directory) / f"{transport}.trace"
            flags = ["--transport", transport, "--handover-trace", str(trace)]
            flags += arguments.flags.split()
            process, address = start(model, flags, Path(directory) / f"{transport}.log")
            try:
                idle = asyncio.run(one_at_a_time(address, lengths, shape.vocab_size))
                table(idle)
                alone, seen = handover_phases(trace, 0)
                table(alone)
                loaded, under_load = [], []
                for rate in filter(None, arguments.rates.split(",")):
                    row = asyncio.run(
                        arrivals(address, float(rate), arguments.duration, shape.vocab_size)
                    )
                    loaded.append(row)
                    rows, seen = handover_phases(trace, seen)
                    under_load += rows
                table(loaded)
                table(under_load)
                results[transport] = {
                    "one_at_a_time": idle,
                    "handover_alone": alone,
                    "poisson": loaded,
                    "handover_under_load": under_load,
                }
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=60)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

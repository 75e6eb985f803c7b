"""What first tokens wait for at a prefill worker that does nothing but prompts, at a steady rate.

The arrivals of end_to_end.py against a queue, without an engine: prompts in order, up to a chunk's
tokens a step. A first token that is late here is late by the load, whatever the rest of the path is
worth.

    python bench/prefill_queue.py --rates 30,36 --tokens-per-s 40000
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from workloads import poisson  # noqa: E402

CHUNK_TOKENS = 8192
LATE_MS = 500.0


def waits_ms(
    plan: list[tuple[float, int, int]], *, tokens_per_s: float, step_s: float
) -> list[float]:
    """From each arrival to the end of the step that computes its prompt's last token."""
    left = [tokens for _, tokens, _ in plan]
    ends = [0.0] * len(plan)
    now, first = 0.0, 0
    while first < len(plan):
        now = max(now, plan[first][0])
        room, at = CHUNK_TOKENS, first
        while at < len(plan) and plan[at][0] <= now and room:
            taken = min(left[at], room)
            left[at] -= taken
            room -= taken
            at += 1
        now += (CHUNK_TOKENS - room) / tokens_per_s + step_s
        while first < len(plan) and not left[first]:
            ends[first] = now
            first += 1
    return [1e3 * (end - arrival) for end, (arrival, _, _) in zip(ends, plan, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="30,36", help="requests a second, comma separated")
    parser.add_argument("--duration", type=float, default=12.0, help="seconds a rate")
    parser.add_argument("--tokens-per-s", type=float, default=40_000)
    parser.add_argument("--step-ms", type=float, default=4.0, help="a step's own time")
    arguments = parser.parse_args()
    for rate in map(float, arguments.rates.split(",")):
        plan = poisson(rate, arguments.duration)
        waits = waits_ms(plan, tokens_per_s=arguments.tokens_per_s, step_s=arguments.step_ms / 1e3)
        p50, p90 = np.percentile(waits, (50, 90))
        late = [
            f"{arrival:.2f} s: {tokens} tokens, {wait:.0f} ms"
            for (arrival, tokens, _), wait in zip(plan, waits, strict=True)
            if wait > LATE_MS
        ]
        offered = sum(tokens for _, tokens, _ in plan) / arguments.duration
        print(f"{rate:g} /s, {len(plan)} requests, {offered:.0f} tokens/s offered:")
        print(f"  wait p50 / p90 {p50:.0f} / {p90:.0f} ms; {len(late)} late: " + "; ".join(late))


if __name__ == "__main__":
    main()

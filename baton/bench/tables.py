"""The figures of a run, for people and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from baton.bench.figures import Figures, Slo, Spread
from baton.bench.sample import Sample
from baton.bench.settings import BenchConfig

LATENCIES = (
    ("TTFT (ms)", "ttft_ms"),
    ("ITL (ms)", "itl_ms"),
    ("TPOT (ms)", "tpot_ms"),
    ("handover (ms)", "handover_ms"),
    ("whole request (ms)", "e2e_ms"),
)


def latency_table(figures: Figures) -> Table:
    """Time to first token, inter-token latency and so on, by percentile."""
    table = Table()
    table.add_column("latency")
    for heading in ("mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for label, name in LATENCIES:
        table.add_row(label, *_cells(getattr(figures, name)))
    return table


def totals_table(figures: Figures) -> Table:
    """Counts, throughput, goodput, errors."""
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("requests sent", f"{figures.sent}")
    table.add_row("  failed", f"{figures.failed}", style="bold red" if figures.failed else "")
    for kind, count in figures.errors.items():
        table.add_row(f"    {kind}", f"{count}")
    table.add_row("duration (s)", f"{figures.span_s:.1f}")
    table.add_row("requests/s", f"{figures.requests_per_s:.2f}")
    table.add_row("input tokens/s", f"{figures.input_tokens_per_s:,.0f}")
    table.add_row("output tokens/s", f"{figures.output_tokens_per_s:,.0f}")
    if figures.slo.stated:
        table.add_row("SLO", slo_text(figures.slo))
        table.add_row("  within it", f"{figures.good} ({figures.good_share:.1%})")
        table.add_row("  goodput (requests/s)", f"{figures.goodput_per_s:.2f}", style="bold")
    if figures.transports:
        moved = ", ".join(f"{name} {count}" for name, count in figures.transports.items())
        table.add_row("KV moved by", moved)
        table.add_row("KV moved (MiB)", f"{figures.kv_bytes / 2**20:,.1f}")
    return table


def slo_text(slo: Slo) -> str:
    """'TTFT ≤ 500 ms, mean ITL ≤ 25 ms'."""
    bounds = (
        ("TTFT", slo.ttft_ms),
        ("mean ITL", slo.itl_ms),
        ("p99 ITL", slo.p99_itl_ms),
    )
    return ", ".join(f"{name} ≤ {bound:g} ms" for name, bound in bounds if bound)


def write_json(
    path: Path, *, config: BenchConfig, model: str, figures: Figures, samples: Sequence[Sample]
) -> None:
    """Settings, figures and every request; null stands for a figure without a value.

    Raises:
        OSError: the file cannot be written.
    """
    document = {
        "settings": dataclasses.asdict(config) | {"model": model},
        "figures": dataclasses.asdict(figures),
        "requests": [dataclasses.asdict(sample) for sample in samples],
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["–"] * 4
    return [f"{value:.2f}" for value in (spread.mean, spread.p50, spread.p90, spread.p99)]

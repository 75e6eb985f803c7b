"""Draws a run. matplotlib is an extra: only those who ask for a plot need it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baton.bench.figures import Slo
from baton.bench.sample import Sample
from baton.config import SettingsError


def check_matplotlib() -> None:
    """Raises SettingsError, naming the extra, where matplotlib is missing: before the run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "plot: matplotlib is not installed; it comes with the extra `bench`: "
            "pip install 'baton-serve[bench]'"
        ) from error


def draw(path: Path, samples: Sequence[Sample], *, slo: Slo, title: str) -> None:
    """TTFT, ITL and handover as cumulative distributions, and output tokens over time.

    Raises:
        OSError: the file cannot be written.
    """
    # The object interface: pyplot keeps state and looks for a display.
    from matplotlib.figure import Figure

    fine = [sample for sample in samples if not sample.error]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title)
    _distribution(axes[0][0], "TTFT", [s.ttft_ms for s in fine], slo.ttft_ms)
    _distribution(axes[0][1], "ITL", [gap for s in fine for gap in s.itl_ms], 0.0)
    handovers = [gap for s in fine if (gap := s.handover_ms) is not None]
    _distribution(axes[1][0], "handover", handovers, 0.0)
    _throughput(axes[1][1], [at for s in samples for at in s.arrivals_s])
    figure.savefig(path)


def _distribution(axes: Any, name: str, values: list[float], bound: float) -> None:
    axes.set_xlabel(f"{name} (ms)")
    axes.set_ylabel("share")
    axes.set_ylim(0, 1)
    axes.grid(visible=True, alpha=0.3)
    if not values:
        axes.set_title("no values")
        return
    ordered = np.sort(values)
    axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post")
    if ordered[0] > 0:
        axes.set_xscale("log")
    if bound:
        axes.axvline(bound, linestyle="--", color="tab:red", label=f"SLO {bound:g} ms")
        axes.legend()


def _throughput(axes: Any, arrivals: list[float]) -> None:
    axes.set_xlabel("time (s)")
    axes.set_ylabel("output tokens/s")
    axes.grid(visible=True, alpha=0.3)
    if not arrivals:
        axes.set_title("no values")
        return
    width = max(0.1, max(arrivals) / 60)
    edges = np.arange(0.0, max(arrivals) + 2 * width, width)
    counts, _ = np.histogram(arrivals, bins=edges)
    axes.stairs(counts / width, edges, fill=True)

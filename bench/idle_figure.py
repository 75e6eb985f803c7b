"""Draws what a GPU did over a few decode steps: an SVG, written by hand, as no plotting library is
needed for rectangles."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH, LEFT, ROW, BAR = 1100, 90, 74, 26


class Trace(NamedTuple):
    """Of one batch size."""

    batch: int
    spans: Sequence[tuple[float, float]]
    """(start, end) of each kernel and copy, microseconds, ascending."""
    step_us: float
    idle: float
    """Share of time in which nothing runs."""
    between: float
    """Share in pauses longer than a captured graph leaves between its kernels."""


def draw(traces: Sequence[Trace], path: Path, title: str, *, steps: int = 3) -> None:
    height = ROW * len(traces) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for row, trace in enumerate(traces):
        top = 44 + row * ROW
        first = trace.spans[0][0]
        scale = (WIDTH - LEFT - 20) / (steps * trace.step_us)
        parts.append(f'<text x="8" y="{top + 17}">batch {trace.batch}</text>')
        parts.append(
            f'<text x="{LEFT}" y="{top + BAR + 16}" fill="#555">{steps} steps of '
            f"{trace.step_us / 1e3:.2f} ms; idle {trace.idle:.1%}, of it between steps "
            f"{trace.between:.1%}</text>"
        )
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 20}" height="{BAR}" fill="#d33"/>'
        )
        for start, end in _merged(trace.spans, first + steps * trace.step_us):
            x, width = LEFT + (start - first) * scale, (end - start) * scale
            parts.append(
                f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{BAR}" fill="#369"/>'
            )
    parts.append(
        f'<text x="{LEFT}" y="{height - 8}" fill="#555">blue: a kernel or copy runs; red: the GPU '
        "is idle for more than 1.5 microseconds</text></svg>"
    )
    path.write_text("\n".join(parts) + "\n")


def _merged(
    spans: Sequence[tuple[float, float]], until: float, gap_us: float = 1.5
) -> list[tuple[float, float]]:
    """What cannot be told apart in the drawing, as one."""
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if start >= until:
            break
        end = min(end, until)
        if merged and start - merged[-1][1] <= gap_us:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged

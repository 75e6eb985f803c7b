"""How long a GPU takes for something that is captured as a graph later on."""

from collections.abc import Callable
from typing import Any

import torch

_REPLAYS = 4


def replay_us(step: Callable[[], object], device: torch.device) -> float:
    """Microseconds of a replay of `step`, which was run before and has allocated and built what it
    needs; the best of a few."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on calling CUDA (see decode_graphs.capture).
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    events: Any = torch.cuda.Event  # untyped in torch
    begin, end = events(enable_timing=True), events(enable_timing=True)
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    graph.reset()
    return min(times)


def measured_with(device: torch.device, dtype: torch.dtype) -> str:
    """What the fastest kernel depends on beside the shape of its work."""
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {dtype}"

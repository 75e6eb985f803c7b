"""How long a GPU takes for something that is captured as a graph later on."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROUNDS = 6


def replay_us(steps: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """`run_us` of each of `steps` as a captured graph."""
    graphs = {name: _captured(step, device) for name, step in steps.items()}
    found = run_us({name: graph.replay for name, graph in graphs.items()}, device)
    for graph in graphs.values():
        graph.reset()
    return found


def run_us(steps: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The device's microseconds for each of `steps`, which allocates and builds what it needs when
    it is run. They run in turns, so that a clock that rises or falls meanwhile does so for all; the
    median of some rounds."""
    for step in steps.values():
        step()
    events: Any = torch.cuda.Event  # untyped in torch
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            begin, end = events(enable_timing=True), events(enable_timing=True)
            begin.record()
            step()
            end.record()
            spans[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {
        name: statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in ran)
        for name, ran in spans.items()
    }


def _captured(step: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on calling CUDA (see decode_graphs.capture).
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph


def measured_with(device: torch.device, dtype: torch.dtype) -> str:
    """What the fastest kernel depends on beside the shape of its work."""
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {dtype}"

"""`baton warmup`: builds every kernel that a worker of these settings will need, and ends.

For images and volumes: a worker that finds them in its cache is ready minutes earlier.
"""

import dataclasses
import sys

from engine.errors import EngineError
from engine.parallel.group import ALONE
from worker.config import WorkerConfig
from worker.kv_traffic import KvTraffic
from worker.rank_model import load_rank_model, rank_device

_GRAPH_BATCH = 64
"""Captured on the way, which builds what decode needs; larger batches need nothing else."""

_TOKENS = 4096


def run(config: WorkerConfig) -> int:
    """Random weights do: kernels depend on shapes alone. The exit status."""
    small = dataclasses.replace(
        config,
        load_format="dummy",
        max_total_tokens=_TOKENS,
        cuda_graph_max_batch=min(config.cuda_graph_max_batch, _GRAPH_BATCH),
        tensor_parallel_size=1,
    )
    try:
        device = rank_device(small, 0)
        if device.type != "cuda":
            print("nothing to build: kernels are built for GPUs, and this worker uses the CPU")
            return 0
        load_rank_model(small, group=ALONE, device=device, traffic=KvTraffic.NONE, progress=print)
    except EngineError as error:
        print(f"baton: {error}", file=sys.stderr)
        return 1
    print(f"kernels are ready in {config.kernel_cache or 'the home directory'}")
    return 0

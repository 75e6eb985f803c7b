"""One rank's part of the model, as the worker's configuration asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.execution.device import kv_storage_dtype, resolve_device, resolve_dtype
from engine.execution.kernel_cache import use_kernel_cache
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.execution.step_memory import LargestStep
from engine.model_config import ModelConfig
from engine.models.cpu_library import cpu_arithmetic
from engine.parallel.group import TensorGroup
from engine.parallel.shards import Shards
from kvtransfer.layout import PageLayout
from worker.config import WorkerConfig
from worker.kv_traffic import KvTraffic

MAX_WINDOW_TOKENS = 32_768
"""Of a landing window whose size the operator has left open, at most. A prompt may have a quarter
of it under way, which must cover what a link carries until its credits come back, whatever a page
holds."""

MIN_WINDOW_SLOTS, POOL_TO_WINDOW = 16, 8
"""The window is this fraction of the pool; larger prompts stream through it."""


def window_slots(config: WorkerConfig, num_pages: int) -> int:
    """Slots of the landing window, the same on all ranks."""
    share = num_pages // POOL_TO_WINDOW
    return config.landing_slots or max(MIN_WINDOW_SLOTS, min(most_window_slots(config), share))


def most_window_slots(config: WorkerConfig) -> int:
    """What the window takes where the pool is large."""
    return config.landing_slots or MAX_WINDOW_TOKENS // config.page_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModel:
    """A model, or one rank's part of it, with its KV pool."""

    checkpoint: ModelConfig
    """The whole model."""
    runner: ModelRunner
    layout: PageLayout
    """Of this rank's pages."""
    dtype: torch.dtype


def largest_step(config: WorkerConfig, model: ModelConfig, traffic: KvTraffic) -> LargestStep:
    """What must fit beside the KV pool."""
    context = min(model.context_length, config.max_context_length or model.context_length)
    # A prompt that is computed whole may be as long as the context, whatever a step should hold.
    chunk = config.chunked_prefill_size or max(context, config.max_prefill_tokens)
    decoding = 0 if traffic is KvTraffic.SENDS else config.max_running_requests
    mixed = decoding if config.enable_mixed_chunk else 0
    return LargestStep(tokens=chunk + mixed, rows=config.max_running_requests)


def rank_device(config: WorkerConfig, rank: int) -> torch.device:
    """Rank after rank takes the next GPU, from `device_index` on; on a CPU they share it. Raises
    ConfigError where there are too few."""
    if config.tensor_parallel_size < 1:
        raise ConfigError(
            f"tensor_parallel_size must be at least 1, not {config.tensor_parallel_size}"
        )
    device = resolve_device(config.device, config.device_index)
    if device.type == "cuda" and rank:
        device = resolve_device("cuda", config.device_index + rank)
    return device


def arithmetic_of(config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> str:
    """What two workers must compute and store alike to go on from each other's KV. In deterministic
    mode that is every bit, which on a CPU also hangs on what its steps are compiled for."""
    mode = " deterministic" if config.deterministic else ""
    if mode and device.type == "cpu":
        mode += f" by {cpu_arithmetic(dtype)}"
    return f"{dtype} kv {kv_storage_dtype(config.kv_cache_dtype, dtype)}{mode}"


def load_rank_model(
    config: WorkerConfig,
    *,
    group: TensorGroup,
    device: torch.device,
    traffic: KvTraffic,
    progress: Callable[[str], None] = lambda line: None,
) -> RankModel:
    """Loads the weights and takes the KV pool; all ranks together. `progress` is told what takes
    its time. Raises EngineError, worded for the operator."""
    use_kernel_cache(config.kernel_cache)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.threads:
        torch.set_num_threads(max(1, config.threads // group.size))
    dtype = resolve_dtype(config.dtype, device)
    directory = Path(config.model)
    checkpoint = ModelConfig.from_directory(directory)
    shards = Shards(model=checkpoint, rank=group.rank, size=group.size)
    layout = PageLayout(
        layers=checkpoint.num_layers,
        page_size=config.page_size,
        kv_heads=len(shards.kv_heads),
        head_dim=checkpoint.head_dim,
        itemsize=kv_storage_dtype(config.kv_cache_dtype, dtype).itemsize,
    )
    graphs = min(config.cuda_graph_max_batch, config.max_running_requests)
    window_bytes = most_window_slots(config) * layout.page_bytes
    try:
        runner = load_model_runner(
            checkpoint,
            model_path=str(directory),
            device=device,
            dtype=dtype,
            page_size=config.page_size,
            max_total_tokens=config.max_total_tokens,
            mem_fraction=config.mem_fraction,
            reserved_bytes=window_bytes if traffic is KvTraffic.RECEIVES else 0,
            load_format=config.load_format,
            max_context_length=config.max_context_length,
            graphs_up_to=0 if traffic is KvTraffic.SENDS else graphs,
            group=group,
            kv_cache_dtype=config.kv_cache_dtype,
            deterministic=config.deterministic,
            largest_step=largest_step(config, checkpoint, traffic),
            progress=progress,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{device} ran out of memory while the model was loaded and its decode steps captured: "
            "lower --mem-fraction (or --max-total-tokens), --cuda-graph-max-batch, "
            "--chunked-prefill-size or --max-running-requests, or free the GPU "
            f"({str(error).splitlines()[0]})"
        ) from error
    return RankModel(checkpoint=checkpoint, runner=runner, layout=layout, dtype=dtype)

"""Which device and dtype to compute on, and how many KV pages fit there."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.types import KvCacheDtype

CONTEXT_BYTES = 3 << 29
"""What a process takes on a GPU besides torch's own memory: CUDA's context, libraries, graphs."""

SPARE_BYTES = 2 << 30
"""Left free for activations and workspaces where nobody has measured them."""

DEFAULT_CPU_TOKENS = 65_536
"""Size of a CPU's KV pool where the operator names none, in tokens."""


def resolve_device(name: Literal["auto", "cpu", "cuda"], index: int = 0) -> torch.device:
    """The torch device for a configured name. ConfigError where CUDA is asked for in vain."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch finds no usable GPU "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none'})"
        )
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ConfigError(f"device_index is {index}, but {count} GPUs are visible")
    return torch.device("cuda", index)


def to_device(
    values: Sequence[int] | Sequence[float],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """[n] on `device`, without waiting for the device: pinned memory makes the copy
    asynchronous. One value travels with the launch of the kernel that stores it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if len(values) == 1:
        return torch.full((1,), values[0], dtype=dtype, device=device)
    pinned = torch.tensor(values, dtype=dtype, pin_memory=True)
    return pinned.to(device, non_blocking=True)


def moved(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting for the device."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def resolve_dtype(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype:
    """auto: bfloat16 on CUDA; float32 on a CPU, exact against the reference."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def kv_storage_dtype(name: KvCacheDtype, dtype: torch.dtype) -> torch.dtype:
    """auto: KV is stored as it is computed, in `dtype`."""
    return torch.float8_e4m3fn if name == "fp8_e4m3" else dtype


def kv_pool_pages(
    config: ModelConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_total_tokens: int = 0,
    mem_fraction: float = 0.85,
    reserved_bytes: int = 0,
    steps_bytes: int | None = None,
) -> int:
    """Pages of the KV pool, once the weights are loaded.

    `max_total_tokens` decides where it is not 0 (rounded up to whole pages). Otherwise a CPU gets
    DEFAULT_CPU_TOKENS, and a GPU what is left of `mem_fraction` of its memory after what
    this process has taken, `reserved_bytes` more (a landing window, say) and what steps need,
    `steps_bytes` (None: not measured; SPARE_BYTES are kept of what is free).

    Raises ConfigError, naming the figures, where that is not even one page or more than is free.
    """
    if page_size < 1:
        raise ConfigError(f"page_size must be at least 1 token, not {page_size}")
    page_bytes = page_size * config.kv_elements_per_token * dtype.itemsize
    if max_total_tokens < 0:
        raise ConfigError(f"max_total_tokens must not be negative, not {max_total_tokens}")
    if max_total_tokens or device.type != "cuda":
        pages = -(-(max_total_tokens or DEFAULT_CPU_TOKENS) // page_size)
        if device.type == "cuda":
            _check_fits(pages, page_bytes, device, reserved_bytes + (steps_bytes or 0))
        return pages
    if not 0 < mem_fraction <= 1:
        raise ConfigError(f"mem_fraction must be in (0, 1], not {mem_fraction}")
    free, total = _memory(device)
    # This process's own: several workers may share a GPU, each with a fraction of its own.
    own = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    spared = SPARE_BYTES if steps_bytes is None else steps_bytes
    allowed = min(int(total * mem_fraction) - own - (steps_bytes or 0), free - spared)
    pages = (allowed - reserved_bytes) // page_bytes - 1  # the padding page
    if pages < 1:
        raise ConfigError(
            f"no memory is left for KV pages on {device}: of {_gib(total)} mem_fraction "
            f"{mem_fraction} allows {_gib(int(total * mem_fraction))}, {_gib(free)} are free, "
            f"weights and context take {_gib(own)}, the largest steps {_gib(spared)}, and "
            f"{_gib(reserved_bytes)} are reserved for the landing window; a page takes "
            f"{_gib(page_bytes)}. Raise mem_fraction, lower chunked_prefill_size, "
            "max_running_requests, cuda_graph_max_batch or landing_slots, or free the GPU"
        )
    return pages


def _check_fits(pages: int, page_bytes: int, device: torch.device, reserved_bytes: int) -> None:
    free, _ = _memory(device)
    wanted = (pages + 1) * page_bytes + reserved_bytes
    if wanted > free:
        raise ConfigError(
            f"max_total_tokens asks for {_gib(wanted)} of KV pages, but {device} has "
            f"{_gib(free)} free: lower it"
        )


def _memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes; memory that torch caches without need counts as free."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def memory_report(
    device: torch.device, *, parts: Mapping[str, int], window_bytes: int, pool_bytes: int
) -> str:
    """Where every GiB of a GPU is, or goes: `parts` names what this process has taken besides the
    pool, and what its steps will; the landing window is taken later."""
    free, total = _memory(device)
    left = free - window_bytes - parts.get("activations", 0)
    here = sum(parts.values()) + pool_bytes + window_bytes
    named = {
        **parts,
        "KV pool": pool_bytes,
        "landing window": window_bytes,
        "left free": max(left, 0),
        "context and other processes": total - here - max(left, 0),
    }
    figures = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in named.items())
    return f"memory of {device}, {_gib(total)}: {figures}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

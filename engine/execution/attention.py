"""What an attention backend must do, and which one to take."""

from typing import Literal, Protocol, runtime_checkable

import torch

from engine.errors import ConfigError
from engine.execution.compiled_attention import CompiledAttention, can_attend
from engine.execution.flashinfer_attention import FlashInferAttention
from engine.execution.forward_batch import ForwardBatch
from engine.execution.invariant_attention import MOST_QUERIES_A_KV_HEAD, InvariantAttention
from engine.execution.page_table import PageTable, TableBuffers
from engine.execution.torch_attention import TorchAttention
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.cpu_library import cpu_library
from engine.models.fused_ops import FUSED_DTYPES, flashinfer_installed
from engine.models.ops import FreshKV
from engine.models.rotary_store import triton_installed

AttentionName = Literal["auto", "torch", "flashinfer"]


class AttentionBackend(Protocol):
    """Causal attention over paged KV. Bound to one pool; used from one thread."""

    name: str

    def plan(self, batch: ForwardBatch) -> None:
        """Called once a step, before the first layer: lays out what all layers share. Reads the
        batch's host lists and page table; never waits for the device's current work."""
        ...

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        """Called once a layer, after the step's KV was written: q [t, heads, head_dim], request
        after request, any strides; returns [t, heads * head_dim]. `fresh` is what was written, for
        whom it is faster to read than the pool.

        The token at position p of a request sees that request's positions 0 to p.
        """
        ...


class GraphAttention(Protocol):
    """Decode attention for one captured batch size, whose plan lies at fixed addresses."""

    def plan(self, pages: PageTable) -> None:
        """Before each replay: `pages` lists as many requests as were captured."""
        ...

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        """As AttentionBackend.run, while the graph is captured."""
        ...


@runtime_checkable
class GraphableAttention(AttentionBackend, Protocol):
    """A backend whose decode steps can be captured."""

    def for_graph(self, buffers: TableBuffers, rows: int) -> GraphAttention: ...


def create_attention(
    config: ModelConfig,
    kv_pool: PageMajorKVPool,
    name: AttentionName = "auto",
    *,
    deterministic: bool = False,
) -> AttentionBackend:
    """FlashInfer where it is installed and can compute this model; plain torch otherwise, with a
    compiled loop for decode on a CPU where that can be had. In deterministic mode the kernel made
    for it on CUDA, and on a CPU the same as without, which then sees one token at a time.

    Raises ConfigError where FlashInfer is asked for by name and cannot be had, and where
    deterministic mode has no kernels.
    """
    obstacle = flashinfer_obstacle(config, kv_pool)
    if deterministic:
        if kv_pool.device.type != "cuda":
            return _on_torch(config, kv_pool, name)
        _check_deterministic(config, obstacle)
        return InvariantAttention(config, kv_pool)
    if name == "flashinfer" and obstacle:
        raise ConfigError(f"attention backend flashinfer cannot be used: {obstacle}")
    if name == "torch" or obstacle:
        return _on_torch(config, kv_pool, name)
    return FlashInferAttention(config, kv_pool)


def _on_torch(
    config: ModelConfig, kv_pool: PageMajorKVPool, name: AttentionName
) -> AttentionBackend:
    library = cpu_library() if name == "auto" and can_attend(config, kv_pool) else None
    if library is None:
        return TorchAttention(config, kv_pool)
    return CompiledAttention(config, kv_pool, library)


def flashinfer_obstacle(config: ModelConfig, kv_pool: PageMajorKVPool) -> str:
    """Why FlashInfer cannot compute this; empty where it can."""
    if kv_pool.device.type != "cuda":
        return f"the device is {kv_pool.device}, not a GPU"
    if not flashinfer_installed():
        return "the package flashinfer-python is not installed"
    if kv_pool.compute_dtype not in FUSED_DTYPES:
        return f"its kernels do not compute in {kv_pool.compute_dtype}"
    if config.head_dim not in (64, 128, 256):
        return f"its kernels have no head_dim of {config.head_dim}, only 64, 128 and 256"
    return ""


def _check_deterministic(config: ModelConfig, obstacle: str) -> None:
    if not obstacle and not triton_installed():
        obstacle = "the package triton is not installed"
    if not obstacle and config.num_heads // config.num_kv_heads > MOST_QUERIES_A_KV_HEAD:
        obstacle = f"more than {MOST_QUERIES_A_KV_HEAD} query heads share a KV head"
    if obstacle:
        raise ConfigError(f"deterministic mode cannot be had on this GPU: {obstacle}")

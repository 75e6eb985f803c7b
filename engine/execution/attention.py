"""What an attention backend must do, and which one to take."""

from typing import Literal, Protocol

import torch

from engine.errors import ConfigError
from engine.execution.flashinfer_attention import FlashInferAttention
from engine.execution.forward_batch import ForwardBatch
from engine.execution.torch_attention import TorchAttention
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import FUSED_DTYPES, flashinfer_installed

AttentionName = Literal["auto", "torch", "flashinfer"]


class AttentionBackend(Protocol):
    """Causal attention over paged KV. Bound to one pool; used from one thread."""

    name: str

    def plan(self, batch: ForwardBatch) -> None:
        """Called once a step, before the first layer: lays out what all layers share. Reads the
        batch's host lists and page table; never waits for the device's current work."""
        ...

    def run(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Called once a layer, after the step's KV was written: q [t, heads, head_dim], request
        after request, any strides; returns [t, heads * head_dim].

        The token at position p of a request sees that request's positions 0 to p.
        """
        ...


def create_attention(
    config: ModelConfig, kv_pool: PageMajorKVPool, name: AttentionName = "auto"
) -> AttentionBackend:
    """FlashInfer where it is installed and can compute this model, plain torch otherwise.

    Raises ConfigError where FlashInfer is asked for by name and cannot be had.
    """
    obstacle = flashinfer_obstacle(config, kv_pool)
    if name == "flashinfer" and obstacle:
        raise ConfigError(f"attention backend flashinfer cannot be used: {obstacle}")
    if name == "torch" or obstacle:
        return TorchAttention(config, kv_pool)
    return FlashInferAttention(config, kv_pool)


def flashinfer_obstacle(config: ModelConfig, kv_pool: PageMajorKVPool) -> str:
    """Why FlashInfer cannot compute this; empty where it can."""
    if kv_pool.device.type != "cuda":
        return f"the device is {kv_pool.device}, not a GPU"
    if not flashinfer_installed():
        return "the package flashinfer-python is not installed"
    if kv_pool.dtype not in FUSED_DTYPES:
        return f"its kernels do not compute in {kv_pool.dtype}"
    if config.head_dim not in (64, 128, 256):
        return f"its kernels have no head_dim of {config.head_dim}, only 64, 128 and 256"
    return ""

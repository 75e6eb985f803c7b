"""The decoder of the Llama family; Llama, Mistral, Qwen2 and Qwen3 are settings of it."""

from typing import Literal, Protocol

import torch
from torch.nn import functional

from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import FUSED_DTYPES, FusedOps, flashinfer_installed
from engine.models.loading import fill_random, load_safetensors, weight_files
from engine.models.ops import Ops, TorchOps
from engine.models.rope import cos_sin_table
from engine.models.weights import LayerWeights, ModelWeights


class Attention(Protocol):
    """What the decoder needs of an attention backend, which was planned for the step before."""

    def run(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attention of q [t, heads, head_dim] over the cached KV: [t, heads * head_dim]."""
        ...


class Decoder:
    """Token ids in, hidden states out; keys and values go to the pool.

    Not safe for use by several threads at once.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self._ops = ops
        self._num_qk_heads = config.num_heads + config.num_kv_heads

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_rows: torch.Tensor,
        kv_pool: PageMajorKVPool,
        attention: Attention,
        last_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Normalised hidden states [b, hidden] of the tokens `last_tokens` [b] (None: of all).

        `input_ids` and `positions` are [t] int64; `kv_rows` = kv_pool.rows(out_cache_loc) receives
        each token's KV before attention reads it.
        """
        ops, eps = self._ops, self.config.rms_norm_eps
        rotation = ops.rotation(positions)
        residual = functional.embedding(input_ids, self.weights.embedding)
        hidden: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            if hidden is None:
                normed = ops.rms_norm(residual, layer.input_norm, eps)
            else:
                normed, residual = ops.add_rms_norm(hidden, residual, layer.input_norm, eps)
            hidden = self._attend(index, layer, normed, rotation, kv_rows, kv_pool, attention)
            normed, residual = ops.add_rms_norm(hidden, residual, layer.post_attention_norm, eps)
            gate_up = functional.linear(normed, layer.gate_up, layer.gate_up_bias)
            hidden = functional.linear(ops.silu_and_mul(gate_up), layer.down, layer.down_bias)
        if hidden is None:
            raise ValueError("a decoder needs at least one layer")
        if last_tokens is not None:
            hidden = hidden.index_select(0, last_tokens)
            residual = residual.index_select(0, last_tokens)
        return ops.add_rms_norm(hidden, residual, self.weights.final_norm, eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, vocab] float32 for hidden states [b, hidden]."""
        return functional.linear(hidden, self.weights.output).float()

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        rotation: tuple[torch.Tensor, ...],
        kv_rows: torch.Tensor,
        kv_pool: PageMajorKVPool,
        attention: Attention,
    ) -> torch.Tensor:
        config, ops = self.config, self._ops
        qkv = functional.linear(normed, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(qkv.shape[0], -1, config.head_dim)
        qk, v = qkv[:, : self._num_qk_heads], qkv[:, self._num_qk_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = ops.qk_norm(qk, config.num_heads, layer.q_norm, layer.k_norm, config.rms_norm_eps)
        qk = ops.rotate(qk, config.num_heads, rotation)
        kv_pool.write_rows(index, kv_rows, qk[:, config.num_heads :], v)
        attended = attention.run(index, qk[:, : config.num_heads])
        return functional.linear(attended, layer.o, layer.o_bias)


def load_decoder(
    config: ModelConfig,
    *,
    model_path: str,
    device: torch.device,
    dtype: torch.dtype,
    load_format: Literal["auto", "dummy"] = "auto",
) -> Decoder:
    """A decoder with its weights in place.

    `dummy` draws random weights and reads none. Raises InvalidModelError for broken weights (see
    load_safetensors).
    """
    if load_format == "auto":
        weight_files(model_path)  # a directory without weights fails before memory is taken
    weights = ModelWeights.allocate(config, device=device, dtype=dtype)
    destinations = weights.destinations(config)
    if load_format == "dummy":
        fill_random(destinations)
    else:
        load_safetensors(destinations, model_path)
    table = cos_sin_table(config.rope, config.head_dim, config.context_length, device)
    fused = device.type == "cuda" and dtype in FUSED_DTYPES and flashinfer_installed()
    return Decoder(config, weights, FusedOps(table) if fused else TorchOps(table))

"""A decoder's parameters, and where each tensor of a checkpoint belongs in them.

Projections that read the same input are one matrix (queries, keys and values; gate and up): one
product instead of three. A checkpoint's tensors go straight into slices of these, so loading never
holds a second copy of the model.

On a CPU a float32 layer's matrices lie input-major in memory, as transposed views, and stay so
where there is no compiler for products of packed ones (`packed_weights`): a product of few rows
then adds up whole rows of the weight instead of one dot product an output. MKL 2024.2 on an AMD
EPYC, all products of 8 small layers, one thread: 4.3 for 6.1 ms at 1 row, 6.2 for 7.5 at 2, 8.9 for
10.1 at 8, 9.7 for 13.0 at 16, 21 for 24 at 64, and level for prompts. The vocabulary's matrix stays
as it is: it is looked up by rows, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], biases are None where the model has none."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden], queries, keys, values."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up: torch.Tensor
    """[2 * intermediate, hidden], gate first."""
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """All parameters of a decoder, on one device, in one dtype."""

    embedding: torch.Tensor
    """[vocab, hidden]."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    output: torch.Tensor
    """[vocab, hidden]; the very embedding where the model ties them."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vocab_rows: int = 0,
    ) -> "ModelWeights":
        """Uninitialised parameters; with `vocab_rows`, of so many rows of the vocabulary's."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            if device.type == "cpu" and dtype is torch.float32:
                return empty(columns, rows).t()
            return empty(rows, columns)

        def bias(wanted: bool, size: int) -> torch.Tensor | None:
            return empty(size) if wanted else None

        heads_dim = config.num_heads * config.head_dim
        qkv_dim = heads_dim + 2 * config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        vocab_rows = vocab_rows or config.vocab_size
        embedding = empty(vocab_rows, hidden)
        layers = tuple(
            LayerWeights(
                input_norm=empty(hidden),
                qkv=matrix(qkv_dim, hidden),
                qkv_bias=bias(config.qkv_bias, qkv_dim),
                q_norm=bias(config.qk_norm, config.head_dim),
                k_norm=bias(config.qk_norm, config.head_dim),
                o=matrix(hidden, heads_dim),
                o_bias=bias(config.o_bias, hidden),
                post_attention_norm=empty(hidden),
                gate_up=matrix(2 * inner, hidden),
                gate_up_bias=bias(config.mlp_bias, 2 * inner),
                down=matrix(hidden, inner),
                down_bias=bias(config.mlp_bias, hidden),
            )
            for _ in range(config.num_layers)
        )
        return cls(
            embedding=embedding,
            layers=layers,
            final_norm=empty(hidden),
            output=embedding if config.tie_word_embeddings else empty(vocab_rows, hidden),
        )

    def drop_summed_biases(self) -> None:
        """For all ranks but one: what they compute of these projections is summed, and the bias
        must count once."""
        for layer in self.layers:
            for bias in (layer.o_bias, layer.down_bias):
                if bias is not None:
                    bias.zero_()

    def destinations(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Checkpoint tensor name → the parameter, or slice of one, that receives it."""
        found = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.final_norm,
        }
        if not config.tie_word_embeddings:
            found["lm_head.weight"] = self.output
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            found.update((prefix + name, tensor) for name, tensor in _layer_parts(layer, config))
        return found


def _layer_parts(layer: LayerWeights, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    kv_dim = config.num_kv_heads * config.head_dim
    qkv_sizes = [config.num_heads * config.head_dim, kv_dim, kv_dim]
    inner = config.intermediate_size
    groups = (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv_sizes, layer.qkv, "qkv"),
        (("self_attn.o_proj",), [config.hidden_size], layer.o, "o"),
        (("mlp.gate_proj", "mlp.up_proj"), [inner, inner], layer.gate_up, "gate_up"),
        (("mlp.down_proj",), [config.hidden_size], layer.down, "down"),
    )
    biases = {
        "qkv": layer.qkv_bias,
        "o": layer.o_bias,
        "gate_up": layer.gate_up_bias,
        "down": layer.down_bias,
    }
    for names, sizes, matrix, key in groups:
        for name, part in zip(names, matrix.split_with_sizes(sizes), strict=True):
            yield name + ".weight", part
        bias = biases[key]
        if bias is not None:
            for name, part in zip(names, bias.split_with_sizes(sizes), strict=True):
                yield name + ".bias", part
    yield "input_layernorm.weight", layer.input_norm
    yield "post_attention_layernorm.weight", layer.post_attention_norm
    if layer.q_norm is not None and layer.k_norm is not None:
        yield "self_attn.q_norm.weight", layer.q_norm
        yield "self_attn.k_norm.weight", layer.k_norm

"""The decoder of the Llama family; Llama, Mistral, Qwen2 and Qwen3 are settings of it."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch.nn import functional

from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.cpu_library import cpu_library
from engine.models.cpu_ops import CpuOps
from engine.models.fused_ops import FUSED_DTYPES, FusedOps, flashinfer_installed
from engine.models.invariant_ops import InvariantOps, check_products
from engine.models.loading import fill_random, load_safetensors, weight_files
from engine.models.ops import FreshKV, Ops, TorchOps
from engine.models.packed_weights import packed_weights
from engine.models.remembered_choices import RememberedChoices
from engine.models.rope import cos_sin_table
from engine.models.timing import measured_with
from engine.models.weights import LayerWeights, ModelWeights
from engine.parallel.group import ALONE, TensorGroup
from engine.parallel.shards import Shards


class Attention(Protocol):
    """What the decoder needs of an attention backend, which was planned for the step before."""

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        """Attention of q [t, heads, head_dim] over the cached KV, of which `fresh` is what this
        step has written: [t, heads * head_dim]."""
        ...


class BetweenLayers(NamedTuple):
    """A step's state between two layers."""

    hidden: torch.Tensor | None
    """[t, hidden]; not yet added to the residual stream. None: nothing is left to be added."""
    residual: torch.Tensor
    """[t, hidden]; float32 from the first layer's sum on."""


class Decoder:
    """Token ids in, hidden states out; keys and values go to the pool.

    Not safe for use by several threads at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        ops: Ops,
        *,
        group: TensorGroup = ALONE,
    ) -> None:
        """Of several ranks in `group`, `config` and `weights` are this one's shards (the config's
        vocabulary is the whole one's), and all of them make every call together."""
        self.config = config
        self.weights = weights
        self._ops = ops
        self._group = group
        self._num_qk_heads = config.num_heads + config.num_kv_heads

    @property
    def num_ranks(self) -> int:
        """Processes that compute every step together."""
        return self._group.size

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype

    def choose_products(
        self,
        sizes: Sequence[int],
        layers: Callable[[int], Callable[[], object]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """As Products.choose, for this decoder's weights. Several ranks choose nothing: they
        would have to measure in step with one another, and what each remembers may differ."""
        products = self._ops.products
        if products is None or self.num_ranks > 1:
            return []
        remembered = RememberedChoices(measured_with(self.device, self.dtype))
        return products.choose(self.weights, sizes, layers, remembered, progress)

    def choose_prompt_products(self, most_rows: int) -> list[str]:
        """As Products.choose_for_prompts; several ranks choose nothing here either."""
        products = self._ops.products
        if products is None or self.num_ranks > 1:
            return []
        remembered = RememberedChoices(measured_with(self.device, self.dtype))
        return products.choose_for_prompts(self.weights, most_rows, remembered)

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
        state = self.run_layers(
            range(len(self.weights.layers)),
            self.embed(input_ids),
            positions,
            kv_rows,
            kv_pool,
            attention,
            last_tokens,
        )
        return self.hidden_states(state)

    def embed(self, input_ids: torch.Tensor) -> BetweenLayers:
        """What the first layer reads, for `input_ids` [t] int64."""
        table = self.weights.embedding
        if self._group.size == 1:
            return BetweenLayers(None, functional.embedding(input_ids, table))
        rows = input_ids - self._group.rank * table.shape[0]
        elsewhere = (rows < 0) | (rows >= table.shape[0])
        found = functional.embedding(rows.masked_fill(elsewhere, 0), table)
        return BetweenLayers(None, self._group.sum(found.masked_fill(elsewhere[:, None], 0)))

    def run_layers(
        self,
        layers: range,
        state: BetweenLayers,
        positions: torch.Tensor,
        kv_rows: torch.Tensor,
        kv_pool: PageMajorKVPool,
        attention: Attention,
        last_tokens: torch.Tensor | None = None,
    ) -> BetweenLayers:
        """Some layers of `forward`, in order; other steps may run before the next ones do. `state`
        is what the layer before them left, and is used up.

        Behind the model's last attention, only the tokens `last_tokens` (None: all) go on: of the
        others nothing but their KV is ever read.
        """
        ops = self._ops
        rotation = ops.rotation(positions)
        for index in layers:
            layer = self.weights.layers[index]
            normed, residual = self._normed(state, layer.input_norm)
            hidden = self._attend(index, layer, normed, rotation, kv_rows, kv_pool, attention)
            if last_tokens is not None and index == len(self.weights.layers) - 1:
                hidden = hidden.index_select(0, last_tokens)
                residual = residual.index_select(0, last_tokens)
            state = self._onto(residual, hidden, layer.o, layer.o_bias)
            normed, residual = self._normed(state, layer.post_attention_norm)
            gated = ops.gated_linear(normed, layer.gate_up, layer.gate_up_bias)
            state = self._onto(residual, gated, layer.down, layer.down_bias)
        return state

    def hidden_states(self, state: BetweenLayers) -> torch.Tensor:
        """As `forward`, for what the last layer left."""
        return self._normed(state, self.weights.final_norm)[0]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[b, vocab] float32 for hidden states [b, hidden]; in `out` where one is given."""
        if self._group.size == 1:
            return self._ops.logits(hidden, self.weights.output, out)
        columns = self._group.gather_columns(self._ops.logits(hidden, self.weights.output))
        columns = columns[:, : self.config.vocab_size]
        return columns if out is None else out.copy_(columns)

    def _normed(
        self, state: BetweenLayers, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the next products read, the residual stream with all that is added to it)."""
        (hidden, residual), eps = state, self.config.rms_norm_eps
        if hidden is None:
            return self._ops.rms_norm(residual, weight, eps), residual
        return self._ops.add_rms_norm(hidden, residual, weight, eps)

    def _onto(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> BetweenLayers:
        if self._group.size == 1:
            return BetweenLayers(*self._ops.linear_onto(residual, x, weight, bias))
        return BetweenLayers(self._group.sum(self._ops.linear(x, weight, bias)), residual)

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
        qkv = ops.linear(normed, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(qkv.shape[0], -1, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            eps, qk = config.rms_norm_eps, qkv[:, : self._num_qk_heads]
            normed_qk = ops.qk_norm(qk, config.num_heads, layer.q_norm, layer.k_norm, eps)
            if normed_qk is not qk:
                qkv = torch.cat((normed_qk, qkv[:, self._num_qk_heads :]), dim=1)
        q, fresh = ops.rotate_and_store(qkv, config.num_heads, rotation, kv_pool, index, kv_rows)
        return attention.run(index, q, fresh)


def load_decoder(
    config: ModelConfig,
    *,
    model_path: str,
    device: torch.device,
    dtype: torch.dtype,
    load_format: Literal["auto", "dummy"] = "auto",
    group: TensorGroup = ALONE,
    deterministic: bool = False,
) -> Decoder:
    """A decoder with its weights in place: this rank's part of `config`'s.

    `dummy` draws random weights and reads none. `deterministic`, on a GPU with FlashInfer: what is
    computed for a token does not depend on what is computed beside it. Raises InvalidModelError for
    broken weights (see load_safetensors), ConfigError where the model cannot be split among so many
    ranks.
    """
    shards = Shards(model=config, rank=group.rank, size=group.size)
    if load_format == "auto":
        weight_files(model_path)  # a directory without weights fails before memory is taken
    local = shards.local
    weights = ModelWeights.allocate(local, device=device, dtype=dtype, vocab_rows=shards.vocab_rows)
    destinations = weights.destinations(local)
    if load_format == "dummy":
        fill_random(destinations)
    else:
        for name in destinations.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            destinations[name][len(shards.vocab) :].zero_()
            destinations[name] = destinations[name][: len(shards.vocab)]
        load_safetensors(destinations, model_path, shards)
    if group.rank > 0:
        weights.drop_summed_biases()
    table = cos_sin_table(config.rope, config.head_dim, config.context_length, device)
    ops = _ops_for(table, dtype, deterministic)
    if isinstance(ops, CpuOps):
        weights = packed_weights(weights)
    if isinstance(ops, InvariantOps):
        check_products(weights.layers[0].o)
    return Decoder(local, weights, ops, group=group)


def _ops_for(table: torch.Tensor, dtype: torch.dtype, deterministic: bool) -> Ops:
    """The fastest there are for the table's device."""
    if table.is_cuda and dtype in FUSED_DTYPES and flashinfer_installed():
        return InvariantOps(table) if deterministic else FusedOps(table)
    library = cpu_library() if table.is_cpu and dtype is torch.float32 else None
    return TorchOps(table) if library is None else CpuOps(table, library)

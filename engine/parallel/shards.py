"""Which part of a model one rank holds.

Queries, keys, values, gate and up are split by output (whole heads, rows of the MLP), the two
projections behind them by input, so that a layer needs two sums over the ranks and nothing else
(Shoeybi et al. 2019, Megatron-LM). The vocabulary is split by rows. With more ranks than KV heads
each KV head lives on several ranks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import ConfigError, InvalidModelError
from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Part:
    """A range of one dimension of a checkpoint's tensor."""

    dim: int
    start: int
    stop: int
    whole: int
    """Size of that dimension in the checkpoint."""

    def read(self, tensor: Any, name: str) -> torch.Tensor:
        """Reads the range, and nothing else, of safetensors' slice of the tensor. Raises
        InvalidModelError where the tensor has another size."""
        size = tensor.get_shape()[self.dim]
        if size != self.whole:
            raise InvalidModelError(
                f"tensor {name} has {size} entries in dimension {self.dim}, but config.json asks "
                f"for {self.whole}"
            )
        index = (slice(None),) * self.dim + (slice(self.start, self.stop),)
        part: torch.Tensor = tensor[index]
        return part


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """One rank's part of `model`."""

    model: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        """Raises ConfigError where the model cannot be split so."""
        model, size = self.model, self.size
        kv_heads = model.num_kv_heads
        fits_kv = kv_heads % size == 0 or size % kv_heads == 0
        if size < 1 or model.num_heads % size or not fits_kv or model.intermediate_size % size:
            raise ConfigError(
                f"tensor_parallel_size is {size}, which does not divide the model's "
                f"{model.num_heads} heads, {kv_heads} KV heads and {model.intermediate_size} rows "
                "of the MLP"
            )

    @property
    def local(self) -> ModelConfig:
        """The model as this rank computes it; the vocabulary stays whole."""
        return replace(
            self.model,
            num_heads=self.model.num_heads // self.size,
            num_kv_heads=len(self.kv_heads),
            intermediate_size=self.model.intermediate_size // self.size,
        )

    @property
    def kv_heads(self) -> range:
        """The model's KV heads that this rank holds."""
        return rank_kv_heads(self.model.num_kv_heads, rank=self.rank, size=self.size)

    @property
    def vocab_rows(self) -> int:
        """Rows of a vocabulary table on every rank; the last ranks' may reach beyond its end."""
        return -(-self.model.vocab_size // self.size)

    @property
    def vocab(self) -> range:
        """Token ids whose rows this rank holds."""
        first = self.rank * self.vocab_rows
        end = self.model.vocab_size
        return range(min(first, end), min(first + self.vocab_rows, end))

    def part(self, name: str) -> Part | None:
        """What this rank reads of the checkpoint's tensor `name`; None: all of it."""
        if self.size == 1:
            return None
        *_, module, kind = name.split(".")
        if module in ("embed_tokens", "lm_head"):
            return Part(0, self.vocab.start, self.vocab.stop, self.model.vocab_size)
        dim = self._model_dim
        if module in ("q_proj", "gate_proj", "up_proj"):
            whole = dim if module == "q_proj" else self.model.intermediate_size
            return self._share(0, whole)
        if module in ("k_proj", "v_proj"):
            width, heads = self.model.head_dim, self.kv_heads
            whole = self.model.num_kv_heads * width
            return Part(0, heads.start * width, heads.stop * width, whole)
        if module in ("o_proj", "down_proj") and kind == "weight":
            return self._share(1, dim if module == "o_proj" else self.model.intermediate_size)
        return None

    @property
    def _model_dim(self) -> int:
        return self.model.num_heads * self.model.head_dim

    def _share(self, dim: int, whole: int) -> Part:
        share = whole // self.size
        return Part(dim, self.rank * share, (self.rank + 1) * share, whole)


def rank_kv_heads(num_kv_heads: int, *, rank: int, size: int) -> range:
    """The KV heads of one rank, where one of the two numbers divides the other."""
    if size <= num_kv_heads:
        share = num_kv_heads // size
        return range(rank * share, (rank + 1) * share)
    head = rank * num_kv_heads // size
    return range(head, head + 1)

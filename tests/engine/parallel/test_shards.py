"""What each rank reads of a checkpoint: together all of it, alone no more than its part."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.errors import ConfigError, InvalidModelError
from engine.execution.forward_batch import ForwardMode
from engine.model_config import ModelConfig
from engine.models.loading import load_safetensors
from engine.models.weights import ModelWeights
from engine.parallel.commands import StepCommand, StepKind
from engine.parallel.shards import Shards
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama-biases")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_parts_make_up_every_tensor(model: Path, size: int) -> None:
    config = ModelConfig.from_directory(model)
    for name, tensor in load_file(model / "model.safetensors").items():
        parts = [Shards(model=config, rank=rank, size=size).part(name) for rank in range(size)]
        if parts[0] is None:
            assert all(part is None for part in parts)
            continue
        covered = [
            index for part in parts if part is not None for index in range(part.start, part.stop)
        ]
        assert {part.whole for part in parts if part is not None} == {tensor.shape[parts[0].dim]}
        # Four ranks share two KV heads: each is there twice.
        times = 2 if size == 4 and ("k_proj" in name or "v_proj" in name) else 1
        assert sorted(covered) == sorted(list(range(tensor.shape[parts[0].dim])) * times)


def test_a_rank_holds_its_rows_and_columns(model: Path) -> None:
    config = ModelConfig.from_directory(model)
    whole = load_file(model / "model.safetensors")
    shards = Shards(model=config, rank=1, size=2)
    weights = ModelWeights.allocate(
        shards.local, device=torch.device("cpu"), dtype=torch.float32, vocab_rows=shards.vocab_rows
    )
    load_safetensors(weights.destinations(shards.local), model, shards)
    half_vocab, inner = config.vocab_size // 2, config.intermediate_size // 2
    assert torch.equal(weights.embedding, whole["model.embed_tokens.weight"][half_vocab:])
    layer, prefix = weights.layers[0], "model.layers.0."
    assert torch.equal(layer.o, whole[prefix + "self_attn.o_proj.weight"][:, 32:])
    assert torch.equal(layer.down, whole[prefix + "mlp.down_proj.weight"][:, inner:])
    assert torch.equal(layer.gate_up[:inner], whole[prefix + "mlp.gate_proj.weight"][inner:])
    assert torch.equal(layer.qkv[:32], whole[prefix + "self_attn.q_proj.weight"][32:])
    assert torch.equal(layer.qkv[32:48], whole[prefix + "self_attn.k_proj.weight"][16:])


def test_a_tensor_of_another_size_is_refused(model: Path) -> None:
    config = replace(ModelConfig.from_directory(model), vocab_size=322)
    shards = Shards(model=config, rank=0, size=2)
    weights = ModelWeights.allocate(
        shards.local, device=torch.device("cpu"), dtype=torch.float32, vocab_rows=shards.vocab_rows
    )
    with pytest.raises(InvalidModelError, match="320 entries in dimension 0"):
        load_safetensors(weights.destinations(shards.local), model, shards)


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_the_heads_is_refused(model: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {size}"):
        Shards(model=ModelConfig.from_directory(model), rank=0, size=size)


LISTS = st.lists(st.integers(0, 2**40), max_size=5)


@given(st.sampled_from(StepKind), st.sampled_from(ForwardMode), st.integers(-1, 99), LISTS)
def test_a_command_comes_out_as_it_went_in(
    kind: StepKind, mode: ForwardMode, targets: int, lens: list[int]
) -> None:
    command = StepCommand(
        kind=kind,
        mode=mode,
        first_layer=3,
        last_layer=7,
        num_prompt_targets=targets,
        seq_lens=tuple(lens),
        extend_prefix_lens=tuple(lens[::-1]),
        extend_lens=tuple(n // 2 for n in lens),
    )
    assert StepCommand.from_bytes(command.to_bytes()) == command

"""Weights: broken checkpoints are named, dtypes converted, dummies drawn."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import InvalidModelError
from engine.model_config import ModelConfig
from engine.models.decoder import Decoder, load_decoder
from engine.models.packed_weights import unpack
from engine.models.weights import ModelWeights

CPU = torch.device("cpu")


@pytest.fixture
def broken(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint, to be broken."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(checkpoint(kind), tmp_path / kind))

    return copy


def load(directory: Path, dtype: torch.dtype = torch.float32, load_format: str = "auto") -> Decoder:
    return load_decoder(
        ModelConfig.from_directory(directory),
        model_path=str(directory),
        device=CPU,
        dtype=dtype,
        load_format="dummy" if load_format == "dummy" else "auto",
    )


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_directory_without_weights(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-gqa")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InvalidModelError, match=r"no weights.*pytorch_model\.bin") as caught:
        load(directory)
    assert str(directory) in str(caught.value)


def test_a_tensor_of_the_wrong_shape(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-gqa")
    name = "model.layers.1.mlp.down_proj.weight"
    change_weights(directory, lambda tensors: tensors.update({name: tensors[name][:, 1:].clone()}))
    with pytest.raises(InvalidModelError, match=rf"{name} has shape \[64, 95\].*\[64, 96\]"):
        load(directory)


def test_a_missing_tensor(broken: Callable[[str], Path]) -> None:
    directory = broken("qwen2")
    change_weights(directory, lambda t: t.__delitem__("model.layers.0.self_attn.k_proj.bias"))
    with pytest.raises(InvalidModelError, match=r"layers\.0\.self_attn\.k_proj\.bias"):
        load(directory)


def test_a_tensor_that_the_model_has_no_place_for(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-gqa")
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_weights(directory, lambda tensors: tensors.update({bias: torch.ones(64)}))
    with pytest.raises(InvalidModelError, match=bias):
        load(directory)


def test_an_integer_tensor(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-gqa")
    name = "model.norm.weight"
    change_weights(directory, lambda t: t.update({name: torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(InvalidModelError, match=rf"{name} is torch\.int8"):
        load(directory)


def test_repeated_knowledge_is_ignored(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-mha-tied")
    extra = {
        "lm_head.weight": torch.zeros(320, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    change_weights(directory, lambda tensors: tensors.update(extra))
    decoder = load(directory)
    assert torch.equal(unpack(decoder.weights.output), decoder.weights.embedding)
    assert decoder.weights.embedding.abs().sum() > 0


def test_a_truncated_file(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-gqa")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InvalidModelError, match=r"model\.safetensors cannot be read"):
        load(directory)


def test_a_missing_shard(broken: Callable[[str], Path]) -> None:
    directory = broken("llama-sharded")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InvalidModelError, match=shard.name):
        load(directory)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index(broken: Callable[[str], Path], index: str) -> None:
    directory = broken("llama-sharded")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidModelError, match=r"index\.json"):
        load(directory)


def test_weights_are_converted_to_the_dtype_asked_for(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("llama-gqa")
    full, half = load(directory), load(directory, torch.bfloat16)
    assert half.weights.layers[0].qkv.dtype == torch.bfloat16
    assert torch.equal(half.weights.layers[0].qkv, unpack(full.weights.layers[0].qkv).bfloat16())


def test_dummy_weights_need_no_files_and_repeat(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    shutil.copy(checkpoint("qwen3") / "config.json", tmp_path)
    first, second = load(tmp_path, load_format="dummy"), load(tmp_path, load_format="dummy")
    for tensor, again in zip(parameters(first.weights), parameters(second.weights), strict=True):
        assert torch.equal(tensor, again)
        assert torch.isfinite(tensor).all()
        assert tensor.count_nonzero() > 0.99 * tensor.numel()


def parameters(weights: ModelWeights) -> list[torch.Tensor]:
    whole = [weights.embedding, weights.final_norm, weights.output]
    of_layers = [
        getattr(layer, field.name)
        for layer in weights.layers
        for field in dataclasses.fields(layer)
    ]
    return [*whole, *(tensor for tensor in of_layers if tensor is not None)]


def test_every_parameter_has_exactly_one_source(checkpoint: Callable[[str], Path]) -> None:
    for kind in ("llama-biases", "qwen2", "qwen3"):
        config = ModelConfig.from_directory(checkpoint(kind))
        weights = ModelWeights.allocate(config, device=CPU, dtype=torch.float32)
        sizes = [tensor.numel() for tensor in weights.destinations(config).values()]
        assert sum(sizes) == config.num_parameters


def test_destinations_are_the_parameters_own_memory(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("llama-sharded")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weights = load(directory).weights
    name = "model.layers.2.mlp.up_proj.weight"
    stored = load_file(directory / index["weight_map"][name])[name]
    assert torch.equal(unpack(weights.layers[2].gate_up)[96:], stored)

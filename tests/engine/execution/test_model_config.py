"""config.json: what is understood, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import InvalidModelError, UnsupportedModelError
from engine.model_config import ModelConfig
from engine.models.rope import RopeConfig, inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}

Write = Callable[..., ModelConfig]


@pytest.fixture
def parse(tmp_path: Path) -> Write:
    """Parses LLAMA with changes; None removes a key."""

    def write(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_directory(tmp_path)

    return write


def test_absent_keys_take_the_formats_defaults(parse: Write) -> None:
    config = parse()
    assert config.num_kv_heads == 8
    assert config.head_dim == 8
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.context_length == 2048
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == ()


def test_qwen2_has_biases_on_queries_keys_and_values_only(parse: Write) -> None:
    config = parse(architectures=["Qwen2ForCausalLM"])
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (True, False, False)


def test_qwen3_normalises_queries_and_keys(parse: Write) -> None:
    config = parse(architectures=["Qwen3ForCausalLM"], head_dim=32)
    assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, True, 32)


def test_model_type_stands_in_for_missing_architectures(parse: Write) -> None:
    assert parse(architectures=None, model_type="mistral").family == "mistral"


def test_llama3_rope_in_the_older_form(parse: Write) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = parse(rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    assert config.rope == RopeConfig(
        theta=500000.0, kind="llama3", factor=8.0, original_context_length=8192
    )
    assert config.rope == parse(rope_parameters={"rope_theta": 500000.0, **scaling}).rope


def test_rope_type_under_its_oldest_key(parse: Write) -> None:
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).rope.kind == "linear"


def test_yarn_lengthens_the_context(parse: Write) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert parse(rope_scaling=scaling).context_length == 8192


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.1,
            "truncate": False,
        },
    ],
)
def test_rotary_frequencies_equal_the_references(parse: Write, parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 10000.0, **parameters}
    rope = parse(rope_parameters=parameters, head_dim=32).rope
    shape = {**LLAMA, "architectures": None, "head_dim": 32, "rope_parameters": parameters}
    reference = LlamaRotaryEmbedding(LlamaConfig(**shape))
    torch.testing.assert_close(inverse_frequencies(rope, 32), reference.inv_freq)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling)


def test_end_tokens_come_from_the_generation_config_first(parse: Write) -> None:
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse(eos_token_id=2, generation={"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert parse(eos_token_id=[3, 3], generation={}).eos_token_ids == (3,)


def test_parameters_are_counted(checkpoint: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file

    for kind in ("llama-biases", "qwen2", "qwen3", "llama-mha-tied"):
        directory = checkpoint(kind)
        stored = load_file(directory / "model.safetensors")
        expected = sum(tensor.numel() for tensor in stored.values())
        assert ModelConfig.from_directory(directory).num_parameters == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "gemma"}, "gemma"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer to layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, "sliding_window 512"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 512,
                "max_window_layers": 2,
            },
            "sliding_window 512",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 512,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            "sliding_window 512",
        ),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    parse: Write, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        parse(**changes)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 2048},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 512,
            "max_window_layers": 4,
        },
        {
            "architectures": ["Qwen3ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 512,
            "layer_types": ["full_attention"] * 4,
        },
    ],
)
def test_a_sliding_window_without_effect_passes(parse: Write, changes: dict[str, Any]) -> None:
    assert parse(**changes).context_length == 2048


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"eos_token_id": 1000}, "eos_token_id"),
    ],
)
def test_nonsense_is_an_error_that_names_the_key(
    parse: Write, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidModelError, match=named) as caught:
        parse(**changes)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_directory_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="not a directory"):
        ModelConfig.from_directory(tmp_path / "absent")
    with pytest.raises(InvalidModelError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_broken_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidModelError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)

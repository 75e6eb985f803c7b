"""What a checkpoint's config.json says about its model, checked and complete.

Four families of one shape: Llama, Mistral, Qwen2 and Qwen3 differ in biases, in the norm of
queries and keys, and in rotary settings, so they are settings of one config and one decoder.
Whatever a config.json asks for that is not computed here is refused by name: ignoring a key would
serve wrong tokens with a straight face.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import InvalidModelError, UnsupportedModelError
from engine.models.rope import ROPE_KINDS, RopeConfig, yarn_attention_factor

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and settings of a decoder-only model."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Divides num_heads; fewer than num_heads is grouped-query attention."""
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_length: int
    """Longest prompt + output, in tokens, that the model was made for."""
    tie_word_embeddings: bool
    """The output projection is the embedding table."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Queries and keys are normalised per head before the rotation (Qwen3)."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an output; empty where the checkpoint names none."""
    checkpoint_dtype: str
    """Dtype named by the checkpoint, e.g. "bfloat16"; "" where it names none."""

    @classmethod
    def from_directory(cls, path: str | Path) -> "ModelConfig":
        """Reads config.json and generation_config.json of a Hugging Face model directory.

        Raises InvalidModelError (a file or a key is missing or nonsensical) or
        UnsupportedModelError (something that is not computed here), naming the directory.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise InvalidModelError(f"{directory} is not a directory: give a model directory")
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise InvalidModelError(f"{directory} holds no config.json: not a model directory")
        fields = _Fields(config_path)
        generation_path = directory / "generation_config.json"
        generation = _Fields(generation_path) if generation_path.is_file() else None
        return _parse(fields, generation)

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of key and value that one token takes over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights and biases in all; tied embeddings count once."""
        heads_dim = self.num_heads * self.head_dim
        qkv_dim = heads_dim + 2 * self.num_kv_heads * self.head_dim
        layer = (
            qkv_dim * (self.hidden_size + self.qkv_bias)
            + self.hidden_size * (heads_dim + self.o_bias)
            + 2 * self.intermediate_size * (self.hidden_size + self.mlp_bias)
            + self.hidden_size * (self.intermediate_size + self.mlp_bias)
            + 2 * self.hidden_size
            + 2 * self.head_dim * self.qk_norm
        )
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size


class _Fields:
    """A JSON object from a file, with readers that name the file and the key in their errors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidModelError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise InvalidModelError(f"{path} is not a JSON object")
        self.values: dict[str, Any] = values

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidModelError(f"{self.path}: {key} must be a positive integer, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidModelError(f"{self.path}: {key} must be true or false, not {value!r}")
        return value

    def refuse(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {what}")


def _parse(fields: _Fields, generation: _Fields | None) -> ModelConfig:
    family = _family(fields)
    _refuse_what_is_not_computed(fields, family)
    hidden_size = fields.positive_int("hidden_size")
    num_layers = fields.positive_int("num_hidden_layers")
    num_heads = fields.positive_int("num_attention_heads")
    num_kv_heads = fields.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise InvalidModelError(
            f"{fields.path}: num_attention_heads ({num_heads}) is not a multiple of "
            f"num_key_value_heads ({num_kv_heads})"
        )
    head_dim = fields.positive_int("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise InvalidModelError(f"{fields.path}: head_dim must be even, not {head_dim}")
    max_positions = fields.positive_int("max_position_embeddings")
    rope = _rope(fields, max_positions)
    context_length = max_positions
    if rope.kind == "yarn":
        context_length = max(max_positions, int(rope.original_context_length * rope.factor))
    _refuse_sliding_window(fields, family, num_layers, context_length)
    attention_bias = fields.flag("attention_bias")
    vocab_size = fields.positive_int("vocab_size")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.positive_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(fields.path, "rms_norm_eps", fields.get("rms_norm_eps"), 1e-6),
        rope=rope,
        context_length=context_length,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=True if family == "qwen2" else attention_bias,
        o_bias=False if family == "qwen2" else attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        checkpoint_dtype=str(fields.get("dtype") or fields.get("torch_dtype") or ""),
    )


def _family(fields: _Fields) -> Family:
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures:
        name = str(architectures[0])
        if name not in _ARCHITECTURES:
            raise fields.refuse(
                f"architecture {name} is not supported; supported are {', '.join(_ARCHITECTURES)}"
            )
        return _ARCHITECTURES[name]
    model_type = fields.get("model_type")
    for family in get_args(Family):
        if model_type == family:
            return family  # type: ignore[no-any-return]
    raise fields.refuse(f"neither architectures nor model_type ({model_type!r}) is a supported one")


def _refuse_what_is_not_computed(fields: _Fields, family: Family) -> None:
    for key in ("quantization_config", "compression_config"):
        quantization = fields.get(key)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise fields.refuse(
                f"quantised checkpoints are not supported ({key}: {method or quantization!r}); "
                "use the original in bfloat16, float16 or float32"
            )
    activation = fields.get("hidden_act") or "silu"
    if activation != "silu":
        raise fields.refuse(f"hidden_act {activation!r} is not supported, only 'silu'")
    if family != "llama" and fields.flag("mlp_bias"):
        raise fields.refuse(f"mlp_bias is not supported for {family}")
    if family == "mistral" and fields.flag("attention_bias"):
        raise fields.refuse("attention_bias is not supported for mistral")


def _refuse_sliding_window(
    fields: _Fields, family: Family, num_layers: int, context_length: int
) -> None:
    """A window as long as the context, or one that no layer uses, changes nothing and passes."""
    layer_types = fields.get("layer_types")
    if isinstance(layer_types, list):
        odd = sorted({str(kind) for kind in layer_types} - {"full_attention"})
        if odd and odd != ["sliding_attention"]:
            raise fields.refuse(f"layer_types {odd} are not supported, only full_attention")
        if not odd:
            return
    window = fields.get("sliding_window")
    if window is None:
        return
    if family in ("qwen2", "qwen3"):
        if not fields.flag("use_sliding_window"):
            return
        if not isinstance(layer_types, list):
            first = fields.get("max_window_layers")
            if isinstance(first, int) and first >= num_layers:
                return
    if isinstance(window, int) and window >= context_length:
        return
    raise fields.refuse(
        f"sliding_window {window} is not supported: attention here always sees the whole context"
    )


def _rope(fields: _Fields, max_positions: int) -> RopeConfig:
    """Rotary settings, under the keys of transformers 5 (rope_parameters) or of earlier ones."""
    settings: dict[str, Any] = {"rope_theta": fields.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        values = fields.get(key)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise InvalidModelError(f"{fields.path}: {key} must be an object, not {values!r}")
        if any(isinstance(value, dict) for value in values.values()):
            raise fields.refuse(f"{key} that differ from layer to layer are not supported")
        settings.update({name: value for name, value in values.items() if value is not None})
    partial = settings.get("partial_rotary_factor") or fields.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise fields.refuse(f"partial_rotary_factor {partial} is not supported, only 1.0")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise fields.refuse(f"rope type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")

    def number(key: str, default: float | None = None) -> float:
        return _number(fields.path, key, settings.get(key), default)

    theta = number("rope_theta", 10000.0)
    original = int(number("original_max_position_embeddings", max_positions))
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=number("factor"),
            original_context_length=original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = number("factor", max_positions / original)
        prescribed = yarn_attention_factor(
            factor, settings.get("mscale"), settings.get("mscale_all_dim")
        )
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context_length=original,
            attention_factor=number("attention_factor", prescribed),
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(settings.get("truncate", True)),
        )
    return RopeConfig(theta=theta)


def _number(path: Path, key: str, value: Any, default: float | None = None) -> float:
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise InvalidModelError(f"{path}: {key} must be a positive number, not {value!r}")
    return float(value)


def _eos_token_ids(fields: _Fields, generation: _Fields | None, vocab_size: int) -> tuple[int, ...]:
    """generation_config.json knows best: chat models list their end-of-turn tokens only there."""
    for source in (generation, fields):
        value = source.get("eos_token_id") if source is not None else None
        if value is None or source is None:
            continue
        ids = value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidModelError(f"{source.path}: eos_token_id {value!r} is not an integer")
            if not 0 <= token_id < vocab_size:
                raise InvalidModelError(
                    f"{source.path}: eos_token_id {token_id} is outside the vocabulary "
                    f"of {vocab_size}"
                )
        return tuple(dict.fromkeys(ids))
    return ()

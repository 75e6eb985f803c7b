"""A small random Llama checkpoint, so that the whole path runs where no model is at hand.

Its text is noise, on purpose printable: every byte is a token, and the output rows of bytes that
are no printable ASCII are zero, which a random row almost surely beats.
"""

import json
import os
import shutil
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

RANDOM_NAME = "baton-random"
Array = npt.NDArray[np.float32]

BOS, EOS = "<|begin|>", "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The architecture, in Hugging Face's terms."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 4096
    vocab_size: int = 258


def write_random_model(path: Path, *, seed: int = 0, shape: Shape | None = None) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, all or nothing.

    Args:
        path: the directory to make; what lay there is replaced.
        seed: of the weights.
        shape: of the model.
    """
    shape = shape or Shape()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write_tokenizer(work)
        _write_config(work, shape)
        save_file(_weights(shape, seed), work / "model.safetensors", metadata={"format": "pt"})
        work.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_model_shell(path: Path, shape: Shape) -> None:
    """Configuration and tokenizer without weights, for workers that draw theirs (load_format
    dummy). Ids beyond the tokenizer's have no text."""
    path.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(path)
    _write_config(path, shape)


def _write_config(path: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "README.md").write_text(
        "Random weights: the text is noise. Written by Baton to exercise its whole path.\n"
    )


def _write_tokenizer(path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (BOS, EOS)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _weights(shape: Shape, seed: int) -> dict[str, Array]:
    noise = np.random.default_rng(seed)

    def random(*size: int, scale: float) -> Array:
        return (noise.standard_normal(size) * scale).astype(np.float32)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    scale = hidden**-0.5
    ones = np.ones(hidden, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": random(shape.vocab_size, hidden, scale=1.0),
        "model.norm.weight": ones,
        "lm_head.weight": random(shape.vocab_size, hidden, scale=scale)
        * _printable(shape.vocab_size)[:, None],
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones,
            f"{prefix}.self_attn.q_proj.weight": random(query, hidden, scale=scale),
            f"{prefix}.self_attn.k_proj.weight": random(key, hidden, scale=scale),
            f"{prefix}.self_attn.v_proj.weight": random(key, hidden, scale=scale),
            f"{prefix}.self_attn.o_proj.weight": random(hidden, query, scale=query**-0.5),
            f"{prefix}.mlp.gate_proj.weight": random(inner, hidden, scale=scale),
            f"{prefix}.mlp.up_proj.weight": random(inner, hidden, scale=scale),
            f"{prefix}.mlp.down_proj.weight": random(hidden, inner, scale=inner**-0.5),
        }
    return weights


def _printable(vocab_size: int) -> Array:
    """1 for tokens that are a printable ASCII character, 0 for all others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = set(string.ascii_letters + string.digits + string.punctuation) | {"Ġ"}
    mask = np.zeros(vocab_size, dtype=np.float32)
    mask[[index for index, letter in enumerate(alphabet) if letter in visible]] = 1.0
    return mask

"""Write the Hugging Face directory: weights, configuration, tokenizer with template, model card."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from .card import model_card
from .chat import CHAT_TEMPLATE
from .settings import (
    DEFAULT_WORK,
    END_OF_TEXT,
    MINIATURE,
    PAD,
    SETTINGS,
    SPECIAL_TOKENS,
    TURN_END,
    Shape,
)

MAX_DIRECTORY_BYTES = 24_000_000
"""What a clone of Baton may carry for it."""


def config(shape: Shape) -> dict[str, object]:
    """`config.json`: the Llama architecture, with every size spelled out."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        # Both spellings: transformers 5 reads the second, everything older the first.
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }


def generation_config() -> dict[str, object]:
    """`generation_config.json`: an answer ends with its turn, a text with its document."""
    return {
        "do_sample": False,
        "eos_token_id": [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END)],
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "max_new_tokens": 256,
    }


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """`tokenizer_config.json`: no token is added to a prompt, no space is cleaned away."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "unk_token": None,
        "added_tokens_decoder": {
            str(place): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for place, token in enumerate(SPECIAL_TOKENS)
        },
        "chat_template": CHAT_TEMPLATE,
    }


def export(work: Path, out: Path, shape: Shape) -> None:
    """Fill `out` from the training in `work`; refuses a directory that would be too large."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "run" / "model.safetensors", out / "model.safetensors")
    shutil.copyfile(work / "corpus" / "tokenizer.json", out / "tokenizer.json")
    for name, content in {
        "config.json": config(shape),
        "generation_config.json": generation_config(),
        "tokenizer_config.json": tokenizer_config(shape),
    }.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    facts = {
        name: json.loads((work / folder / f"{name}.json").read_text(encoding="utf-8"))
        for folder, name in (("corpus", "manifest"), ("run", "progress"), ("run", "evaluation"))
    }
    (out / "MODEL_CARD.md").write_text(model_card(shape, **facts), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.2f} MB")
    if size > MAX_DIRECTORY_BYTES:
        raise SystemExit(f"{out} is over {MAX_DIRECTORY_BYTES} bytes: shrink settings.Shape")


def main() -> None:
    """Export to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--miniature", action="store_true")
    args = parser.parse_args()
    export(args.work, args.out, (MINIATURE if args.miniature else SETTINGS).shape)


if __name__ == "__main__":
    main()

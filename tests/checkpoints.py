"""Small random checkpoints, written by `transformers` itself: the oracle of every model test.

Each kind is a real Hugging Face directory (config.json, generation_config.json, safetensors,
tokenizer.json) of well under a megabyte. Weights are wide enough for greedy choices to differ
clearly, and norms and biases are random too, so that a forgotten one shows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 320
EOS_TOKEN_ID = 0
EOS_TOKEN = "<|endoftext|>"
CONTEXT_LENGTH = 1024

_TRAINING_TEXT = (
    "The runner hands the baton to the next runner, and the next runner runs.",
    "A page is sealed when it is computed, and a page that is sealed is never dropped.",
    "Prefill reads the prompt once; decode writes one token after another after another.",
    "What the first service has computed, the second service continues from the same token.",
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def write_checkpoint(directory: Path, kind: str, *, seed: int = 0) -> Path:
    """Writes the checkpoint of that kind (a key of KINDS) into `directory`, which it returns.

    The same kind and seed give the same weights.
    """
    config, shard_size = KINDS[kind]()
    write_config(directory, config, shard_size=shard_size, seed=seed)
    return directory


def write_config(directory: Path, config: Any, *, shard_size: str = "100MB", seed: int = 0) -> None:
    """A checkpoint with random weights for any `transformers` config of a causal model."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = EOS_TOKEN_ID
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of VOCAB_SIZE entries: encodes any text, decodes any token id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "model_max_length": CONTEXT_LENGTH,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def reference_model(directory: Path) -> Any:
    """The checkpoint as `transformers` computes it: float32, eager attention, no dropout."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def random_prompt(length: int, *, seed: int) -> list[int]:
    """Token ids without the end-of-sequence token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS_TOKEN_ID + 1, VOCAB_SIZE, (length,), generator=generator).tolist()


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_SHAPE, **changes})


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**{**_SHAPE, "sliding_window": None, "head_dim": 24})


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_SHAPE)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**{**_SHAPE, "head_dim": 32, "tie_word_embeddings": True})


KINDS: dict[str, Callable[[], tuple[Any, str]]] = {
    "llama-gqa": lambda: (_llama(), "100MB"),
    "llama-mha-tied": lambda: (
        _llama(num_key_value_heads=4, tie_word_embeddings=True),
        "100MB",
    ),
    "llama-biases": lambda: (_llama(attention_bias=True, mlp_bias=True), "100MB"),
    "llama3-rope": lambda: (_llama(rope_parameters=LLAMA3_ROPE), "100MB"),
    "llama-sharded": lambda: (_llama(num_hidden_layers=3), "100KB"),
    "mistral": lambda: (_mistral(), "100MB"),
    "qwen2": lambda: (_qwen2(), "100MB"),
    "qwen3": lambda: (_qwen3(), "100MB"),
}
"""Kind → (config, most bytes a shard): the families and settings that must be served."""

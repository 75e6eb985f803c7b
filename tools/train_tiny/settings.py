"""Every number that decides what baton-tiny becomes, in one place.

The directory that ships must stay under 24 MB in bf16, which leaves about 11.5 million weights;
the shape spends them where a small model gains most while Baton can still shard it in two and
FlashInfer has kernels for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"

SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PAD)
"""Their token ids are their places in this tuple."""

DEFAULT_WORK = Path("build/train_tiny")
"""Where downloads, the corpus and checkpoints go; nothing of it is committed."""


@dataclass(frozen=True)
class Shape:
    """The Llama architecture's sizes, named as Hugging Face's `config.json` names them."""

    vocab_size: int = 8192
    """Tokens, special ones included. Even, for a vocabulary split over two ranks; below 2**16, so
    that a token of the corpus takes two bytes."""

    hidden_size: int = 320
    """Width of the residual stream. Not `heads * head_dim`: `head_dim` is given explicitly."""

    intermediate_size: int = 896
    """Width of the gated MLP; 2.8 times the hidden size, divisible by 2 x 64."""

    num_hidden_layers: int = 8
    """Layers. Deeper costs a decode step more launches; wider would leave too few of them."""

    num_attention_heads: int = 4
    """Query heads."""

    num_key_value_heads: int = 2
    """KV heads: even, so tensor parallelism over two ranks keeps whole heads. Two query heads share
    one KV head, a group size that every FlashInfer version has kernels for."""

    head_dim: int = 64
    """Elements of a head; FlashInfer takes 64, 128 and 256."""

    max_position_embeddings: int = 2048
    """Context in tokens; training windows are exactly this long."""

    rope_theta: float = 10_000.0
    """RoPE base."""

    rms_norm_eps: float = 1e-5
    """Epsilon of RMSNorm. 1e-5 instead of 1e-6 since bf16 serving rounds the squares."""

    @property
    def parameters(self) -> int:
        """Weights, with the embedding counted once because it is tied to the output."""
        attention = self.hidden_size * self.head_dim
        attention *= 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        return (
            self.vocab_size * self.hidden_size + self.num_hidden_layers * layer + self.hidden_size
        )


@dataclass(frozen=True)
class Training:
    """How the weights are learnt. The budget is time, so that a run ends annealed on any GPU."""

    train_s: float = 440.0
    """Seconds of optimisation over all pieces, compilation and checkpoints not counted. The
    learning rate follows the elapsed share of it."""

    max_piece_s: float = 520.0
    """Seconds of wall time after which one process saves and stops, to be resumed."""

    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints: what an interruption can cost."""

    batch_windows: int = 64
    """Windows a step: 64 x 2,048 = 131,072 tokens, enough to fill one large GPU."""

    aligned_share: float = 0.3
    """Share of windows that start at the start of a document, as every prompt does when served."""

    matrix_lr: float = 4e-3
    """Peak rate of Muon, in the units of AdamW (an update has RMS 0.2 times this)."""

    matrix_momentum: float = 0.95
    """Muon's (Nesterov) momentum."""

    other_lr: float = 3e-3
    """Peak rate of AdamW for the tied embedding and the norms."""

    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""

    weight_decay: float = 0.1
    """Decoupled decay of the matrices and of the embedding; norms are not decayed."""

    warmup_share: float = 0.02
    """Share of the budget over which the rate rises from 0."""

    decay_from: float = 0.4
    """Share of the budget after which the rate falls linearly to 0."""

    clip_norm: float = 1.0
    """Largest gradient norm."""

    seed: int = 20_24
    """Seed of the initial weights and of the order of windows."""


@dataclass(frozen=True)
class Corpus:
    """What is kept of the text that is found."""

    code_cap_bytes: int = 7_000_000
    """Most bytes kept of one project's code, so that no single project decides the style. The
    standard library and the manuals, which hold most of the English, are capped at twice this."""

    held_out_of: int = 100
    """One file in this many is held out of training, chosen by a hash of its name."""

    duplicate_line_chars: int = 40
    """Lines shorter than this (characters, stripped) say nothing about copying."""

    duplicate_share: float = 0.4
    """A file with more than this share of its long lines seen before is dropped."""

    held_out_duplicate_share: float = 0.1
    """The same for held-out files against the training text: stricter, it is a measurement."""

    chat_share: float = 0.22
    """Most of the training bytes that may be in the chat template's form."""

    tokenizer_sample_bytes: int = 60_000_000
    """Text that the tokenizer is trained on."""

    seed: int = 7
    """Seed of every random choice of the preparation."""


@dataclass(frozen=True)
class Settings:
    """All of the above."""

    shape: Shape = Shape()
    training: Training = Training()
    corpus: Corpus = Corpus()

    def as_json(self) -> dict[str, object]:
        """The settings as plain values, for the model card and for checkpoints."""
        return asdict(self)


SETTINGS = Settings()

MINIATURE = Settings(
    shape=Shape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=256
    ),
    training=Training(train_s=40.0, max_piece_s=30.0, checkpoint_every_s=8.0, batch_windows=4),
)
"""`--miniature`: the same path end to end on a CPU in about a minute, to rehearse with."""

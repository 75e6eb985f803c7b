"""How close a runner's logits are to float32's on the trained model, on text drawn anew each time.

Random weights give nearly flat distributions, on which any rounding moves the argmax; what counts
is a model whose distributions are peaked as those in use are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.model_config import ModelConfig
from engine.types import KvCacheDtype
from tests.engine.execution.harness import Harness

TINY = Path(__file__).resolve().parents[3] / "models" / "baton-tiny"


def load_tiny(
    device: str,
    dtype: torch.dtype,
    *,
    page_size: int = 16,
    graphs_up_to: int = 0,
    kv_cache_dtype: KvCacheDtype = "auto",
    deterministic: bool = False,
    tokens: int = 16_384,
) -> ModelRunner:
    return load_model_runner(
        ModelConfig.from_directory(TINY),
        model_path=str(TINY),
        device=torch.device(device),
        dtype=dtype,
        page_size=page_size,
        max_total_tokens=tokens,
        graphs_up_to=graphs_up_to,
        kv_cache_dtype=kv_cache_dtype,
        deterministic=deterministic,
    )


def random_texts(count: int, length: int) -> list[list[int]]:
    """Token ids of `count` pieces of Python code, anew at each call."""
    rng = random.SystemRandom()
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    files = [path for path in Path(random.__file__).parent.glob("*.py") if _size(path) > 20_000]
    pieces: list[list[int]] = []
    while len(pieces) < count:
        text = rng.choice(files).read_text(encoding="utf-8", errors="replace")
        start = rng.randrange(len(text) - 8 * length)
        ids = tokenizer.encode(text[start : start + 8 * length]).ids[:length]
        if len(ids) == length:
            pieces.append(ids)
    return pieces


@cache
def _size(path: Path) -> int:
    return path.stat().st_size


def forced(
    model: ModelRunner, texts: Sequence[Sequence[int]], *, prompt: int, chunk: int
) -> torch.Tensor:
    """[texts, positions, vocab] float32 on the CPU: logits after token `prompt` and each later one.
    The prompts are computed together, `chunk` tokens of each at a time, the rest as decode steps of
    the whole batch."""
    model.kv_pool.data.zero_()
    harness = Harness(model.kv_pool, max_rows=len(texts))
    rows = [harness.row(list(text)) for text in texts]
    for start in range(0, prompt, chunk):
        step = harness.extend(*((row, min(chunk, prompt - start)) for row in rows))
        logits = [model.forward_logits(step).cpu()]
    for _ in range(prompt, len(texts[0])):
        logits.append(model.forward_logits(harness.decode(*rows)).cpu())
    return torch.stack(logits, dim=1)


@cache
def reference() -> ModelRunner:
    return load_tiny("cpu", torch.float32)


@dataclass(frozen=True)
class Closeness:
    positions: int
    agreement: float
    """Share of positions whose argmax is float32's."""
    relative_error: float
    """Of all logits: norm of the difference over the norm."""
    worst: float
    """Where the argmax differs: float32's gap over the position's largest logit error."""

    def check(self, *, agreement: float = 0.99, relative_error: float = 2e-2) -> None:
        assert self.agreement >= agreement, self
        assert self.relative_error <= relative_error, self
        assert self.worst <= 2, self


def closeness(actual: torch.Tensor, expected: torch.Tensor) -> Closeness:
    """Of logits [..., vocab] to float32's."""
    actual, expected = actual.flatten(0, -2), expected.flatten(0, -2)
    chosen, best = actual.argmax(-1, keepdim=True), expected.argmax(-1, keepdim=True)
    differs = (chosen != best).squeeze(-1)
    gap = (expected.gather(-1, best) - expected.gather(-1, chosen)).squeeze(-1)[differs]
    error = (actual - expected).abs().amax(-1)[differs]
    return Closeness(
        positions=len(differs),
        agreement=1 - float(differs.float().mean()),
        relative_error=float((actual - expected).norm() / expected.norm()),
        worst=float((gap / error).max()) if bool(differs.any()) else 0.0,
    )

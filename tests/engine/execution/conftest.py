"""Checkpoints written once a session, and runners over small pools."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.model_config import ModelConfig
from tests.checkpoints import reference_model, write_checkpoint

PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of checkpoint → its directory; read-only for tests."""
    written: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in written:
            written[kind] = write_checkpoint(tmp_path_factory.mktemp(kind), kind)
        return written[kind]

    return write


@pytest.fixture
def runner(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelRunner]:
    """Kind of checkpoint → a float32 CPU runner with 128 pages."""

    def load(kind: str) -> ModelRunner:
        directory = checkpoint(kind)
        return load_model_runner(
            ModelConfig.from_directory(directory),
            model_path=str(directory),
            device=torch.device("cpu"),
            dtype=torch.float32,
            page_size=PAGE_SIZE,
            max_total_tokens=128 * PAGE_SIZE,
        )

    return load


@pytest.fixture(scope="session")
def reference_logits(
    checkpoint: Callable[[str], Path],
) -> Callable[[str, list[int]], torch.Tensor]:
    """(kind, tokens) → logits [tokens, vocab] of `transformers` in float32."""
    models: dict[str, Any] = {}

    def compute(kind: str, tokens: list[int]) -> torch.Tensor:
        if kind not in models:
            models[kind] = reference_model(checkpoint(kind))
        with torch.no_grad():
            logits: torch.Tensor = models[kind](torch.tensor([tokens])).logits[0]
        return logits

    return compute

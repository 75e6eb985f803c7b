"""On a CUDA device: bfloat16 and float8 KV against float32 on the trained model, on fresh text."""

from collections.abc import Sequence

import pytest
import torch

from engine.execution.flashinfer_attention import FlashInferAttention
from engine.execution.model_runner import ModelRunner
from engine.models.fused_ops import flashinfer_installed
from engine.types import KvCacheDtype
from tests.engine.execution.trained import closeness, forced, load_tiny, random_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not flashinfer_installed(), reason="flashinfer-python is not installed"),
]

TEXTS, LENGTH, PROMPT = 64, 224, 96
"""64 rows of 129 positions: 8,256, so that chance moves a share of 99 % by a tenth of a point."""


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return random_texts(TEXTS, LENGTH)


@pytest.fixture(scope="module")
def expected(texts: list[list[int]]) -> torch.Tensor:
    """float32 on the GPU, by plain torch, with products in full precision."""
    assert not torch.backends.cuda.matmul.allow_tf32
    return forced(load("float32"), texts, prompt=PROMPT, chunk=PROMPT)


def load(
    dtype: str = "bfloat16", *, page_size: int = 16, graphs: bool = False, kv: KvCacheDtype = "auto"
) -> ModelRunner:
    return load_tiny(
        "cuda",
        torch.float32 if dtype == "float32" else torch.bfloat16,
        page_size=page_size,
        graphs_up_to=TEXTS if graphs else 0,
        kv_cache_dtype=kv,
        tokens=TEXTS * 256,
    )


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("chunk", [24, 96])
def test_bfloat16_agrees_with_float32(
    chunk: int, graphs: bool, page_size: int, texts: Sequence[Sequence[int]], expected: torch.Tensor
) -> None:
    model = load(page_size=page_size, graphs=graphs)
    assert isinstance(model.attention, FlashInferAttention)
    close = closeness(forced(model, texts, prompt=PROMPT, chunk=chunk), expected)
    print(close)
    close.check()


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_float8_kv_stays_close_to_float32(
    graphs: bool, texts: Sequence[Sequence[int]], expected: torch.Tensor
) -> None:
    model = load(graphs=graphs, kv="fp8_e4m3")
    assert isinstance(model.attention, FlashInferAttention)
    close = closeness(forced(model, texts, prompt=PROMPT, chunk=48), expected)
    print(close)
    close.check(agreement=0.95, relative_error=8e-2)

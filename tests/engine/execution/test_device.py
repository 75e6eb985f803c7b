"""Choosing device, dtype, and the number of pages."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.execution import device as device_module
from engine.execution.device import kv_pool_pages, memory_report, resolve_device, resolve_dtype
from engine.model_config import ModelConfig
from engine.models.rope import RopeConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    context_length=4096,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(),
    checkpoint_dtype="float32",
)
PAGE_BYTES = 64 * 4 * 2 * 2 * 16 * 4


def pages(device: torch.device = CPU, **changes: Any) -> int:
    settings: dict[str, Any] = {"max_total_tokens": 0, "page_size": 64, **changes}
    return kv_pool_pages(CONFIG, dtype=torch.float32, device=device, **settings)


@pytest.fixture
def gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU: 1,000 pages in all, 600 of them free, 100 taken by this process."""
    figures = (600 * PAGE_BYTES, 1000 * PAGE_BYTES)
    monkeypatch.setattr(device_module, "_memory", lambda device: figures)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80 * PAGE_BYTES)
    monkeypatch.setattr(device_module, "CONTEXT_BYTES", 20 * PAGE_BYTES)
    monkeypatch.setattr(device_module, "SPARE_BYTES", 50 * PAGE_BYTES)


def test_auto_takes_float32_on_a_cpu_and_bfloat16_on_a_gpu() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", CUDA) == torch.bfloat16
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_cuda_without_a_gpu_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match="no usable GPU"):
        resolve_device("cuda")


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device_index is 2, but 2 GPUs"):
        resolve_device("cuda", 2)


def test_tokens_are_rounded_up_to_pages() -> None:
    assert pages(max_total_tokens=65) == 2
    assert pages() == 1024


@pytest.mark.usefixtures("gpu_memory")
def test_a_gpu_gives_what_the_fraction_leaves() -> None:
    # 500 allowed, 100 taken here, 100 reserved, 1 for padding.
    assert pages(CUDA, mem_fraction=0.5, reserved_bytes=100 * PAGE_BYTES) == 299


@pytest.mark.usefixtures("gpu_memory")
def test_what_others_took_of_a_shared_gpu_is_not_taken_again() -> None:
    # 800 allowed, but 600 free of which 50 are spared, 100 reserved, 1 for padding.
    assert pages(CUDA, mem_fraction=0.8, reserved_bytes=100 * PAGE_BYTES) == 449


@pytest.mark.usefixtures("gpu_memory")
def test_what_steps_were_measured_to_need_is_inside_the_fraction() -> None:
    # 500 allowed, 100 taken here, 120 for steps, 1 for padding.
    assert pages(CUDA, mem_fraction=0.5, steps_bytes=120 * PAGE_BYTES) == 279
    # 1,000 allowed, but 600 free, of which steps need 120.
    assert pages(CUDA, mem_fraction=1.0, steps_bytes=120 * PAGE_BYTES) == 479
    with pytest.raises(ConfigError, match="lower it"):
        pages(CUDA, max_total_tokens=500 * 64, steps_bytes=120 * PAGE_BYTES)


@pytest.mark.usefixtures("gpu_memory")
def test_the_report_adds_up_to_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = {"free": 600 << 30, "total": 1000 << 30}
    monkeypatch.setattr(device_module, "_memory", lambda device: (gib["free"], gib["total"]))
    line = memory_report(
        CUDA,
        parts={"weights": 100 << 30, "activations": 50 << 30},
        window_bytes=30 << 30,
        pool_bytes=200 << 30,
    )
    figures = [float(part.rsplit(" ", 1)[1]) for part in line.split(": ", 1)[1].split(", ")]
    assert figures == [100, 50, 200, 30, 520, 100]
    assert sum(figures) == 1000


@pytest.mark.usefixtures("gpu_memory")
def test_no_room_is_a_config_error_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"mem_fraction 0\.1 allows"):
        pages(CUDA, mem_fraction=0.1)
    with pytest.raises(ConfigError, match="max_total_tokens asks for"):
        pages(CUDA, max_total_tokens=601 * 64)
    assert pages(CUDA, max_total_tokens=599 * 64) == 599


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"page_size": 0}, "page_size"),
        ({"max_total_tokens": -1}, "max_total_tokens"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        pages(**changes)


def test_more_kv_heads_make_larger_pages() -> None:
    assert replace(CONFIG, num_kv_heads=8).kv_elements_per_token == 4 * CONFIG.kv_elements_per_token

"""Kernels that are built on first use, built once instead: in a directory that images and volumes
carry, with progress shown, before a worker says that it is ready.

FlashInfer compiles its kernels for the model's head size and dtypes with nvcc, for one to three
minutes of all cores; Triton compiles ours in seconds. Both look into their caches first.
"""

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.execution.progress import progress_bar
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import flashinfer_library

_POLL_S = 0.5


def use_kernel_cache(directory: str) -> None:
    """FlashInfer and Triton keep what they build in `directory` from now on; empty: where they do
    anyway. To be called before either is imported; what the environment says goes first."""
    if directory:
        root = Path(directory).expanduser()
        os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(root))
        os.environ.setdefault("TRITON_CACHE_DIR", str(root / "triton"))


def build_kernels(
    config: ModelConfig,
    kv_pool: PageMajorKVPool,
    *,
    deterministic: bool,
    progress: Callable[[str], None],
) -> None:
    """Builds what FlashInfer needs for this model and is not in its cache. Raises ConfigError where
    that fails, with the compiler's last words."""
    shapes = [] if deterministic else [(kv_pool.compute_dtype, config.head_dim, kv_pool.is_fp8)]
    build_all(shapes, kv_pool.device, progress=progress)


def build_all(
    shapes: Sequence[tuple[torch.dtype, int, bool]],
    device: torch.device,
    *,
    progress: Callable[[str], None],
) -> int:
    """As `build_kernels` for several (dtype, head_dim, KV in float8) together; how many modules
    were built."""
    specs = [spec for spec in _specs(shapes, device) if not spec.is_compiled]
    if not specs:
        return 0
    sources = sum(len(spec.sources) for spec in specs)
    failed: list[Exception] = []

    def build() -> None:
        try:
            importlib.import_module("flashinfer.jit.core").build_jit_specs(specs, verbose=False)
        except Exception as error:
            failed.append(error)

    builder = threading.Thread(target=build, name="kernel-builder", daemon=True)
    builder.start()
    shown = -1
    while builder.is_alive():
        built = _objects(specs)
        if built != shown:
            progress(progress_bar("building kernels", min(built, sources), sources))
            shown = built
        builder.join(_POLL_S)
    if failed:
        raise ConfigError(
            f"FlashInfer's kernels cannot be built: {_last_words(failed[0])}; is nvcc there "
            "(CUDA_HOME), and can the kernel cache be written (--kernel-cache)?"
        ) from failed[0]
    return len(specs)


def _specs(shapes: Sequence[tuple[torch.dtype, int, bool]], device: torch.device) -> list[Any]:
    flashinfer_library()
    jit: Any = importlib.import_module("flashinfer.jit")
    specs = [
        importlib.import_module("flashinfer.jit.norm").gen_norm_module(),
        importlib.import_module("flashinfer.jit.activation").gen_act_and_mul_module("silu"),
    ]
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for dtype, head_dim, fp8 in shapes:
        kv_dtype = torch.float8_e4m3fn if fp8 else dtype
        for backend in ("fa2", "fa3") if hopper and not fp8 else ("fa2",):
            specs.append(
                jit.gen_batch_prefill_module(
                    *(backend, dtype, kv_dtype, dtype, torch.int32, head_dim, head_dim),
                    *(0, False, False, False),  # no rotation, window, cap or fp16 products
                )
            )
    return specs


def _objects(specs: Sequence[Any]) -> int:
    return sum(len(list(Path(spec.build_dir).rglob("*.o"))) for spec in specs)


def _last_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or [repr(error)])[-1][:300]

"""Kernels that are built on first use, built once instead: in a directory that images and volumes
carry, with progress shown, before a worker says that it is ready.

FlashInfer compiles its kernels for the model's head size and dtypes with nvcc, for one to three
minutes of all cores; Triton compiles ours in seconds. Both look into their caches first.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.execution.progress import progress_bar
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import flashinfer_library
from engine.models.remembered_choices import keep_choices_in
from native.library import keep_builds_in

_POLL_S = 0.5

_AT_ONCE = 3
"""Modules built at a time, each by as many compilers as there are cores: the last file of one takes
a minute, and others use the cores meanwhile."""


def use_kernel_cache(directory: str) -> None:
    """FlashInfer, Triton and the CPU's library keep what they build in `directory` from now on;
    empty: where they do anyway. To be called before any is imported; what the environment says goes
    first."""
    keep_builds_in(directory)
    keep_choices_in(directory)
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
    specs = [spec for spec in _specs(shapes, device) if not spec.is_aot]
    missing = [spec for spec in specs if not spec.is_compiled]
    sources = sum(len(spec.sources) for spec in missing)
    # What is there is asked, too: its sources may have changed, and then it would be built in the
    # middle of the first step. One by one in its own directory, since ninja keeps its books there.
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kernel-builder") as builders:
        building = [builders.submit(spec.build, verbose=False) for spec in specs]
        shown = -1
        while wait(building, timeout=_POLL_S).not_done:
            built = _objects(missing)
            if missing and built != shown:
                progress(progress_bar("building kernels", min(built, sources), sources))
                shown = built
    for build in building:
        error = build.exception()
        if error is not None:
            raise ConfigError(
                f"FlashInfer's kernels cannot be built: {_last_words(error)}; is nvcc there "
                "(CUDA_HOME), and can the kernel cache be written (--kernel-cache)?"
            ) from error
    return len(missing)


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


def _last_words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or [repr(error)])[-1][:300]

"""Builds the C sources beside it with the machine's compiler, once, and loads them: the one door.

A few seconds of compiling buy steps a third as long on a CPU. Nothing depends on it: where
there is no compiler, or the cache cannot be written, plain torch computes the same, and the log
says so.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_HEADER = _HERE / "cpu_vectors.h"
_SOURCES = tuple(_HERE / f"cpu_{name}.c" for name in ("kernels", "products", "attention"))

# Not -ffast-math: sums would be taken in any order, its quick reciprocals make NaN of 1 / infinity,
# and at the link it switches denormals off for the whole process.
_COMPILE = (
    "-O3 -march=native -fno-trapping-math -fno-math-errno -fopenmp -fPIC -std=gnu11 -c"
).split()
_LINK = "-shared -lm -Wl,-z,defs".split()

_BUILD_LIMIT_S = 60

_directories: list[Path] = []


class CpuLibrary:
    """The functions of the C sources; sizes are int64, pointers are of contiguous memory."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.add_rms_norm = library.add_rms_norm
        self.add_rms_norm.argtypes = [*[pointer] * 4, size, size, ctypes.c_float]
        self.silu_and_mul = library.silu_and_mul
        self.silu_and_mul.argtypes = [pointer, pointer, size, size]
        self.rotate_and_store = library.rotate_and_store
        self.rotate_and_store.argtypes = [*[pointer] * 6, *[size] * 4]
        self.linear_bfloat16 = library.linear_bfloat16
        self.linear_float32 = library.linear_float32
        for product in (self.linear_bfloat16, self.linear_float32):
            product.argtypes = [*[pointer] * 4, *[size] * 3]
        self.decode_attention = library.decode_attention
        self.decode_attention.argtypes = [
            *(pointer, size, pointer, pointer, size, pointer, pointer),
            *[size] * 5,
        ]
        for function in vars(self).values():
            function.restype = None


def keep_builds_in(directory: str) -> None:
    """Where the library is kept from now on; empty: in the user's cache directory."""
    _directories[:] = [Path(directory).expanduser() / "cpu"] if directory else []


@cache
def cpu_library() -> CpuLibrary | None:
    """None, and a line in the log, where it cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        logger.info("no C compiler (cc): CPU decode runs on plain torch, which is slower")
        return None
    try:
        return CpuLibrary(_built(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        logger.warning("CPU decode runs on plain torch, which is slower: %s", words)
        return None


def _built(compiler: str) -> Path:
    """The library for these sources, compiler, torch and processor; built where it is not there."""
    runtime = _openmp_of_torch()
    texts = [path.read_text() for path in (_HEADER, *_SOURCES)]
    about = [*texts, *_COMPILE, *_LINK, compiler, *runtime, torch.__version__, _cpu()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    directory = _directories[0] if _directories else _user_cache()
    built = directory / f"{name}.so"
    if built.is_file():
        return built
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in _SOURCES]
        for source, compiled in zip(_SOURCES, objects, strict=True):
            _run([compiler, *_COMPILE, str(source), "-o", compiled])
        linked = Path(scratch) / "kernels.so"
        _run([compiler, *objects, *runtime, *_LINK, "-o", str(linked)])
        # Several engines may build at once: whoever is last replaces the same by the same.
        linked.replace(built)
    return built


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)


def _openmp_of_torch() -> list[str]:
    """torch brings its own OpenMP runtime; with a second one there would be twice the threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else ["-lgomp"]


def _user_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "baton" / "cpu"


def _cpu() -> str:
    """What -march=native depends on; a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))

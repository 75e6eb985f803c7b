"""The C sources beside it, compiled, as functions: the one door."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from native.levels import level_here
from native.library import CSources, load

_HERE = Path(__file__).parent

SOURCES = CSources(
    name="engine",
    sources=tuple(_HERE / f"cpu_{name}.c" for name in ("kernels", "products", "attention")),
    headers=(_HERE / "cpu_vectors.h",),
    openmp=True,
    otherwise="CPU decode runs on plain torch, which is slower",
)


class CpuLibrary:
    """The functions of the C sources; sizes are int64, pointers are of contiguous memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
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


@cache
def cpu_library() -> CpuLibrary | None:
    """None, and a line in the log, where it cannot be had."""
    library = load(SOURCES)
    return None if library is None else CpuLibrary(library)


def cpu_arithmetic(dtype: torch.dtype) -> str:
    """In words, what the last bits of a CPU's steps hang on."""
    compiled = dtype is torch.float32 and cpu_library() is not None
    return f"{'compiled steps' if compiled else 'torch'} on {level_here() or 'any processor'}"

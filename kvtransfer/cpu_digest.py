"""Seals of pages in a host's memory by the C source beside it, copied in the same pass.

Without it (native/library.py says when) numpy computes the same digests, at half the speed where
pages are sealed and with a pass of its own where they are copied.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from native.library import CSources, load

SOURCES = CSources(
    name="digest",
    sources=(Path(__file__).parent / "cpu_digest.c",),
    otherwise="KV pages in host memory are sealed and checked by numpy, which is slower",
)


class CpuDigest:
    """`cpu_digest.c`. Other threads run meanwhile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._function: Callable[..., None] = library.copy_and_digest
        library.copy_and_digest.argtypes = [*[pointer] * 3, size, *[pointer] * 4, size, size]
        library.copy_and_digest.restype = None

    def __call__(
        self,
        source: int,
        target: int | None,
        *,
        table: npt.NDArray[np.int64],
        weights: "CpuWeights",
    ) -> npt.NDArray[np.int64]:
        """Digests of pages at address `source`, which are copied to `target` unless that is None. A
        line of `table`: source page, target page, valid words of a row. The rest stays as it is."""
        digests = np.empty(len(table), dtype=np.int64)
        self._function(
            *(source, target, table.ctypes.data, len(table), digests.ctypes.data),
            *(weights.rows.ctypes.data, weights.low.ctypes.data, weights.high.ctypes.data),
            *(len(weights.rows), len(weights.low)),
        )
        return digests


class CpuWeights:
    """A layout's weights; those of words in halves that add up, both signed."""

    def __init__(self, rows: npt.NDArray[np.int64], words: npt.NDArray[np.int64]) -> None:
        self.rows = rows
        self.low = words.astype(np.int32)
        self.high = ((words - self.low) >> 32).astype(np.int32)


@cache
def cpu_digest() -> CpuDigest | None:
    """None, and a line in the log, where it cannot be had."""
    library = load(SOURCES)
    return None if library is None else CpuDigest(library)

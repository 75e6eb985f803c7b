"""The levels that x86-64 processors are built for, from what their vector units have.

An image is built once and runs on many processors: a library a level, and at run time the highest
that the processor has. The names are the compiler's (-march=) and the x86-64 psABI's.
"""

import platform
from pathlib import Path

_NEEDS = {
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"),
}
"""Highest first: flags as /proc/cpuinfo names them, beyond the next level's."""


def levels() -> tuple[str, ...]:
    """What libraries are built for on this kind of machine; none where it is of another kind."""
    return tuple(_NEEDS) if platform.machine() == "x86_64" else ()


def level_here() -> str:
    """The highest level of this processor; empty where it has none."""
    return level_of(_flags())


def level_of(flags: set[str]) -> str:
    found = ""
    for level, needs in reversed(_NEEDS.items()):
        if not flags.issuperset(needs):
            break
        found = level
    return found


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())

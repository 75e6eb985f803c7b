"""C sources as a library for this processor: built once by the machine's compiler, or found built.

A few seconds of compiling buy steps a third as long on a CPU. Nothing depends on it: where
there is neither a compiler nor a library built before (native/prebuilt.py), or the cache cannot be
written, whoever asked computes the same without it, and the log says so.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from native.levels import level_here
from native.prebuilt import prebuilt_directory

logger = logging.getLogger(__name__)

# Not -ffast-math: sums would be taken in any order, its quick reciprocals make NaN of 1 / infinity,
# and at the link it switches denormals off for the whole process.
_COMPILE = "-O3 -fno-trapping-math -fno-math-errno -fPIC -std=gnu11 -c".split()
_LINK = "-shared -lm -Wl,-z,defs".split()

_BUILD_LIMIT_S = 60

_directories: list[Path] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class CSources:
    """What becomes one library."""

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    openmp: bool = False
    """Whether it shares its work among torch's threads."""
    otherwise: str
    """What becomes of it where there is no library, for the log."""


def keep_builds_in(directory: str) -> None:
    """Where libraries are kept from now on; empty: in the user's cache directory."""
    _directories[:] = [Path(directory).expanduser() / "cpu"] if directory else []


def load(what: CSources) -> ctypes.CDLL | None:
    """None, and a line in the log, where it cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return _prebuilt(what)
    try:
        return ctypes.CDLL(str(_built(what, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or error
        logger.warning("%s: %s", what.otherwise, words)
        return None


def _prebuilt(what: CSources) -> ctypes.CDLL | None:
    level = level_here()
    path = prebuilt_directory() / file_name(what, level)
    if not path.is_file():
        logger.info("no C compiler (cc): %s", what.otherwise)
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s: %s", what.otherwise, error)
        return None
    logger.info("%s: built before, for %s", what.name, level)
    return library


def file_name(what: CSources, level: str) -> str:
    """Of the library for these sources, torch and level (native/levels.py), built before."""
    return f"{what.name}-{level}-{_digest(what, level)}.so"


def _digest(what: CSources, *about: str) -> str:
    texts = [path.read_text() for path in (*what.headers, *what.sources)]
    runtime = [Path(path).name for path in _runtime(what)]
    made_of = "\n".join([*texts, *_COMPILE, *_LINK, *runtime, *about])
    return hashlib.sha256(made_of.encode()).hexdigest()[:24]


def _built(what: CSources, compiler: str) -> Path:
    """The library for these sources, compiler, torch and processor; built where it is not there."""
    directory = _directories[0] if _directories else _user_cache()
    built = directory / f"{what.name}-{_digest(what, compiler, *_runtime(what), _cpu())}.so"
    if not built.is_file():
        build(what, built, compiler=compiler, target="native")
    return built


def build(what: CSources, path: Path, *, compiler: str, target: str) -> None:
    """`target`: as -march= has it. Raises OSError or subprocess.SubprocessError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    flags = [*_COMPILE, f"-march={target}", *(["-fopenmp"] if what.openmp else [])]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in what.sources]
        for source, compiled in zip(what.sources, objects, strict=True):
            _run([compiler, *flags, str(source), "-o", compiled])
        linked = Path(scratch) / "library.so"
        _run([compiler, *objects, *_runtime(what), *_LINK, "-o", str(linked)])
        # Several engines may build at once: whoever is last replaces the same by the same.
        linked.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)


def _runtime(what: CSources) -> list[str]:
    """torch brings its own OpenMP runtime; with a second one there would be twice the threads."""
    if not what.openmp:
        return []
    torch = importlib.util.find_spec("torch")
    places = [] if torch is None else torch.submodule_search_locations or []
    found = sorted(file for place in places for file in Path(place, "lib").glob("libgomp*.so*"))
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

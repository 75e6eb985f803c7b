"""Writes deploy/requirements/*.txt: what the images install, every version and hash.

The inputs are pyproject.toml's own lists, so an image cannot drift from the package; a test
(tests/deploy/test_locks.py) says when they have. torch's CPU build lies on no package index: its
lock is a file of its own, written from a wheel in deploy/wheels or from PyTorch's index.

Usage: python tools/lock_images.py [--upgrade]   (needs `uv`: pip install uv)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "requirements"
WHEELS = ROOT / "deploy" / "wheels"
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_TORCH = "torch==2.13.0"
NVCC = (
    "nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-cccl==13.0.*"
)
"""Compiler and headers of torch's own CUDA release, with which FlashInfer builds its kernels."""
BUILD = "pip setuptools>=77 wheel"
"""What builds the image and is not in it."""

PYTHON = "3.11"
"""Of the base image: the hashes of its own wheels are checked, and no others."""
PLATFORM = "x86_64-manylinux_2_36"
"""Debian 12, the base of all images."""


@dataclass(frozen=True, kw_only=True)
class Lock:
    """One file of deploy/requirements."""

    name: str
    extra: str = ""
    """Extras of pyproject.toml beside its dependencies, with commas between."""
    more: str = ""
    """Requirements beside those of pyproject.toml."""
    pin: str = ""
    """A version that the rest has to fit."""
    torch_apart: bool = False
    """torch goes into torch-cpu.txt: it comes from elsewhere than all others."""
    project: bool = True
    """Whether pyproject.toml's dependencies are part of it."""


LOCKED = (
    Lock(name="build", more=BUILD, project=False),
    Lock(name="router", extra="redis,kubernetes,otel"),
    Lock(name="worker-cpu", extra="worker", pin=CPU_TORCH, torch_apart=True),
    Lock(name="worker-cuda", extra="cuda", pin=CUDA_TORCH, more=NVCC),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Locks the images' requirements.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade
    beside = Path(sys.executable).parent / "uv"
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        print("lock: uv is not installed; pip install uv", file=sys.stderr)
        return 1
    LOCKS.mkdir(parents=True, exist_ok=True)
    for lock in LOCKED:
        write(uv, lock, upgrade=upgrade)
    return 0


def write(uv: str, lock: Lock, *, upgrade: bool) -> None:
    """Resolves one lock and writes it, the versions of the present file kept where they fit."""
    target = LOCKS / f"{lock.name}.txt"
    with tempfile.TemporaryDirectory() as folder:
        more = Path(folder) / "more.in"
        more.write_text("".join(f"{line}\n" for line in lock.more.split()))
        pins = Path(folder) / "pins.txt"
        pins.write_text(f"{lock.pin}\n" if lock.pin else "")
        run(
            uv,
            *(["pyproject.toml"] if lock.project else []),
            str(more),
            *("--constraint", str(pins)),
            *(word for extra in lock.extra.split(",") if extra for word in ("--extra", extra)),
            *(["--upgrade"] if upgrade else []),
            *(torch_source() if lock.torch_apart else []),
            *("--output-file", str(target)),
        )
    packages = split(target.read_text())
    if lock.torch_apart:
        save(LOCKS / "torch-cpu.txt", [packages.pop("torch")])
    save(target, list(packages.values()))


def split(text: str) -> dict[str, str]:
    """The lines of each package, its hashes among them, by its name."""
    packages: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            name = line.partition("==")[0]
        packages[name] = packages.get(name, "") + line
    return packages


def save(target: Path, packages: list[str]) -> None:
    target.write_text(f"# Written by `make lock`: what the images install.\n{''.join(packages)}")
    print(f"{target.relative_to(ROOT)}: {len(packages)} packages")


def torch_source() -> list[str]:
    if any(WHEELS.glob("torch-*.whl")):
        return ["--find-links", str(WHEELS)]
    return ["--index", CPU_TORCH_INDEX, "--index-strategy", "unsafe-best-match"]


def run(uv: str, *arguments: str) -> None:
    subprocess.run(
        [
            *(uv, "pip", "compile", "--quiet", "--no-config", "--generate-hashes"),
            *("--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
            *("--only-binary", ":all:"),
            *("--python-version", PYTHON, "--python-platform", PLATFORM),
            *arguments,
        ],
        cwd=ROOT,
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main())

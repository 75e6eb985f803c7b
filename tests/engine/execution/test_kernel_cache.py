"""Building kernels before the first step, with a stand-in for the library that builds them."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.execution import kernel_cache


class FakeSpec:
    """A module of two sources that is built in its own directory."""

    is_aot = False

    def __init__(self, directory: Path, *, error: str = "") -> None:
        self.build_dir = directory
        self.sources = ["a.cu", "b.cu"]
        self.builds = 0
        self.error = error
        self.seen = threading.Event()

    @property
    def is_compiled(self) -> bool:
        return (self.build_dir / "module.so").exists()

    def build(self, *, verbose: bool) -> None:
        self.builds += 1
        if self.error:
            raise RuntimeError(self.error)
        if not self.is_compiled:
            self.build_dir.mkdir()
            (self.build_dir / "a.o").touch()
            assert self.seen.wait(20)
            (self.build_dir / "module.so").touch()


def use(monkeypatch: pytest.MonkeyPatch, *specs: Any) -> None:
    monkeypatch.setattr(kernel_cache, "_specs", lambda shapes, device: list(specs))
    monkeypatch.setattr(kernel_cache, "_POLL_S", 0.01)


CPU = torch.device("cpu")


def test_progress_is_shown_while_kernels_are_built_and_a_second_start_builds_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = FakeSpec(tmp_path / "attention")
    use(monkeypatch, spec)
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if line.endswith("1/2"):
            spec.seen.set()

    assert kernel_cache.build_all([], CPU, progress=progress) == 1
    assert lines[-1] == "building kernels [##########..........] 1/2"
    assert kernel_cache.build_all([], CPU, progress=progress) == 0
    assert spec.builds == 2, "the second start asks whether its sources have changed"


def test_a_build_that_fails_names_the_compilers_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, FakeSpec(tmp_path / "norm", error="ninja\nnvcc: error: no such file\nstopped"))
    with pytest.raises(ConfigError, match=r"nvcc: error: no such file.*--kernel-cache"):
        kernel_cache.build_all([], CPU, progress=lambda line: None)


def test_the_cache_directory_does_not_override_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE", raising=False)
    kernel_cache.use_kernel_cache(str(tmp_path))
    import os

    assert os.environ.pop("FLASHINFER_WORKSPACE_BASE") == str(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"

"""A worker without a compiler runs what its image was built with."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from engine.models import cpu_library as engine_library
from kvtransfer import cpu_digest as digest_library
from kvtransfer.cpu_digest import CpuDigest
from kvtransfer.digest import _compiled_weights, _numpy, _table
from kvtransfer.layout import PageLayout
from native import library
from native.levels import level_here
from worker import prebuilt
from worker.config import WorkerConfig
from worker.rank_model import arithmetic_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or not level_here(),
    reason="needs a C compiler (cc) and x86-64, for which images are built",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("image") / "prebuilt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prebuilt, "prebuilt_directory", lambda: directory)
        patch.setattr(prebuilt, "levels", lambda: (level_here(),))  # each takes seconds
        assert prebuilt.main() == 0
    return directory


@pytest.fixture
def in_image(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, and nothing remembered."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr(library, "prebuilt_directory", lambda: built)


def test_a_level_has_both_libraries(built: Path) -> None:
    names = sorted(path.name.rsplit("-", 1)[0] for path in built.iterdir())
    assert names == [f"digest-{level_here()}", f"engine-{level_here()}"]


def test_everybody_may_read_them(built: Path) -> None:
    """An image is built by root, and runs as somebody else."""
    assert built.stat().st_mode & 0o005 == 0o005
    assert all(path.stat().st_mode & 0o004 for path in built.iterdir())


@pytest.mark.usefixtures("in_image")
def test_a_worker_without_a_compiler_finds_them() -> None:
    assert library.load(engine_library.SOURCES) is not None
    assert library.load(digest_library.SOURCES) is not None


def test_levels_digest_alike(tmp_path: Path) -> None:
    layout = PageLayout(layers=2, page_size=16, kv_heads=3, head_dim=20, itemsize=2)
    pool = torch.randint(0, 256, (3, layout.page_bytes), dtype=torch.uint8)
    pages, valid = [2, 0, 1], [16, 7, 1]
    wanted = _numpy(pool, pages, valid, layout).view(-1)
    table = _table(pages, pages, valid)
    table[:, 2] *= layout.token_bytes // 4
    for level in {"x86-64-v2", level_here()}:
        path = tmp_path / f"{level}.so"
        library.build(digest_library.SOURCES, path, compiler="cc", target=level)
        digest = CpuDigest(ctypes.CDLL(str(path)))
        found = digest(pool.data_ptr(), None, table=table, weights=_compiled_weights(layout))
        assert torch.equal(torch.from_numpy(found), wanted), level


def test_deterministic_workers_must_compute_steps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without compiled steps greedy tokens are the same, but not every bit."""

    def arithmetic(*, deterministic: bool, compiled: bool) -> str:
        found = object() if compiled else None
        monkeypatch.setattr(engine_library, "cpu_library", lambda: found)
        return arithmetic_of(
            WorkerConfig(model="m", deterministic=deterministic), torch.float32, CPU
        )

    with_steps = arithmetic(deterministic=True, compiled=True)
    assert (
        with_steps
        == f"torch.float32 kv torch.float32 deterministic by compiled steps on {level_here()}"
    )
    assert arithmetic(deterministic=True, compiled=False) != with_steps
    plain = arithmetic(deterministic=False, compiled=False)
    assert plain == arithmetic(deterministic=False, compiled=True)

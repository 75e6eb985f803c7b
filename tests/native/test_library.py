"""A C source becomes a library once, by this machine's compiler or with an image; or the log says
that it did not."""

import ctypes
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from native import library as module
from native.levels import level_here, level_of, levels
from native.library import CSources, build, file_name, keep_builds_in, load

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): there is nothing to build with"
)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """Where libraries are kept meanwhile."""
    keep_builds_in(str(tmp_path / "kept"))
    yield tmp_path / "kept" / "cpu"
    keep_builds_in("")


@pytest.fixture
def source(tmp_path: Path) -> CSources:
    file = tmp_path / "twice.c"
    file.write_text("long twice(long x) { return 2 * x; }\n")
    return CSources(name="twice", sources=(file,), otherwise="numbers are doubled by hand")


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in an image: the directory in which libraries would lie that were built with it."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "prebuilt_directory", lambda: tmp_path / "prebuilt")
    return tmp_path / "prebuilt"


def twice(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.twice(21))


def test_it_is_built_once(kept: Path, source: CSources, monkeypatch: pytest.MonkeyPatch) -> None:
    assert twice(load(source)) == 42
    [built] = kept.iterdir()
    assert built.suffix == ".so"
    monkeypatch.setattr(module, "_run", lambda command: pytest.fail("built again"))
    assert twice(load(source)) == 42


def test_a_source_that_changed_is_built_anew(kept: Path, source: CSources) -> None:
    load(source)
    source.sources[0].write_text("long twice(long x) { return x + x; }\n")
    assert twice(load(source)) == 42
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_that_works_the_log_says_what_becomes_of_it(
    compiler: str,
    kept: Path,
    source: CSources,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert load(source) is None
    assert source.otherwise in caplog.text
    assert compiler in caplog.text
    assert not list(kept.iterdir())


@pytest.mark.skipif(not levels(), reason="levels are of x86-64")
def test_without_a_compiler_the_library_of_the_image_is_taken(
    source: CSources, without_compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    level = level_here()
    build(source, without_compiler / file_name(source, level), compiler="cc", target=level)
    with caplog.at_level(logging.INFO):
        assert twice(load(source)) == 42
    assert f"built before, for {level}" in caplog.text


def test_a_library_of_other_sources_is_not_taken(
    source: CSources, without_compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    level = level_here()
    build(source, without_compiler / file_name(source, level), compiler="cc", target="native")
    source.sources[0].write_text("long twice(long x) { return 3 * x; }\n")
    with caplog.at_level(logging.INFO):
        assert load(source) is None
    assert source.otherwise in caplog.text


def test_the_highest_level_is_taken_whose_every_flag_is_there() -> None:
    second = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
    third = f"{second} avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
    fourth = f"{third} avx512f avx512bw avx512cd avx512dq avx512vl"
    found = [level_of(set(flags.split())) for flags in ("sse", second, third, fourth)]
    assert found == ["", "x86-64-v2", "x86-64-v3", "x86-64-v4"]
    assert level_of(set(fourth.split()) - {"fma"}) == "x86-64-v2"

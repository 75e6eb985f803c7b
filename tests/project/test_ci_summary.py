"""The summary that continuous integration ends with: no failure and no omission is lost."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

SUMMARY = Path(__file__).resolve().parents[2] / ".ci" / "summary.py"

PASSED = """\
SKIPPED [1] tests/a/test_b.py:7: needs a CUDA device; torch sees none
=========== 10 passed, 1 skipped, 3 deselected, 2 warnings in 61.00s (0:01:01) ===========
"""
FAILED = """\
FAILED tests/a/test_b.py::test_c - AssertionError: late
ERROR tests/a/test_b.py::test_d - OSError
=============== 1 failed, 8 passed, 1 error in 5.21s ===============
"""
AGAIN = "=============== 2 passed, 9 deselected in 1.21s ===============\n"


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("ci_summary", SUMMARY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ci_summary", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path)
    monkeypatch.setattr("sys.argv", ["summary.py", "100"])
    return module


def suite(directory: Path, name: str, status: int, *logs: str) -> None:
    with (directory / "order").open("a") as order:
        order.write(f"{name} ")
    (directory / f"{name}.result").write_text(f"{status} 60")
    for ending, text in zip(("log", "again.log"), logs, strict=False):
        (directory / f"{name}.{ending}").write_text(text)


def run(
    summary: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str], str]:
    status = summary.main()
    lines = capsys.readouterr().out.splitlines()
    return status, lines, lines[-1].strip("= ")


def test_suites_that_passed_are_added_up_and_skips_named(
    summary: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite(tmp_path, "test", 0, PASSED)
    suite(tmp_path, "test-helm", 0, AGAIN)
    status, lines, last = run(summary, capsys)
    assert (status, last) == (0, "12 passed, 1 skipped in 100.00s")
    assert any("needs a CUDA device" in line for line in lines)


def test_what_passed_when_it_was_tried_again_is_named_and_counted_once(
    summary: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite(tmp_path, "test", 0, FAILED, AGAIN)
    status, lines, last = run(summary, capsys)
    assert (status, last) == (0, "10 passed in 100.00s")
    assert sum("passed when it was tried again" in line for line in lines) == 2


def test_what_fails_twice_has_failed(
    summary: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = FAILED.replace("8 passed, 1 error", "1 passed").replace("ERROR", "#")
    suite(tmp_path, "test", 1, FAILED, second)
    status, lines, last = run(summary, capsys)
    assert (status, last) == (1, "1 failed, 9 passed in 100.00s")
    assert [line for line in lines if line.startswith("flaky") and "test_d" in line]


@pytest.mark.parametrize("text", ["", "setup: pip failed\n", PASSED])
def test_a_suite_that_ends_without_a_verdict_counts_as_an_error(
    summary: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    suite(tmp_path, "test-k8s", 124, text)
    status, _, last = run(summary, capsys)
    assert status == 1
    assert "1 error" in last


def test_a_suite_that_is_left_out_says_why(
    summary: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite(tmp_path, "test", 0, AGAIN)
    suite(tmp_path, "test-compose", 0)
    (tmp_path / "test-compose.left-out").write_text("no container engine answers\n")
    status, lines, last = run(summary, capsys)
    assert (status, last) == (0, "2 passed in 100.00s")
    assert any("left out: no container engine answers" in line for line in lines)

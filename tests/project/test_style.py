"""Style, types, layers and generated code are held by tools; these tests run the tools."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAX_LINES = 500
"""400 ask for a second look; here a file holds two concepts."""
SOURCE_FOLDERS = (
    "baton",
    "decode_service",
    "engine",
    "kvtransfer",
    "native",
    "observability",
    "prefill_service",
    "protos",
    "router",
    "unified_service",
    "worker",
)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".proto", ".sh", ".json", ".cfg", ".txt"}
MACHINE_PATHS = re.compile(
    r"(?<![\w.~$}])/(?:home/[a-z]\w*|root|Users/\w+|work|opt/(?:pypi|wheels))(?![\w-])"
)
"""Absolute paths that exist on one developer's or one build machine only."""


def run_tool(*command: str) -> None:
    """Runs a tool of the environment at the root; its output is the failure's message."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def project_files() -> list[Path]:
    """Files that git tracks or would track; without git, all but caches."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        hidden = {".venv", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        return [path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.parts)]
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", ".")


def test_the_code_is_formatted() -> None:
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.timeout(600)
def test_mypy_strict_finds_nothing() -> None:
    run_tool("mypy")


def test_the_layers_hold() -> None:
    run_tool("lint-imports")


def test_generated_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate_protos.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = ROOT / "protos" / "baton" / "v1"
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos/baton/v1").iterdir()}
    present = {path.name: path.read_text() for path in folder.iterdir() if is_generated(path)}
    stale = sorted(
        name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name)
    )
    assert not stale, f"run `make protos`; out of date: {', '.join(stale)}"


def test_the_api_reference_is_what_the_doors_take() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "api_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run `make docs`\n{done.stdout}{done.stderr}"


def test_a_source_file_is_one_concept() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not is_generated(path)
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines: {long}"


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES
        and path != Path(__file__).resolve()
        and not path.is_relative_to(ROOT / "models")
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        )
        if MACHINE_PATHS.search(line)
    ]
    assert not found, "\n".join(found)

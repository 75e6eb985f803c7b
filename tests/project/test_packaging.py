"""The distribution and the two commands on a fresh machine."""

import subprocess
import tomllib
from pathlib import Path

import baton

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_written_alike_in_both_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == baton.__version__


def test_every_package_ships_its_type_marker() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["importlinter"]["root_packages"]:
        assert (ROOT / package / "py.typed").is_file(), package


def test_importing_the_client_loads_neither_torch_nor_numpy() -> None:
    import sys

    code = "import sys, baton; print(sorted({'torch', 'numpy', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_make_help_lists_the_two_commands() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make demo" in done.stdout
    assert "make test" in done.stdout

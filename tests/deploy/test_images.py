"""What the images are made of, without building them: locks, the Dockerfile, a router's imports."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy" / "requirements"
IMAGES = {
    "router": ["redis", "kubernetes", "otel"],
    "worker-cpu": ["worker"],
    "worker-cuda": ["cuda"],
}
"""Extras of pyproject.toml in each image."""

ELSEWHERE = {"matplotlib", "nixl", "google"}
"""Of the extra `bench`, another name of nixl_cu13's package, and protobuf's name space."""

LINUX = {
    "python_version": "3.11",
    "python_full_version": "3.11.0",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "sys_platform": "linux",
    "extra": "",
}


def locked(*names: str) -> dict[str, str]:
    """Version of each package that these lock files name."""
    return {
        canonicalize_name(name): version
        for file in names
        for name, version in re.findall(
            r"^([\w.-]+)==([^\s;]+)", (LOCKS / f"{file}.txt").read_text(), flags=re.MULTILINE
        )
    }


def wanted(extras: list[str]) -> list[Requirement]:
    """pyproject.toml's dependencies and those of the extras, extras of extras among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(map(Requirement, project["dependencies"]))
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == project["name"]:
                found += wanted(sorted(requirement.extras))
            else:
                found.append(requirement)
    return [r for r in found if r.marker is None or r.marker.evaluate(LINUX)]


@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_holds_what_the_package_needs(image: str) -> None:
    """`make lock` where this fails: a dependency was added or its range changed."""
    files = [image] + (["torch-cpu"] if image == "worker-cpu" else [])
    versions = locked(*files)
    for requirement in wanted(IMAGES[image]):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not locked for {image}: make lock"
        assert requirement.specifier.contains(version, prereleases=True), requirement


@pytest.mark.parametrize("lock", sorted(path.name for path in LOCKS.glob("*.txt")))
def test_every_locked_package_has_a_hash(lock: str) -> None:
    entries = re.split(r"^(?=[\w.-]+==)", (LOCKS / lock).read_text(), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert "--hash=sha256:" in entry, entry
    assert "://" not in (LOCKS / lock).read_text()


def test_what_the_programs_import_is_in_their_images() -> None:
    """A package that only happens to be on the developer's machine is in no image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ours = set(project["tool"]["importlinter"]["root_packages"])
    known = locked("router", "worker-cpu", "torch-cpu", "worker-cuda")
    distributions = importlib.metadata.packages_distributions()
    for package in sorted(ours):
        for path in (ROOT / package).rglob("*.py"):
            for name in imported(path) - ours - set(sys.stdlib_module_names) - ELSEWHERE:
                names = {canonicalize_name(found) for found in distributions.get(name, [name])}
                where = path.relative_to(ROOT)
                assert names & known.keys(), f"{where} imports {name}, which no image holds"


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    deep = {
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.partition(".")[0] for name in plain | deep}


def test_the_routers_lock_holds_no_torch() -> None:
    assert not {"torch", "numpy", "nixl-cu13"} & locked("router").keys()


def test_the_build_sees_what_it_copies_and_little_else() -> None:
    shown = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    sources = {
        word
        for line in re.findall(r"^COPY (?!--from)((?:.*\\\n)*.*)$", dockerfile, flags=re.MULTILINE)
        for word in line.replace("\\\n", " ").split()[:-1]
    }
    assert sources
    for source in sources:
        assert any(source == name or source.startswith(f"{name}/") for name in shown), source
    assert "# syntax=" not in dockerfile


def test_every_package_is_in_the_images() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for package in project["tool"]["importlinter"]["root_packages"]:
        assert f"COPY {package} {package}" in dockerfile, package


def test_a_router_runs_without_the_workers_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'safetensors', 'nixl_cu13', 'flashinfer'):\n"
        "    sys.modules[name] = None\n"
        "import baton.cli, router.main\n"
        "sys.exit(baton.cli.main(['router', '--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_without_torch_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from baton.cli import main

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name)
    )
    assert main(["prefill", "--model", "x"]) == 2
    assert "baton-serve[worker]" in capsys.readouterr().err


def test_compose_files_name_settings_that_exist() -> None:
    from baton.config import settings_of
    from router.config import RouterConfig
    from worker.config import WorkerConfig

    known = {setting.variable for setting in settings_of(RouterConfig, WorkerConfig).values()}
    names = sorted(path.name for path in (ROOT / "deploy").glob("compose*.yaml"))
    assert len(names) >= 4
    for name in (*names, "Dockerfile"):
        text = (ROOT / "deploy" / name).read_text()
        assert set(re.findall(r"\bBATON_[A-Z_]+\b", text)) <= known, name
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert not [s for s, body in services.items() if body["image"].endswith(":latest")]

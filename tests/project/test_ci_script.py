"""Continuous integration's script, with suites that only say what they found."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("test", "test-helm", "test-compose", "test-k8s")
PASSED = "echo '=== 2 passed in 1.00s ==='"
FAILED = "echo 'FAILED tests/a.py::b'; echo '=== 1 failed, 1 passed in 1.00s ==='; exit 1"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the script, and commands that stand for the machine's."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci", ignore=shutil.ignore_patterns("log"))
    machine(tmp_path, "id", "echo 0")
    machine(tmp_path, "apt-get", "exit 0")
    machine(tmp_path, "docker", "exit 1")
    kernel(tmp_path, "exit 0")
    return tmp_path


def machine(checkout: Path, name: str, script: str) -> None:
    _script(checkout / "bin" / name, script)


def kernel(checkout: Path, script: str, *, module: str = "tests.container_kernel") -> None:
    """What `python -m MODULE` does there; all others have nothing to say."""
    _script(
        checkout / ".venv" / "bin" / "python", f'if [ "$2" = {module} ]; then {script}; fi; exit 0'
    )


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(checkout: Path, limit_s: int = 4200, **suites: str) -> tuple[int, str]:
    """Status and output; suites are named with _ in the place of -."""
    lines = [f"{name}:\n\t@{suites.get(name.replace('-', '_'), PASSED)}\n" for name in SUITES]
    (checkout / "Makefile").write_text("".join(lines))
    done = subprocess.run(
        [str(checkout / ".ci" / "run")],
        env={
            **os.environ,
            "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
            "CI_LIMIT_S": str(limit_s),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


def test_every_suite_runs_in_order_and_one_line_closes_for_all(checkout: Path) -> None:
    status, said = run(checkout)
    assert status == 0
    began = [line.split()[2] for line in said.splitlines() if line.startswith("== make ")]
    assert began == list(SUITES)
    assert " 8 passed in " in said.splitlines()[-1]


def test_a_suite_that_fails_twice_fails_the_run_and_the_others_still_run(checkout: Path) -> None:
    status, said = run(checkout, test_helm=FAILED)
    assert status == 1
    assert said.count("FAILED tests/a.py::b") == 2, "it is tried once more"
    assert "1 failed" in said.splitlines()[-1]
    assert all(f"== make {name}" in said for name in SUITES)


def test_a_kernel_that_forbids_containers_is_named_and_fails_nothing(checkout: Path) -> None:
    kernel(checkout, "echo 'this machine does not let us have: bridges'; exit 1")
    status, said = run(checkout)
    assert status == 0
    for name in ("test-compose", "test-k8s"):
        assert f"== make {name} is left out: this machine does not let us have: bridges" in said
    assert " 4 passed in " in said.splitlines()[-1]


def test_without_root_what_needs_it_is_left_out_by_name(checkout: Path) -> None:
    machine(checkout, "id", "echo 1000")
    machine(checkout, "helm", "exit 0")
    status, said = run(checkout)
    assert status == 0
    assert "== make test-compose is left out: no container engine answers" in said
    assert "== make test-k8s is left out: pods of their own network need root" in said
    assert "== make test-helm\n" in said


def test_when_the_time_is_over_a_suite_is_interrupted_and_the_run_fails(checkout: Path) -> None:
    status, said = run(checkout, limit_s=2, test="sleep 30")
    assert status == 1
    assert "interrupted: the time was over" in said
    assert "== make test-helm is left out: 0 of 0 minutes are over" in said
    assert "1 error in " in said.splitlines()[-1]


def test_what_a_suite_needs_and_the_network_does_not_give_is_named(checkout: Path) -> None:
    script = "echo much; echo apt-get update: no route to the archive; exit 75"
    kernel(checkout, script, module="tests.kubernetes.build")
    status, said = run(checkout)
    assert status == 0
    assert "== make test-k8s is left out: apt-get update: no route to the archive" in said
    assert " 6 passed in " in said.splitlines()[-1]


def test_what_takes_the_time_that_its_suite_needs_is_given_up_and_named(checkout: Path) -> None:
    kernel(checkout, "sleep 30", module="tests.kubernetes.build")
    status, said = run(checkout, limit_s=904)
    assert status == 0
    assert "left out: what it needs (tests.kubernetes.build) was not there after" in said
    assert "== make test-compose is left out: 0 of 15 minutes are over" in said


def test_a_set_up_that_breaks_is_its_suites_to_tell(checkout: Path) -> None:
    kernel(checkout, "echo Traceback; exit 1", module="tests.deploy.container_engine")
    status, said = run(checkout)
    assert status == 0
    assert "== make test-compose\n" in said
    assert " 8 passed in " in said.splitlines()[-1]

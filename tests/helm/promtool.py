"""Prometheus's own tool for rules: the machine's, or the one in Debian's package of Prometheus."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.debian import PATIENT, SetUpError, cache_folder, run


class PromtoolError(Exception):
    """What it was given does not hold; the message is its own."""


@dataclass(frozen=True)
class Promtool:
    program: Path

    def check_rules(self, groups: list[dict[str, Any]], directory: Path) -> None:
        """Parses every expression. Raises PromtoolError."""
        self._run("check", "rules", str(_write(directory / "rules.yaml", {"groups": groups})))

    def test_rules(
        self, groups: list[dict[str, Any]], tests: list[dict[str, Any]], directory: Path
    ) -> None:
        """Evaluates rules and expressions over given series. Raises PromtoolError."""
        rules = _write(directory / "rules.yaml", {"groups": groups})
        content = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
        self._run("test", "rules", str(_write(directory / "tests.yaml", content)))

    def check_config(self, file: Path) -> None:
        """Raises PromtoolError."""
        self._run("check", "config", str(file))

    def complaints(self, metrics: str) -> list[str]:
        """What is against Prometheus's conventions in a text exposition: a line each."""
        command = [str(self.program), "check", "metrics"]
        done = subprocess.run(command, input=metrics, capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).splitlines()

    def _run(self, *arguments: str) -> None:
        command = [str(self.program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise PromtoolError(done.stdout + done.stderr)


def _write(file: Path, content: Any) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def find_promtool() -> Promtool:
    """Raises SetUpError where there is none and none can be had."""
    own = shutil.which("promtool")
    program = Path(own) if own else cache_folder() / "promtool"
    if not program.exists():
        _download(program)
    return Promtool(program)


def _download(program: Path) -> None:
    if shutil.which("apt-get") is None:
        raise SetUpError("no promtool, and no apt-get to get Debian's package of Prometheus with")
    folder = program.with_name("promtool-package")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        run("apt-get", *PATIENT, "update")
    # Its package alone: installed, it would serve.
    run(
        "apt-get",
        *PATIENT,
        "-o",
        "APT::Sandbox::User=root",
        "download",
        "prometheus",
        directory=folder,
    )
    (package,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", str(package), str(folder))
    shutil.copy2(folder / "usr" / "bin" / "promtool", program)
    shutil.rmtree(folder)

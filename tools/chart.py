"""Writes what the chart repeats: README.md and values.schema.json from values.yaml, the dashboard.

values.yaml is the one place where a value is named, explained and given its default; the settings
of router and workers come from the very dataclasses that read them, so that a typo in either is
refused by `helm install`. A test (tests/helm/test_chart_files.py) says when a file is stale.

Usage: python tools/chart.py [--check]
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from baton.config import settings_of  # noqa: E402
from router.config import RouterConfig  # noqa: E402
from worker.config import WorkerConfig  # noqa: E402

CHART = ROOT / "helm" / "baton"
DASHBOARD = ROOT / "deploy" / "grafana" / "baton.json"

ROUTER_DECIDED = frozenset(
    "http_host http_port grpc_host grpc_port workers_host workers_port tls_cert tls_key "
    "tls_client_ca tls_ca tls_server_name api_keys_file tokenizer served_model_name "
    "drain_timeout_s registry redis_url redis_prefix "
    "kubernetes_namespace kubernetes_selector kubernetes_role_label kubernetes_port_annotation "
    "kubernetes_kubeconfig".split()
)
WORKER_DECIDED = frozenset(
    "model served_model_name host port metrics_port router device "
    "tls_cert tls_key tls_ca tls_server_name".split()
)
"""Settings that other values of the chart stand for."""

CHOICES = {
    "model.source": ["image", "pvc", "hub", "imageVolume"],
    "router.registry": ["kubernetes", "redis", "memory"],
    "router.service.type": ["ClusterIP", "NodePort", "LoadBalancer"],
    "autoscaling.kind": ["none", "keda", "hpa"],
    "pullPolicy": ["Always", "IfNotPresent", "Never"],
}
INT_OR_STRING = ("maxSurge", "maxUnavailable")
FRACTIONS = ("ttftSeconds", "itlSeconds", "kvUsage")
SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
MANY = {"type": ["string", "number"]}


@dataclass(frozen=True)
class Value:
    """One line of the table."""

    path: str
    text: str
    default: Any


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the chart's derived files.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one is stale")
    check = parser.parse_args().check
    stale = [path for path, text in files().items() if not same(path, text)]
    for path in stale:
        print(f"{'stale: ' if check else ''}{path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
    return int(check and bool(stale))


def files() -> dict[Path, str]:
    """Every derived file and what it should hold."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    return {
        CHART / "README.md": readme(text, values),
        CHART / "values.schema.json": json.dumps(schema(values), indent=2) + "\n",
        CHART / "files" / "baton.json": DASHBOARD.read_text(),
    }


def same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


# ---- the table -----------------------------------------------------------------------------------


def readme(text: str, values: dict[str, Any]) -> str:
    head = (CHART / "README.head.md").read_text()
    rows = [f"| `{v.path}` | {cell(v.default)} | {v.text} |" for v in described(text, values)]
    table = "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])
    return (
        f"<!-- Written by `make chart` from values.yaml and README.head.md. -->\n{head}\n{table}\n"
    )


def described(text: str, values: dict[str, Any]) -> Iterator[Value]:
    """The values that a comment `# -- ...` stands above, in the file's order."""
    path: list[tuple[int, str]] = []
    comment = ""
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        body = line.strip()
        if body.startswith("# -- "):
            comment = body[5:]
        elif body.startswith("#") and comment:
            comment += f" {body[1:].strip()}"
        elif match := re.match(r"([A-Za-z]\w*):", body):
            path = [step for step in path if step[0] < indent] + [(indent, match[1])]
            if comment:
                names = [name for _, name in path]
                yield Value(".".join(names), comment, look_up(values, names))
            comment = ""


def look_up(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def cell(default: Any) -> str:
    text = json.dumps(default)
    return "" if text == '""' else f"`{text}`"


# ---- the schema ----------------------------------------------------------------------------------


def schema(values: dict[str, Any]) -> dict[str, Any]:
    """JSON schema, draft 7, as Helm 3 and 4 check it: unknown keys are refused everywhere."""
    top = of_value("", values)
    top["properties"]["global"] = {"type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of Baton", **top}


def of_value(path: str, value: Any) -> dict[str, Any]:
    name = path.rpartition(".")[2]
    if name == "settings":
        return of_settings(path)
    if name == "resources":
        amounts = {"type": "object", "additionalProperties": MANY}
        return closed({"requests": amounts, "limits": amounts})
    if name == "labels" or name in ("nodeSelector", "commonLabels"):
        return {"type": "object", "additionalProperties": {"type": "string"}}
    for suffix, choices in CHOICES.items():
        if path == suffix or path.endswith(f".{suffix}"):
            return {"enum": choices}
    if name in INT_OR_STRING:
        return {"type": ["integer", "string"]}
    if isinstance(value, dict):
        if not value:
            return {"type": "object"}
        return closed({key: of_value(f"{path}.{key}".lstrip("."), v) for key, v in value.items()})
    if isinstance(value, list):
        return {"type": "array"}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, float) or name in FRACTIONS:
        return {"type": "number", "minimum": 0}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0}
    return {"type": "string"}


def of_settings(path: str) -> dict[str, Any]:
    """Settings by their names, with the types that the programs themselves ask for."""
    router = path.startswith("router.")
    cls, decided = (RouterConfig, ROUTER_DECIDED) if router else (WorkerConfig, WORKER_DECIDED)
    properties: dict[str, Any] = {}
    for name, setting in settings_of(cls).items():
        if name not in decided:
            kind: dict[str, Any] = {"type": SCHEMA_TYPES[setting.kind]}
            if setting.choices:
                kind = {"enum": list(setting.choices)}
            properties[name] = {**kind, "description": setting.doc}
    return closed(properties)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


if __name__ == "__main__":
    sys.exit(main())

"""The chart's files without Helm: what is derived is fresh, and what is named exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from baton.client_access import ClientAccess
from baton.config import settings_of
from baton.remote import GenerateConfig
from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from router.config import RouterConfig
from router.core import Router
from router.registry import InMemoryRegistry
from worker.config import WorkerConfig
from worker.metrics import render
from worker.refusals import WorkerRefusals
from worker.request_clock import RequestClock

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "baton"


def test_derived_files_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "chart.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run `make chart`\n{done.stdout}{done.stderr}"


def test_every_value_is_explained() -> None:
    """But for the roles that repeat prefill's, a leaf has its line in README.md."""
    readme = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    repeated = ("decode.", "unified.")

    def explained(path: str, value: object) -> bool:
        if f"`{path}`" in readme:
            return True
        return (
            isinstance(value, dict)
            and bool(value)
            and all(explained(f"{path}.{key}", below) for key, below in value.items())
        )

    missing = [
        f"{top}.{key}"
        for top, below in values.items()
        if isinstance(below, dict)
        for key, value in below.items()
        if not f"{top}.".startswith(repeated)
        and not explained(f"{top}.{key}", value)
        and not explained(top, below)
    ]
    assert not missing


def test_the_chart_speaks_of_settings_that_exist() -> None:
    known = {setting.variable for setting in settings_of(RouterConfig, WorkerConfig).values()} | {
        setting.variable for setting in settings_of(GenerateConfig, ClientAccess).values()
    }
    templates = [path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file()]
    named = {word for text in templates for word in re.findall(r"\bBATON_[A-Z_]+\b", text)}
    assert named
    assert named <= known
    fields = {field for cls in (RouterConfig, WorkerConfig) for field in cls.__dataclass_fields__}
    written = {word for text in templates for word in re.findall(r'set \$config "(\w+)"', text)}
    assert written
    assert written <= fields


def worker_metrics() -> str:
    """What a worker serves that has done nothing yet."""
    role = inference_pb2.WORKER_ROLE_PREFILL
    return render(
        registration=worker_pb2.RegisterRequest(role=role),
        status=worker_pb2.WorkerStatus(),
        figures=channel_pb2.EngineFigures(),
        figures_age_s=0.0,
        prefix_caching=True,
        clock=RequestClock(role),
        refusals=WorkerRefusals(),
    ).decode()


async def test_dashboard_alerts_and_scaling_ask_for_metrics_that_exist() -> None:
    router = Router(RouterConfig(), InMemoryRegistry())
    text = router.metrics.render().decode() + worker_metrics()
    suffixes = ("", "_total", "_bucket", "_sum", "_count")
    exposed = {
        family.name + suffix
        for family in text_string_to_metric_families(text)
        for suffix in suffixes
    }
    await router.close()
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "baton.json").read_text())
    asked = json.dumps(dashboard)
    for name in ("monitoring.yaml", "autoscaling.yaml"):
        asked += (CHART / "templates" / name).read_text()
    named = set(re.findall(r"\bbaton_[a-z_]+\b", asked))
    assert len(named) > 8
    assert named <= exposed, named - exposed


def test_versions_agree() -> None:
    import baton

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == baton.__version__
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"ARG VERSION={baton.__version__}" in dockerfile

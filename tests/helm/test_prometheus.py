"""Prometheus's own tool reads what it is given: alerts, scaling, dashboard, configuration, metrics.

Alerts and scaling are evaluated over series as two routers report them, of the same workers both.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.config import RouterConfig
from router.core import Router
from router.registry import InMemoryRegistry
from tests.debian import SetUpError
from tests.helm.cases import CASES, KEDA
from tests.helm.helms import ROOT, Helm4, Manifest, Values
from tests.helm.promtool import Promtool, PromtoolError, find_promtool
from tests.helm.test_chart_files import worker_metrics

pytestmark = pytest.mark.helm

JOB = "demo-baton"
"""The Service's name, by which the Prometheus operator calls what it scrapes of it."""
ALERTS: Values = {"metrics": {"prometheusRule": {"enabled": True}}}
ROUTERS = ("a", "b")


@pytest.fixture(scope="module")
def promtool() -> Promtool:
    try:
        return find_promtool()
    except SetUpError as error:
        pytest.skip(f"promtool is not to be had: {error}")


def rules(values: Values) -> list[dict[str, Any]]:
    """The groups of the chart's PrometheusRule."""
    (rule,) = (m for m in Helm4().render(values) if m["kind"] == "PrometheusRule")
    groups: list[dict[str, Any]] = rule["spec"]["groups"]
    return groups


def triggers(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, str]]]:
    """(name of the ScaledObject, one trigger's metadata)."""
    for manifest in manifests:
        if manifest["kind"] == "ScaledObject":
            for trigger in manifest["spec"]["triggers"]:
                yield manifest["metadata"]["name"], trigger["metadata"]


def panels(node: Any) -> Iterator[str]:
    """The dashboard's queries, with Grafana's variables filled in."""
    if isinstance(node, dict):
        if "expr" in node:
            filled = re.sub(r"\$__(rate_)?interval", "1m", node["expr"])
            yield re.sub(r"\$\{?\w+\}?", "x", filled)
        for inner in node.values():
            yield from panels(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from panels(inner)


def recording(expressions: list[str]) -> list[dict[str, Any]]:
    """A group of rules, which is what the tool parses."""
    named = [{"record": f"r:{i}", "expr": expr} for i, expr in enumerate(expressions)]
    return [{"name": "expressions", "rules": named}]


def reported(name: str, values: str, **labels: str) -> list[dict[str, str]]:
    """The same series of each router."""
    return [
        {
            "series": f"{name}{{{_written({'job': JOB, 'instance': router, **labels})}}}",
            "values": values,
        }
        for router in ROUTERS
    ]


def _written(labels: dict[str, str]) -> str:
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


# ---- what it parses ------------------------------------------------------------------------------


def test_every_expression_is_prometheus_language(promtool: Promtool, tmp_path: Path) -> None:
    asked = [
        trigger["query"]
        for case in ("keda", "unified")
        for _, trigger in triggers(Helm4().render(CASES[case]))
    ]
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "baton.json").read_text())
    asked += list(panels(dashboard))
    assert len(asked) > 30
    promtool.check_rules([*rules(ALERTS), *recording(asked)], tmp_path)
    with pytest.raises(PromtoolError):
        promtool.check_rules(recording(["sum(rate(x[1m])"]), tmp_path)


@pytest.mark.parametrize("name", ["prometheus.yaml", "prometheus.tls.yaml"])
def test_composes_prometheus_takes_its_configuration(promtool: Promtool, name: str) -> None:
    promtool.check_config(ROOT / "deploy" / "prometheus" / name)


async def test_metrics_keep_to_the_conventions_where_the_names_are_ours(promtool: Promtool) -> None:
    router = Router(RouterConfig(), InMemoryRegistry())
    text = router.metrics.render().decode()
    await router.close()
    for metrics in (text, worker_metrics()):
        ours = [line for line in promtool.complaints(metrics) if not line.startswith("vllm:")]
        assert not ours
    assert promtool.complaints("# HELP x y\n# TYPE x counter\nx 1\n")


# ---- alerts --------------------------------------------------------------------------------------

HEALTHY = [
    *reported("up", "1x40"),
    *reported("baton_registry_up", "1x40", kind="kubernetes"),
    *(s for role in ("prefill", "decode", "unified")
      for s in reported("baton_workers", "2x40", role=role, state="ready")),
    *reported("baton_workers", "0x40", role="decode", state="incompatible"),
    *reported("baton_requests_total", "0+100x40", outcome="stop"),
    *reported("baton_ttft_seconds_bucket", "0+100x40", le="0.5"),
    *reported("baton_ttft_seconds_bucket", "0+100x40", le="5"),
    *reported("baton_ttft_seconds_bucket", "0+100x40", le="+Inf"),
]  # fmt: skip

AILING: dict[str, list[dict[str, str]]] = {
    "BatonNoRouter": reported("up", "0x40"),
    "BatonNoPrefillWorker": reported("baton_workers", "0x40", role="prefill", state="ready"),
    "BatonNoDecodeWorker": reported("baton_workers", "0x40", role="decode", state="ready"),
    "BatonNoUnifiedWorker": reported("baton_workers", "0x40", role="unified", state="ready"),
    "BatonIncompatibleWorker": reported(
        "baton_workers", "1x40", role="decode", state="incompatible"
    ),
    "BatonRegistryAway": reported("baton_registry_up", "0x40", kind="kubernetes"),
    "BatonErrors": reported("baton_requests_total", "0+2x40", outcome="unavailable"),
    "BatonSlowFirstToken": reported("baton_ttft_seconds_bucket", "0+50x40", le="0.5"),
}
"""What replaces the healthy series of that name, by the alert that it sets off."""


def ailing(alert: str) -> list[dict[str, str]]:
    changed = {series["series"]: series for series in AILING.get(alert, [])}
    kept = [changed.pop(series["series"], series) for series in HEALTHY]
    return [*kept, *changed.values()]


@pytest.mark.parametrize("alert", ["", *AILING])
def test_an_alert_fires_on_its_own_ailment_alone(
    promtool: Promtool, tmp_path: Path, alert: str
) -> None:
    groups = rules({**ALERTS, "unified": {"enabled": True}})
    known = {rule["alert"] for group in groups for rule in group["rules"]}
    assert known == AILING.keys()
    # ALERTS names every alert that fires; which of their labels there are, the rules say.
    firing = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "30m",
        "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
    }
    test = {"interval": "1m", "input_series": ailing(alert), "promql_expr_test": [firing]}
    promtool.test_rules(groups, [test], tmp_path)


# ---- scaling -------------------------------------------------------------------------------------


def test_scaling_counts_each_worker_once_however_many_routers_report_it(
    promtool: Promtool, tmp_path: Path
) -> None:
    series = [
        *reported("baton_queued_tokens", "3000x40", worker="p1", role="prefill"),
        *reported("baton_queued_tokens", "1000x40", worker="p2", role="prefill"),
        *reported("baton_queued_tokens", "7x40", worker="d1", role="decode"),
        *(
            s
            for worker in ("d1", "d2")
            for state, pages in {"free": 40, "cached": 20, "held": 10, "in_use": 30}.items()
            for s in reported(
                "baton_pages", f"{pages}x40", worker=worker, role="decode", state=state
            )
        ),
        *reported("baton_ttft_seconds_bucket", "0+100x40", le="0.5"),
        *reported("baton_ttft_seconds_bucket", "0+100x40", le="+Inf"),
        *reported("baton_itl_seconds_bucket", "0+100x40", le="0.02"),
        *reported("baton_itl_seconds_bucket", "0+100x40", le="+Inf"),
    ]
    manifests = Helm4().render({role: {"autoscaling": KEDA} for role in ("prefill", "decode")})
    expected = {
        ("demo-baton-prefill", "baton_queued_tokens"): 4000,
        ("demo-baton-prefill", "baton_ttft_seconds"): 0.45,
        ("demo-baton-decode", "baton_pages"): 0.4,
        ("demo-baton-decode", "baton_itl_seconds"): 0.018,
    }
    asked = {
        (name, measure): trigger["query"]
        for name, trigger in triggers(manifests)
        for measure in (
            "baton_queued_tokens",
            "baton_ttft_seconds",
            "baton_pages",
            "baton_itl_seconds",
        )
        if measure in trigger["query"]
    }
    assert asked.keys() == expected.keys()
    tests = [
        {
            "expr": f"round(({query}) * 1000)",
            "eval_time": "10m",
            "exp_samples": [{"labels": "{}", "value": 1000 * expected[which]}],
        }
        for which, query in asked.items()
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": tests}
    promtool.test_rules([], [test], tmp_path)

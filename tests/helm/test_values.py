"""Every value of the chart does something: each is changed, and what is rendered changes with it.

The list is values.yaml itself, leaf by leaf, so that a value which no template looks at any more
(or never did) fails here, and a new one asks for a case.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helm.cases import CASES
from tests.helm.helms import CHART, Helm4, HelmError, Manifest, Values

pytestmark = [pytest.mark.helm, pytest.mark.timeout(600)]

Path = tuple[str, ...]
ROLES = ("prefill", "decode", "unified")

MORE: dict[str, tuple[str, Any]] = {
    "image.pullPolicy": ("nothing", "Always"),
    "image.router.repository": ("nothing", "mine"),
    "image.router.tag": ("nothing", "2"),
    "image.cpu.repository": ("nothing", "mine"),
    "image.cpu.digest": ("nothing", f"sha256:{'1' * 64}"),
    "image.cuda.repository": ("gpus", "mine"),
    "image.cuda.tag": ("gpus", "2"),
    "image.cuda.digest": ("gpus", f"sha256:{'1' * 64}"),
    "model.name": ("nothing", "another"),
    "model.hub.secretKey": ("private model of the hub", "other"),
    "model.imageVolume.pullPolicy": ("model as an image", "Always"),
    "router.replicas": ("nothing", 3),
    "router.preStopSleepSeconds": ("nothing", 9),
    "router.drainSeconds": ("nothing", 50),
    "router.resources.requests.cpu": ("nothing", "750m"),
    "router.resources.requests.memory": ("nothing", "600Mi"),
    "router.resources.limits.cpu": ("nothing", "3"),
    "router.resources.limits.memory": ("nothing", "2Gi"),
    "router.service.grpcPort": ("nothing", 50099),
    "router.pdb.maxUnavailable": ("nothing", 2),
    "router.autoscaling.minReplicas": ("router scaling", 3),
    "router.autoscaling.maxReplicas": ("router scaling", 9),
    "router.autoscaling.targetCPUUtilization": ("router scaling", 50),
    "prefill.replicas": ("nothing", 3),
    "prefill.gpuResource": ("gpus", "amd.com/gpu"),
    "prefill.resources.requests.cpu": ("nothing", "2"),
    "prefill.resources.requests.memory": ("nothing", "3Gi"),
    "prefill.resources.limits.cpu": ("nothing", "5"),
    "prefill.resources.limits.memory": ("nothing", "5Gi"),
    "prefill.shmSize": ("nothing", "2Gi"),
    "prefill.rdma.resource": ("gpus", "rdma/other"),
    "prefill.rdma.count": ("gpus", 2),
    "prefill.cache.claimName": ("nothing", "kernels"),
    "prefill.cache.sizeLimit": ("nothing", "30Gi"),
    "prefill.startupSeconds": ("nothing", 60),
    "prefill.minReadySeconds": ("nothing", 1),
    "prefill.terminationGracePeriodSeconds": ("nothing", 500),
    "prefill.updateStrategy.maxSurge": ("nothing", 1),
    "prefill.updateStrategy.maxUnavailable": ("nothing", 1),
    "prefill.pdb.maxUnavailable": ("nothing", 2),
    "prefill.autoscaling.minReplicas": ("keda", 2),
    "prefill.autoscaling.maxReplicas": ("keda", 9),
    "prefill.autoscaling.queuedTokens": ("keda", 99),
    "prefill.autoscaling.ttftSeconds": ("keda", 0.9),
    "prefill.autoscaling.kvUsage": ("keda", 0.9),
    "prefill.autoscaling.itlSeconds": ("keda", 0.9),
    "prefill.autoscaling.cooldownSeconds": ("keda", 60),
    "together.replicas": ("together", 2),
    "redis.image": ("redis", "redis:8"),
    "redis.resources.requests.cpu": ("redis", "60m"),
    "redis.resources.requests.memory": ("redis", "65Mi"),
    "redis.resources.limits.cpu": ("redis", "600m"),
    "redis.resources.limits.memory": ("redis", "129Mi"),
    "redis.urlSecretKey": ("redis in a secret", "other"),
    "tls.certManager.duration": ("cert-manager", "99h"),
    "serviceAccount.routerName": ("no accounts", "a-router"),
    "serviceAccount.workerName": ("no accounts", "a-worker"),
    "serviceAccount.annotations": ("nothing", {"a": "b"}),
    "metrics.serviceMonitor.interval": ("monitoring", "30s"),
    "metrics.serviceMonitor.tlsConfig": (
        "tls, scraped",
        {"serverName": "router"},
    ),
    "metrics.podMonitor.interval": ("monitoring", "30s"),
    "metrics.prometheusRule.ttftSeconds": ("monitoring", 9),
    "metrics.dashboard.labels.grafana_dashboard": ("monitoring", "2"),
    "test.prompt": ("nothing", "Once"),
}
"""Values that no case sets, or sets to what they are anyway: the case in which each counts, and
another value. What stands here for prefill is tried with each role."""

ANOTHER_ROLES = {
    "prefill.autoscaling.kvUsage",
    "prefill.autoscaling.itlSeconds",
    "decode.autoscaling.queuedTokens",
    "decode.autoscaling.ttftSeconds",
}
"""Signals of the other role: roles share one list of values, whose comments say whose each is."""


def leaves(values: Values, above: Path = ()) -> Iterator[Path]:
    for name, below in values.items():
        if isinstance(below, dict) and below:
            yield from leaves(below, (*above, name))
        else:
            yield (*above, name)


LEAVES = list(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))


def copied(values: Values) -> Values:
    """A copy whose parts are its own: cases name some parts twice."""
    made: Values = json.loads(json.dumps(values))
    return made


def without(values: Values, path: Path) -> Values:
    """The same values but that one, which is at its default then."""
    made = copied(values)
    place = made
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return made


def having(values: Values, path: Path, value: Any) -> Values:
    made = copied(values)
    place = made
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = value
    return made


def sets(values: Values, path: Path) -> bool:
    place: Any = values
    for name in path:
        if not isinstance(place, dict) or name not in place:
            return False
        place = place[name]
    return True


def for_role(values: Values, role: str) -> Values:
    """What these values say of prefill, said of that role, which runs."""
    if role == "prefill":
        return values
    own = {**copied(values.get("prefill", {})), "enabled": True}
    both = {} if role == "unified" else {"prefill": {"enabled": True}}
    return {**values, **both, role: own}


def pair(path: Path) -> tuple[Values, Values]:
    """Values without that one, and with it."""
    role = path[0] if path[0] in ROLES else ""
    known = ("prefill", *path[1:]) if role else path
    if ".".join(known) in MORE:
        name, value = MORE[".".join(known)]
        base = for_role(CASES[name], role) if role else CASES[name]
        return base, having(base, path, value)
    for case in CASES.values():
        if sets(case, path):
            return without(case, path), case
    own = next(for_role(case, role) for case in CASES.values() if sets(case, known))
    return without(own, path), own


@functools.cache
def rendered_text(values: str) -> str | list[Manifest]:
    """What Helm makes of these values, or says against them."""
    try:
        return Helm4().render(yaml.safe_load(values))
    except HelmError as error:
        return str(error)


def rendered(values: Values) -> str | list[Manifest]:
    return rendered_text(yaml.safe_dump(values))


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_a_value_changes_what_is_rendered(path: Path) -> None:
    base, changed = pair(path)
    before, after = rendered(base), rendered(changed)
    assert not isinstance(after, str), after
    assert (after == before) == (".".join(path) in ANOTHER_ROLES)


def test_what_is_tried_here_exists() -> None:
    for name, (case, _) in MORE.items():
        assert tuple(name.split(".")) in LEAVES
        assert case in CASES

"""The chart as Helm 3 and Helm 4 render it: valid, confined, and consistent with the programs."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from baton.config import fill
from router.config import RouterConfig
from tests.helm.cases import ADD_ONS, CASES, NEEDS, REFUSED
from tests.helm.conftest import KUBERNETES
from tests.helm.helms import NAMESPACE, Helm, Helm3, Helm4, HelmError, Manifest, Values
from worker.config import WorkerConfig

pytestmark = [pytest.mark.helm, pytest.mark.timeout(600)]

VALID: set[tuple[str, str]] = set()
"""Version and manifest, as JSON, of what was found valid."""


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and spec of every pod that the manifests make."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]
        elif manifest["kind"] == "Deployment":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def named(manifests: list[Manifest], kind: str, ending: str = "") -> Manifest:
    (found,) = (
        m for m in manifests if m["kind"] == kind and m["metadata"]["name"].endswith(ending)
    )
    return found


def configs(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            for name, text in manifest["data"].items():
                if name.endswith(".yaml"):
                    yield name.removesuffix(".yaml"), yaml.safe_load(text)


@functools.cache
def rendered_by(helm: Helm) -> dict[str, list[Manifest]]:
    return {name: helm.render(values) for name, values in CASES.items()}


@pytest.fixture
def rendered(helm: Helm) -> dict[str, list[Manifest]]:
    return rendered_by(helm)


@pytest.mark.parametrize("case", CASES)
def test_a_case_passes_the_strict_linter(helm: Helm, case: str) -> None:
    if isinstance(helm, Helm3) and case in NEEDS:
        # Its linter takes every cluster for as old as itself.
        with pytest.raises(HelmError, match=NEEDS[case]):
            helm.lint(CASES[case])
    else:
        helm.lint(CASES[case])


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_manifests_fit_the_schemas(
    rendered: dict[str, list[Manifest]], case: str, version: str
) -> None:
    for manifest in rendered[case]:
        # Cases have most manifests in common, and both Helms render alike.
        known = version, json.dumps(manifest, sort_keys=True)
        if manifest["kind"] not in ADD_ONS and known not in VALID:
            kubernetes_validate.validate(manifest, version, strict=True)
            VALID.add(known)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_confined(rendered: dict[str, list[Manifest]], case: str) -> None:
    found = list(pods(rendered[case]))
    assert found
    for name, spec in found:
        security = spec["securityContext"]
        assert security["runAsNonRoot"], name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"]["type"] == "RuntimeDefault", name
        for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
            assert not spec.get(forbidden), name
        for volume in spec["volumes"]:
            assert "hostPath" not in volume, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            _check_container(name, container)


def _check_container(name: str, container: dict[str, Any]) -> None:
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"], name
    assert not security["privileged"], name
    assert not security["allowPrivilegeEscalation"], name
    assert security["capabilities"] == {"drop": ["ALL"]}, name
    for amount in ("cpu", "memory"):
        assert container["resources"]["requests"][amount], name
        assert container["resources"]["limits"][amount], name
    image = container["image"]
    assert "@sha256:" in image or ":" in image.rpartition("/")[2], image
    assert not image.endswith(":latest"), image


@pytest.mark.parametrize("case", CASES)
def test_every_server_has_its_probes(rendered: dict[str, list[Manifest]], case: str) -> None:
    for manifest in rendered[case]:
        if manifest["kind"] != "Deployment":
            continue
        for container in manifest["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
            liveness = json.dumps(container["livenessProbe"])
            assert "service" not in liveness, "readiness depends on peers, liveness must not"


@pytest.mark.parametrize("case", CASES)
def test_the_programs_take_their_configuration(
    rendered: dict[str, list[Manifest]], case: str
) -> None:
    for name, config in configs(rendered[case]):
        cls = RouterConfig if name == "router" else WorkerConfig
        known = set(cls.__dataclass_fields__)
        assert config.keys() <= known, config.keys() - known
        fill(cls, config)


@pytest.mark.parametrize("case", CASES)
def test_files_that_a_configuration_names_are_mounted(
    rendered: dict[str, list[Manifest]], case: str
) -> None:
    named_files = {
        name: [v for v in config.values() if str(v).startswith("/etc/baton")]
        for name, config in configs(rendered[case])
    }
    for _, spec in pods(rendered[case]):
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            for file in named_files.get(container["name"], []):
                assert file.rpartition("/")[0] in mounts, file


@pytest.mark.parametrize("case", CASES)
def test_routers_look_for_the_pods_that_the_chart_makes(
    rendered: dict[str, list[Manifest]], case: str
) -> None:
    router = next(config for name, config in configs(rendered[case]) if name == "router")
    if router["registry"] != "kubernetes":
        return
    settings = fill(RouterConfig, router)
    wanted = dict(
        term.split("=", 1) for term in settings.kubernetes_selector.split(",") if "!=" not in term
    )
    assert settings.kubernetes_namespace == NAMESPACE
    workers = [
        m["spec"]["template"]["metadata"]
        for m in rendered[case]
        if m["kind"] == "Deployment" and not m["metadata"]["name"].endswith(("-router", "-redis"))
    ]
    assert workers
    for pod in workers:
        assert wanted.items() <= pod["labels"].items()
        assert pod["labels"][settings.kubernetes_role_label] in ("prefill", "decode", "unified")
        assert pod["annotations"][settings.kubernetes_port_annotation] == "50061"


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_what_they_mean(rendered: dict[str, list[Manifest]], case: str) -> None:
    templates = [
        m["spec"]["template"]["metadata"]["labels"]
        for m in rendered[case]
        if m["kind"] == "Deployment"
    ]
    for manifest in rendered[case]:
        if manifest["kind"] == "Service":
            selector = manifest["spec"]["selector"]
        elif manifest["kind"] == "PodDisruptionBudget":
            selector = manifest["spec"]["selector"]["matchLabels"]
        else:
            continue
        matches = [labels for labels in templates if selector.items() <= labels.items()]
        assert len(matches) == 1, manifest["metadata"]["name"]


def test_helm_3_and_4_render_alike(helm3: Helm3) -> None:
    def in_order(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    three, four = rendered_by(helm3), rendered_by(Helm4())
    for case in CASES:
        assert in_order(three[case]) == in_order(four[case]), case


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_name(helm: Helm, values: Values, said: str) -> None:
    with pytest.raises(HelmError) as refused:
        helm.render(values)
    assert said in str(refused.value)


def test_a_router_may_list_and_watch_pods_and_no_more(helm: Helm) -> None:
    manifests = helm.render({})
    assert named(manifests, "Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    ]
    assert not [m for m in manifests if m["kind"].startswith("ClusterRole")]
    for name, spec in pods(manifests):
        assert spec["automountServiceAccountToken"] == name.endswith("-router")
    other = helm.render({"router": {"registry": "redis"}, "redis": {"enabled": True}})
    assert not [m for m in other if m["kind"] in ("Role", "RoleBinding")]


def test_a_change_of_model_or_settings_is_a_new_revision(helm: Helm) -> None:
    def revision(values: Values) -> str:
        router = named(helm.render(values), "Deployment", "-router")
        found: str = router["spec"]["template"]["metadata"]["labels"]["baton.dev/revision"]
        return found

    first = revision({})
    assert revision({"router": {"replicas": 5}}) == first
    assert revision({"prefill": {"replicas": 5}}) == first
    assert revision({"model": {"source": "hub", "hub": {"id": "a/b"}}}) != first
    assert revision({"decode": {"settings": {"page_size": 16}}}) != first
    assert revision({"image": {"cpu": {"tag": "2"}}}) != first
    assert revision({"revision": "mine"}) == "mine"


def test_a_revision_does_not_change_what_deployments_select(helm: Helm) -> None:
    for manifest in helm.render({}):
        if manifest["kind"] == "Deployment":
            assert "baton.dev/revision" not in manifest["spec"]["selector"]["matchLabels"]


def test_a_stopping_pod_has_time_to_drain(helm: Helm) -> None:
    router = fill(RouterConfig, dict(configs(helm.render({})))["router"])
    for name, spec in pods(helm.render({})):
        if name.endswith("-router"):
            assert spec["terminationGracePeriodSeconds"] > 5 + router.drain_timeout_s
        elif not name.endswith("-test"):
            assert spec["terminationGracePeriodSeconds"] >= 3 + 60 + 10
    patient = {"decode": {"settings": {"drain_timeout_s": 600}}}
    spec = dict(pods(helm.render(patient)))["demo-baton-decode"]
    assert spec["terminationGracePeriodSeconds"] >= 3 + 600 + 10


def test_gpus_and_rdma_devices_are_asked_for(helm: Helm) -> None:
    for name, spec in pods(helm.render(CASES["example rdma"])):
        if name.endswith(("-prefill", "-decode")):
            (container,) = spec["containers"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
            assert container["resources"]["limits"]["rdma/hca"] == "1"
            assert "worker-cuda" in container["image"]


def test_each_role_scales_on_its_own_signals(helm: Helm) -> None:
    manifests = helm.render(CASES["keda"])
    for role, metrics in {
        "prefill": ["baton_queued_tokens", "baton_ttft_seconds_bucket"],
        "decode": ["baton_pages", "baton_itl_seconds_bucket"],
    }.items():
        triggers = named(manifests, "ScaledObject", f"-{role}")["spec"]["triggers"]
        assert [t["type"] for t in triggers] == ["prometheus"] * len(metrics)
        for trigger, metric in zip(triggers, metrics, strict=True):
            assert f"{metric}{{" in trigger["metadata"]["query"]
            assert float(trigger["metadata"]["threshold"]) > 0
    first = named(manifests, "ScaledObject", "-prefill")["spec"]["triggers"][0]
    assert first["metricType"] == "AverageValue", "tokens that wait at each worker, not at all"


def test_router_and_workers_know_each_other_by_one_name(helm: Helm) -> None:
    """cert-manager's certificates bear the name that either expects of the other."""
    manifests = helm.render(CASES["tls of workers, cert-manager"])
    secrets = {}
    for certificate in (m for m in manifests if m["kind"] == "Certificate"):
        assert "other" in certificate["spec"]["dnsNames"]
        assert {"server auth", "client auth"} == set(certificate["spec"]["usages"])
        secrets[certificate["spec"]["secretName"]] = certificate["spec"]["issuerRef"]
    assert len(secrets) == 2
    assert len({json.dumps(issuer) for issuer in secrets.values()}) == 1
    for name, config in configs(manifests):
        settings = fill(RouterConfig if name == "router" else WorkerConfig, config)
        assert settings.tls_server_name == "other"
        assert settings.mutual
    mounted = {
        volume["secret"]["secretName"]
        for _, spec in pods(manifests)
        for volume in spec["volumes"]
        if "secret" in volume
    }
    assert mounted == secrets.keys()
    for name, spec in pods(manifests):
        for container in spec["containers"]:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if not name.endswith("-test"):
                    said = container[probe]["exec"]["command"][-1]
                    assert "--tls-server-name other" in said, "a kubelet speaks no mutual TLS"


def test_an_api_key_is_asked_for_and_given_to_the_test(helm: Helm) -> None:
    manifests = helm.render(CASES["everything closed"])
    router = fill(RouterConfig, dict(configs(manifests))["router"])
    assert router.api_keys_file == "/etc/baton-keys/file"
    assert router.workers_apart
    (variable,) = (
        entry
        for entry in named(manifests, "Pod")["spec"]["containers"][0]["env"]
        if entry["name"] == "BATON_API_KEY"
    )
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "k"}
    worker = fill(WorkerConfig, dict(configs(manifests))["prefill"])
    assert worker.router.endswith(":50052"), "where clients need a key, workers have their own door"


def test_prefill_and_decode_together_share_a_name_space(helm: Helm) -> None:
    spec = dict(pods(helm.render(CASES["together"])))["demo-baton-together"]
    assert spec["shareProcessNamespace"]
    assert [container["name"] for container in spec["containers"]] == ["prefill", "decode"]
    ports = [container["ports"][0]["containerPort"] for container in spec["containers"]]
    assert ports == [50061, 50062]


def test_the_test_hook_generates_for_real(helm: Helm) -> None:
    pod = named(helm.render({}), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert "baton generate" in pod["spec"]["containers"][0]["args"][0]

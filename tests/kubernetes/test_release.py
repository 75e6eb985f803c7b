"""The chart through Helm against a real API server: every option, and one release's whole life."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.helm.cases import ADD_ONS, CASES, NEEDS
from tests.helm.helms import NAMESPACE, Helm3, HelmError, Manifest
from tests.kubernetes.api import Object, wait_for
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.releases import (
    REVISION,
    ROLES,
    SMALL,
    START_LIMIT_S,
    Release,
    installed,
    merged,
)
from tests.kubernetes.streams import TOKENS, Streams

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

VERSION = "1.20.2"


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> str:
    cluster.api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    return NAMESPACE


@pytest.mark.parametrize("case", sorted(CASES.keys() - NEEDS.keys()))
def test_the_api_server_takes_every_option_as_it_is(
    cluster: Cluster, namespace: str, case: str
) -> None:
    for manifest in Helm3(cluster.helm, VERSION).render(CASES[case]):
        if manifest["kind"] in ADD_ONS:
            continue
        kept = cluster.api.create(_path(cluster, namespace, manifest), manifest, dryRun="All")
        lost = dropped(manifest, kept)
        assert not lost, f"{manifest['kind']} {manifest['metadata']['name']} lost {lost}"


@pytest.mark.parametrize("case", NEEDS)
def test_an_option_that_the_cluster_is_too_old_for_is_refused(cluster: Cluster, case: str) -> None:
    with pytest.raises(HelmError, match=NEEDS[case]):
        Helm3(cluster.helm, VERSION).render(CASES[case])


def dropped(sent: Any, kept: Any, path: str = "") -> list[str]:
    """What was said and is not there any more: an API server drops what it does not know."""
    if isinstance(sent, dict):
        lost = []
        for key, value in sent.items():
            here = f"{path}.{key}"
            if not isinstance(kept, dict) or key not in kept:
                # Nothing said is nothing lost.
                lost += [here] if value not in ({}, [], "", None, False, 0) else []
            else:
                lost += dropped(value, kept[key], here)
        return lost
    if isinstance(sent, list):
        if not isinstance(kept, list) or len(kept) < len(sent):
            return [path]
        return [d for n, s in enumerate(sent) for d in dropped(s, kept[n], f"{path}[{n}]")]
    return []


def _path(cluster: Cluster, namespace: str, manifest: Manifest) -> str:
    version = manifest["apiVersion"]
    base = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    served: list[Object] = cluster.api.get(base)["resources"]
    (name,) = {
        resource["name"]
        for resource in served
        if resource["kind"] == manifest["kind"] and "/" not in resource["name"]
    }
    return f"{base}/namespaces/{namespace}/{name}"


def _check_revisions(release: Release) -> None:
    """Routers list workers of their own revision alone: no KV passes between generations."""
    revision = {
        run.address: run.item["metadata"]["labels"][REVISION]
        for role in ROLES
        for run in release.pods(role)
    }
    for router in release.pods("router"):
        # One that is only starting, or already ending, says nothing.
        with contextlib.suppress(httpx.TransportError):
            found = {address.split(":")[0] for address in release.states(router)}
            seen = {revision[address] for address in found & revision.keys()}
            assert seen <= {revision[router.address]}, f"{router.name} lists {found}"


def test_a_release_is_installed_upgraded_under_load_and_uninstalled(cluster: Cluster) -> None:
    # A role's old workers go this long after its new ones are Ready, both roles' at once: by then
    # their router is, too, or the old one would have nobody left.
    slowly = {role: {"minReadySeconds": 20} for role in ("prefill", "decode")}
    with installed(cluster, "life", slowly, workers=2) as release:
        old = {run.name for role in ("router", "prefill", "decode") for run in release.pods(role)}
        expected = release.answer(TOKENS)
        with pytest.raises(HelmError, match="replica"):
            release.upgrade({"router": {"replica": 3}})

        streams = Streams(release)
        changed = {"prefill": {"settings": {"page_size": 32}},
                   "decode": {"settings": {"page_size": 32}}}  # fmt: skip
        kubelet = cluster.kubelet
        kubelet.hold_new = True
        release.upgrade(merged(merged(SMALL, slowly), changed))

        def serves_until(reached: Callable[[], bool], says: str, limit_s: float) -> None:
            """By either generation: the old one finishes what it has."""
            deadline = time.monotonic() + limit_s
            while not reached():
                _check_revisions(release)
                assert expected.startswith(release.answer(8))
                assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {says}"

        def started() -> bool:
            runs = (run for role in ("prefill", "decode") for run in release.pods(role))
            new = [run for run in runs if run.name not in old]
            return len(new) == 2 and all(run.ready for run in new)

        def replaced() -> bool:
            return old <= {e.name for e in kubelet.ended}

        serves_until(started, "the new workers have started", START_LIMIT_S)
        kubelet.hold_new = False
        kubelet.held.clear()
        serves_until(lambda: not streams.running, "the streams have ended", 180.0)
        streams.check(expected)
        serves_until(replaced, "the old generation is gone", 240.0)
        release.wait_until_serving(workers=2)
        assert release.answer(TOKENS) == expected
        release.wait_until_balanced()
        assert "Succeeded" in release.helm("test", "--timeout", "3m")
        release.helm("uninstall")
        wait_for(lambda: not release.objects(), "nothing of it is left", limit_s=120.0)
        wait_for(
            lambda: not kubelet.of_namespace("life"), "its processes have ended", limit_s=120.0
        )
        went = {e.name: e for e in kubelet.ended if e.name.startswith("life-")}
        servers = {name: e for name, e in went.items() if not name.endswith("-test")}
        assert len(servers) >= 6
        assert not [e for e in servers.values() if e.killed or any(e.exits.values())]

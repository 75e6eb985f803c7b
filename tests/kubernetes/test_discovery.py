"""Routers find their workers as pods of a real API server: come, Ready, drained, gone."""

import contextlib
from collections.abc import Iterator

import httpx
import pytest

from tests.kubernetes.api import ApiError, wait_for
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.network import silence
from tests.kubernetes.pod import PodRun, target
from tests.kubernetes.releases import Release, installed
from tests.kubernetes.streams import TOKENS, Streams

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

DRAIN = "baton.dev/drain"
RECONCILE_S = 5.0
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.fixture(scope="module")
def release(cluster: Cluster) -> Iterator[Release]:
    """Two routers, one prefill and two decode workers."""
    values = {
        "router": {"replicas": 2, "settings": {"kubernetes_reconcile_s": RECONCILE_S}},
        "decode": {"replicas": 2},
    }
    with installed(cluster, "baton", values, workers=3) as release:
        yield release


@pytest.fixture(scope="module")
def expected(release: Release) -> str:
    return release.answer(TOKENS)


@pytest.fixture(autouse=True)
def _whole_afterwards(release: Release) -> Iterator[None]:
    yield
    release.wait_until_serving(workers=3)
    release.wait_until_balanced()


def at(run: PodRun) -> str:
    return f"{run.address}:50061"


def both(release: Release) -> list[dict[str, str]]:
    return [release.states(router) for router in release.pods("router")]


@contextlib.contextmanager
def annotated(release: Release, pod: PodRun) -> Iterator[None]:
    """The pod asks for no new requests meanwhile."""
    release.annotate(pod, DRAIN, "true")
    try:
        yield
    finally:
        release.annotate(pod, DRAIN, None)


def until_both_say(release: Release, worker: str, state: str | None) -> None:
    wait_for(
        lambda: all(states.get(worker) == state for states in both(release)),
        f"both routers say {state} of {worker}",
        limit_s=120.0,
    )


# ---- pods come and go ----------------------------------------------------------------------------


def test_helm_test_generates_through_the_pods_that_were_found(release: Release) -> None:
    assert "Succeeded" in release.helm("test", "--timeout", "3m")


def test_every_router_finds_the_same_pods(release: Release) -> None:
    found = {at(run): "ready" for role in ("prefill", "decode") for run in release.pods(role)}
    assert len(found) == 3
    wait_for(lambda: both(release) == [found, found], "both routers list what runs")


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_the_probes_of_an_old_cluster_run_as_written(release: Release, role: str) -> None:
    """This one has no gRPC probes yet; the tests' kubelet asks what the command would ask."""
    run = release.pods(role)[0]
    (spec,) = run.item["spec"]["containers"]
    for kind in PROBES:
        done = run.containers[role].execute(*spec[kind]["exec"]["command"])
        assert done.returncode == 0, done.stdout + done.stderr
    assert not target(spec["livenessProbe"])[1], "liveness asks for no service, and so for no peer"


def test_a_pod_that_comes_is_used_once_it_is_ready(release: Release) -> None:
    kubelet = release.cluster.kubelet
    before = {run.name for run in release.pods("decode")}
    kubelet.hold_new = True
    release.scale("decode", 3)
    try:

        def new() -> PodRun | None:
            return next((run for run in release.pods("decode") if run.name not in before), None)

        run = wait_for(new, "a third decode pod")
        wait_for(lambda: run.ready, "the new worker answers", limit_s=120.0)
        # It may have registered with one of them, which then holds it back.
        assert all(states.get(at(run)) != "ready" for states in both(release))
        assert release.answer(8)
        kubelet.held.discard(run.name)
        until_both_say(release, at(run), "ready")
    finally:
        kubelet.hold_new = False
        kubelet.held.clear()
        release.scale("decode", 2)


def test_a_pod_that_is_annotated_gets_no_new_requests(release: Release, expected: str) -> None:
    resting, other = release.pods("decode")[:2]
    with annotated(release, resting):
        until_both_say(release, at(resting), "draining")
        assert expected.startswith(release.answer(8))
        assert release.states()[at(other)] == "ready"
    until_both_say(release, at(resting), "ready")


def test_a_pod_that_is_deleted_finishes_what_it_has_taken(release: Release, expected: str) -> None:
    leaving = release.pods("decode")[0]
    streams = Streams(release, count=4)
    release.delete(leaving)
    until_both_say(release, at(leaving), "draining")
    streams.check(expected)
    until_both_say(release, at(leaving), None)
    kubelet = release.cluster.kubelet
    went = wait_for(
        lambda: next((e for e in kubelet.ended if e.name == leaving.name), None), "it has ended"
    )
    assert (went.exits, went.killed) == ({"decode": 0}, False)


def test_a_worker_that_is_killed_comes_back_in_its_pod(release: Release, expected: str) -> None:
    pod = release.pods("decode")[0]
    streams = Streams(release)
    pod.containers["decode"].process.kill()
    streams.check(expected)
    release.wait_until_serving(workers=3)
    assert pod.containers["decode"].restarts == 1
    # Nobody's liveness depends on a peer.
    others = release.pods("prefill") + release.pods("router")
    assert not [run for run in others if any(c.restarts for c in run.containers.values())]


def test_an_eviction_over_the_budget_is_refused(release: Release) -> None:
    held, other = release.pods("decode")[:2]
    kubelet = release.cluster.kubelet
    path = release.path("poddisruptionbudgets", f"{release.name}-decode", "/apis/policy/v1beta1")
    api = release.cluster.api
    kubelet.held.add(held.name)
    try:
        wait_for(lambda: api.get(path)["status"]["disruptionsAllowed"] == 0, "none may leave now")
        body = {"metadata": {"name": other.name}}
        with pytest.raises(ApiError, match="disruption budget") as refused:
            api.create(f"{release.path('pods', other.name)}/eviction", body)
        assert refused.value.status == httpx.codes.TOO_MANY_REQUESTS
    finally:
        kubelet.held.clear()


# ---- the API server is away ----------------------------------------------------------------------


def test_an_api_server_that_restarts_is_not_noticed_by_requests(
    release: Release, expected: str
) -> None:
    plane = release.cluster.plane
    streams = Streams(release)
    plane.kill_api()
    try:
        for router in release.pods("router"):
            said = wait_for(
                lambda router=router: _problem(release, router), "the router says that it is away"
            )
            assert "cannot be reached" in said
            assert release.health(router)["code"] == 200
        assert expected.startswith(release.answer(8))
        streams.check(expected)
    finally:
        plane.start_api()
    # What the watches waited for is older than what the new server remembers.
    pod = release.pods("decode")[0]
    with annotated(release, pod):
        until_both_say(release, at(pod), "draining")
    until_both_say(release, at(pod), "ready")


def test_a_router_cut_off_from_the_api_catches_up(release: Release, expected: str) -> None:
    pod, router = release.pods("decode")[0], release.router
    streams = Streams(release)
    silence(router.address, begin=True)
    with annotated(release, pod):
        try:
            wait_for(
                lambda: any(s.get(at(pod)) == "draining" for s in both(release)), "the other router"
            )
            wait_for(lambda: _problem(release, router), "it says so", limit_s=4 * RECONCILE_S + 20)
            assert release.states(router)[at(pod)] == "ready"
        finally:
            silence(router.address, begin=False)
        streams.check(expected)
        until_both_say(release, at(pod), "draining")
    until_both_say(release, at(pod), "ready")


def _problem(release: Release, router: PodRun) -> str:
    return str(release.health(router)["registry"])


# ---- rights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_right_that_is_taken_away_is_missed_by_name(release: Release, verb: str) -> None:
    path = release.path("roles", f"{release.name}-router", "/apis/rbac.authorization.k8s.io/v1")
    api = release.cluster.api
    rules = api.get(path)["rules"]
    fewer = [{**rules[0], "verbs": [v for v in rules[0]["verbs"] if v != verb]}]
    api.patch(path, {"rules": fewer})
    try:
        said = wait_for(
            lambda: _problem(release, release.router), "the router says what it may not"
        )
        assert f'cannot {verb} resource "pods"' in said
        assert f"{release.namespace}:{release.name}-router" in said
        assert release.health()["code"] == 200
    finally:
        api.patch(path, {"rules": rules})
    wait_for(lambda: not _problem(release, release.router), "it may again")


def test_routers_may_list_and_watch_pods_and_workers_nothing(release: Release) -> None:
    def rights(account: str) -> set[tuple[str, str]]:
        said = release.cluster.api.call(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
            {"spec": {"namespace": release.namespace}},
            headers={
                "Impersonate-User": f"system:serviceaccount:{release.namespace}:{account}",
                "Impersonate-Group": "system:authenticated",
            },
        )
        return {
            (verb, resource)
            for rule in said["status"]["resourceRules"]
            for verb in rule["verbs"]
            for resource in rule["resources"]
        }

    anybody = rights("nobody-of-this-name")
    assert rights(f"{release.name}-router") - anybody == {("list", "pods"), ("watch", "pods")}
    assert rights(f"{release.name}-worker") == anybody
    for role in ("prefill", "decode"):
        (spec,) = release.pods(role)[0].item["spec"]["containers"]
        assert not [m for m in spec["volumeMounts"] if "serviceaccount" in m["mountPath"]]

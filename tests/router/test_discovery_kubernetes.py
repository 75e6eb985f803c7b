"""Workers found as pods: the real client against a scripted API server that speaks HTTP watch."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.version import PROTOCOL_VERSION
from router.config import RouterConfig
from router.discovery_kubernetes import KubernetesPods, PodQuery
from router.registry import RegistryUnavailableError, WorkerRecord
from router.registry_pods import PodRegistry
from tests.router.conftest import MakeCluster
from tests.router.fakes import DECODE, PREFILL, Script, expected, until
from tests.router.kube_api import (
    DRAIN_ANNOTATION,
    PORT_ANNOTATION,
    ROLE_LABEL,
    SELECTOR,
    KubeApi,
    pod,
)

STARTS = itertools.count(1)
ROLES = {"prefill": PREFILL, "decode": DECODE}
CONNECTED = inference_pb2.WORKER_STATE_READY


class Workers:
    """What answers at the pods' addresses."""

    def __init__(self) -> None:
        self.at: dict[str, worker_pb2.RegisterRequest] = {}
        self.asked: list[str] = []

    def run(self, port: int, role: str = "decode", **changes: Any) -> str:
        """A worker process starts there; its instance id."""
        number = next(STARTS)
        fields: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "instance_id": f"{role}-{number}",
            "role": ROLES[role],
            "address": f"0.0.0.0:{port}",
            "fingerprint": "f00d",
            "epoch": number,
        }
        self.at[f"127.0.0.1:{port}"] = worker_pb2.RegisterRequest(**fields | changes)
        return str(fields["instance_id"])

    async def describe(self, address: str) -> worker_pb2.RegisterRequest:
        self.asked.append(address)
        if address not in self.at:
            raise ConnectionRefusedError(address)
        answer = worker_pb2.RegisterRequest()
        answer.CopyFrom(self.at[address])
        return answer


@pytest.fixture
def api() -> Iterator[KubeApi]:
    api = KubeApi()
    api.start()
    yield api
    api.stop()


@pytest.fixture
def workers() -> Workers:
    return Workers()


def source(api: KubeApi, tmp_path: Path, *, reconcile_s: float = 30.0) -> KubernetesPods:
    query = PodQuery(
        namespace="",
        selector=SELECTOR,
        role_label=ROLE_LABEL,
        port_annotation=PORT_ANNOTATION,
        drain_annotation=DRAIN_ANNOTATION,
        reconcile_s=reconcile_s,
    )
    return KubernetesPods(query, kubeconfig=str(api.kubeconfig(tmp_path)))


def make(pods: KubernetesPods, workers: Workers) -> PodRegistry:
    return PodRegistry(
        pods, look_interval_s=0.05, describe_timeout_s=1.0, describe=workers.describe
    )


@pytest.fixture
async def registry(api: KubeApi, workers: Workers, tmp_path: Path) -> AsyncIterator[PodRegistry]:
    registry = make(source(api, tmp_path), workers)
    await registry.start()
    yield registry
    await registry.close()


def ids(registry: PodRegistry) -> list[str]:
    return [record.id for record in registry.workers()]


async def found(registry: PodRegistry, instance_id: str) -> WorkerRecord:
    await until(lambda: registry.members.get(instance_id))
    record = registry.members.get(instance_id)
    assert record is not None
    return record


async def watching(api: KubeApi, *, from_version: str | None = None) -> None:
    await until(
        lambda: any(from_version in (None, call.version) for call in api.watches()), timeout_s=10
    )


# ---- which pods are workers --------------------------------------------------------------------


async def test_pods_that_are_there_and_pods_that_come_are_found(
    api: KubeApi, workers: Workers, tmp_path: Path
) -> None:
    first, second, third = workers.run(1001, "prefill"), workers.run(1002), workers.run(1003)
    api.put(pod("a", "prefill", 1001))
    api.put(pod("b", "decode", "", ports=[{"name": "grpc", "containerPort": 1002}]))
    registry = make(source(api, tmp_path), workers)
    await registry.start()
    await until(lambda: set(ids(registry)) == {first, second})
    assert api.calls[0].selector == SELECTOR
    assert registry.health().up
    await watching(api)
    api.put(pod("c", "decode", 1003))
    record = await found(registry, third)
    assert record.registration.address == "127.0.0.1:1003"  # as the cluster knows it
    assert len(api.lists()) == 1
    await registry.close()


@pytest.mark.parametrize(
    "lacking",
    [{"phase": "Pending"}, {"ready": False}, {"ip": ""}, {"annotations": {PORT_ANNOTATION: "x"}}],
    ids=["not running", "not ready", "no address", "no port"],
)
async def test_a_pod_is_no_worker_until_it_runs_and_is_ready(
    api: KubeApi, workers: Workers, registry: PodRegistry, lacking: dict[str, Any]
) -> None:
    other, late = workers.run(1001), workers.run(1002)
    api.put(pod("late", "decode", 1002, **lacking))
    api.put(pod("other", "decode", 1001))
    await found(registry, other)
    assert workers.asked.count("127.0.0.1:1002") == 0
    api.put(pod("late", "decode", 1002))
    await found(registry, late)


async def test_a_worker_that_is_not_what_its_label_says_is_listed_and_never_paired(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    honest = workers.run(1001)
    api.put(pod("honest", "decode", 1001))
    await found(registry, honest)
    mislabelled, foreign = workers.run(1002), workers.run(1003, fingerprint="beef")
    future = workers.run(1004, protocol_version=PROTOCOL_VERSION + 1)
    for number, name in enumerate(("mislabelled", "foreign", "future")):
        api.put(pod(name, "prefill" if name == "mislabelled" else "decode", 1002 + number))
    assert "labelled prefill" in (await found(registry, mislabelled)).incompatible
    assert "fingerprint" in (await found(registry, foreign)).incompatible
    assert "protocol version" in (await found(registry, future)).incompatible
    api.delete("uid-honest")
    await until(lambda: honest not in ids(registry))
    # Another one's leaving does not make it right.
    assert "labelled prefill" in (await found(registry, mislabelled)).incompatible


# ---- how pods change ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"deleted": True}, "is being deleted"),
        ({"annotations": {DRAIN_ANNOTATION: "true"}}, "is annotated"),
        ({"ready": False}, "is not Ready"),
    ],
    ids=["deletion", "annotation", "readiness"],
)
async def test_a_pod_that_should_rest_gets_no_new_requests_and_stays_listed(
    api: KubeApi, workers: Workers, registry: PodRegistry, change: dict[str, Any], why: str
) -> None:
    instance_id = workers.run(1001)
    api.put(pod("a", "decode", 1001))
    record = await found(registry, instance_id)
    record.connected = True
    assert record.ready
    api.put(pod("a", "decode", 1001, **change))
    await until(lambda: why in record.reason)
    assert record.state == inference_pb2.WORKER_STATE_DRAINING
    assert not record.ready
    api.put(pod("a", "decode", 1001, annotations={DRAIN_ANNOTATION: "false"}))
    await until(lambda: record.ready)
    assert ids(registry) == [instance_id]


@pytest.mark.parametrize("end", ["deleted", "finished"])
async def test_a_pod_that_ends_is_off_the_list(
    api: KubeApi, workers: Workers, registry: PodRegistry, end: str
) -> None:
    instance_id = workers.run(1001)
    api.put(pod("a", "decode", 1001))
    await found(registry, instance_id)
    if end == "deleted":
        api.delete("uid-a")
    else:
        api.put(pod("a", "decode", 1001, phase="Failed", ready=False))
    await until(lambda: not ids(registry))


async def test_a_container_that_restarts_in_its_pod_is_found_again(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    before = workers.run(1001)
    api.put(pod("a", "decode", 1001))
    record = await found(registry, before)
    record.connected = True
    asked = len(workers.asked)
    await asyncio.sleep(0.3)
    assert len(workers.asked) == asked  # nobody with a session is asked
    after = workers.run(1001)
    record.connected = False  # the old process's session ended
    await found(registry, after)
    assert ids(registry) == [after]


async def test_a_worker_that_said_goodbye_is_not_found_again_in_its_pod(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    instance_id = workers.run(1001)
    api.put(pod("a", "decode", 1001))
    await found(registry, instance_id)
    await registry.remove(instance_id, reason="it said so")
    await asyncio.sleep(0.3)
    assert ids(registry) == []


async def test_a_worker_may_register_all_the_same(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    instance_id = workers.run(1001)
    registration = await workers.describe("127.0.0.1:1001")
    registration.address = "127.0.0.1:1001"
    assert "no running pod" in await registry.register(registration)
    api.put(pod("a", "decode", 1001, ready=False))
    await until(lambda: registry._pods)
    assert ids(registry) == []
    assert await registry.register(registration) == ""
    record = await found(registry, instance_id)
    record.connected = True
    assert not record.ready  # listed, and held back until its pod is Ready
    api.put(pod("a", "decode", 1001))
    await until(lambda: record.ready)
    assert await registry.heartbeat(instance_id, worker_pb2.WorkerStatus(running=3))
    assert registry.workers()[0].status.running == 3


# ---- the API server misbehaves -----------------------------------------------------------------


async def test_a_dropped_watch_goes_on_where_it_was(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    first, second = workers.run(1001), workers.run(1002)
    await watching(api)
    api.put(pod("a", "decode", 1001))
    await found(registry, first)
    seen = api.version
    api.hang_up()
    api.put(pod("b", "decode", 1002))  # while nobody watches
    await found(registry, second)
    assert len(api.lists()) == 1
    assert [call.version for call in api.watches()][1] == seen


@pytest.mark.parametrize("in_stream", [True, False], ids=["event", "status"])
async def test_an_expired_place_leads_to_a_new_list(
    api: KubeApi, workers: Workers, registry: PodRegistry, in_stream: bool
) -> None:
    api.gone_in_stream = in_stream
    first, second, third = workers.run(1001), workers.run(1002), workers.run(1003)
    api.put(pod("a", "decode", 1001))
    await found(registry, first)
    api.delete("uid-a", silently=True)
    api.put(pod("b", "decode", 1002), silently=True)
    api.forget()
    await found(registry, second)
    assert ids(registry) == [second]
    assert len(api.lists()) == 2
    assert registry.health().failures == 0
    await watching(api, from_version=api.version)
    api.put(pod("c", "decode", 1003))
    await found(registry, third)


async def test_bookmarks_move_the_place(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    await watching(api)
    api.bookmark()
    marked = api.version
    await asyncio.sleep(0.2)
    api.hang_up()
    await watching(api, from_version=marked)
    assert len(api.lists()) == 1


async def test_what_no_event_told_is_found_by_the_next_list(
    api: KubeApi, workers: Workers, tmp_path: Path
) -> None:
    registry = make(source(api, tmp_path, reconcile_s=1.0), workers)
    await registry.start()
    lost, new = workers.run(1001), workers.run(1002)
    api.put(pod("lost", "decode", 1001))
    await found(registry, lost)
    api.delete("uid-lost", silently=True)
    api.put(pod("new", "decode", 1002), silently=True)
    await until(lambda: ids(registry) == [new], timeout_s=10)
    await registry.close()


async def test_without_the_api_known_pods_serve_on(
    api: KubeApi, workers: Workers, registry: PodRegistry
) -> None:
    first, second = workers.run(1001), workers.run(1002)
    api.put(pod("a", "decode", 1001))
    record = await found(registry, first)
    record.connected = True
    api.stop()
    await until(lambda: not registry.health().up, timeout_s=10)
    assert "cannot be reached" in registry.health().problem
    assert record.ready
    assert registry.sync_age_s() > 0
    api.put(pod("b", "decode", 1002))
    api.start()
    await found(registry, second)
    assert registry.health().up
    assert ids(registry) == [first, second]


async def test_a_refusal_is_told_and_tried_again(
    api: KubeApi, workers: Workers, tmp_path: Path
) -> None:
    api.refuse = 403
    registry = make(source(api, tmp_path), workers)
    await registry.start()
    await until(lambda: "refuses: 403" in registry.health().problem, timeout_s=10)
    assert registry.health().problem.endswith(": Forbidden by the script")  # the server's words
    assert not registry.health().up
    api.refuse = 0
    await until(lambda: registry.health().up, timeout_s=10)
    await registry.close()


def test_nothing_that_says_where_the_api_is_fails_at_start(tmp_path: Path) -> None:
    from router.registry_choice import make_registry

    config = RouterConfig(registry="kubernetes", kubernetes_kubeconfig=str(tmp_path / "absent"))
    with pytest.raises(RegistryUnavailableError, match="kubernetes"):
        make_registry(config)


# ---- a router over pods ------------------------------------------------------------------------


async def test_a_router_serves_with_the_workers_it_finds(
    api: KubeApi, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = await make_cluster(
        registry="kubernetes",
        kubernetes_kubeconfig=str(api.kubeconfig(tmp_path)),
        heartbeat_interval_s=0.1,
    )
    assert "no prefill worker" in (await cluster.http.get("/health")).json()["reason"]
    prefill, decode = await cluster.worker(PREFILL), await cluster.worker(DECODE)
    for worker, role in ((prefill, "prefill"), (decode, "decode")):
        api.put(pod(role, role, worker.registration.address.rpartition(":")[2]))
    await cluster.usable(prefill, decode)
    assert (await cluster.generate(max_tokens=5)).ids == expected([1, 2, 3], 5)
    # What runs goes on while its pod is being deleted; what comes is refused.
    decode.script = Script(token_delay_s=0.05)
    running = asyncio.create_task(cluster.generate(max_tokens=30))
    await until(lambda: len(decode.kinds("reserve")) == 2)
    port = decode.registration.address.rpartition(":")[2]
    api.put(pod("decode", "decode", port, deleted=True))
    await until(lambda: "no decode worker" in cluster.router.why_not_ready())
    assert (await cluster.complete(max_tokens=5)).status_code == 503
    assert (await running).ids == expected([1, 2, 3], 30)
    listed = {w["id"]: w for w in (await cluster.http.get("/workers")).json()}
    assert listed[decode.id]["state"] == "draining"
    assert "being deleted" in listed[decode.id]["reason"]
    assert 'baton_registry_up{kind="kubernetes"} 1.0' in (await cluster.http.get("/metrics")).text

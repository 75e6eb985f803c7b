"""An operator's word to drain a worker, and a router that stops."""

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, UNIFIED, Script, expected, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _drain(cluster: Cluster, worker: str, **drain: float) -> str:
    stub = worker_pb2_grpc.RegistryStub(cluster.channel)
    order = worker_pb2.DrainWorkerRequest(worker=worker, drain=worker_pb2.DrainRequest(**drain))
    return str((await stub.DrainWorker(order, timeout=5)).instance_id)


@pytest.mark.parametrize("name", ["id", "beginning", "address"])
async def test_a_worker_is_drained_by_any_of_its_names(cluster: Cluster, name: str) -> None:
    prefill, decode = await cluster.pair(decode=Script(token_delay_s=0.02))
    other = await cluster.worker(DECODE)
    await cluster.usable(prefill, other)
    names = {
        "id": decode.id,
        "beginning": prefill.id[:4],
        "address": decode.registration.address,
    }
    victim = prefill if name == "beginning" else decode
    running = asyncio.create_task(cluster.generate(max_tokens=20))
    await until(lambda: prefill.kinds("ticket"))
    assert await _drain(cluster, names[name], timeout_s=7.5) == victim.id
    assert [order.timeout_s for order in victim.drains] == [7.5]
    # Known at once, not a ping later.
    assert not cluster.router.fleet.registry.members.get(victim.id).ready  # type: ignore[union-attr]
    assert (await running).ids == expected([1, 2, 3], 20)


async def test_the_workers_own_time_is_not_overruled_where_none_is_given(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    await _drain(cluster, decode.id)
    assert not decode.drains[0].HasField("timeout_s")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("decode-none", grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.NOT_FOUND),
        ("decode-", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_name_that_fits_none_or_several_drains_nobody(
    cluster: Cluster, name: str, code: grpc.StatusCode
) -> None:
    prefill, decode = await cluster.pair()
    other = await cluster.worker(DECODE)
    await cluster.usable(prefill, other)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(cluster, name)
    assert caught.value.code() == code
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        assert decode.id in caught.value.details()
        assert other.id in caught.value.details()
    assert not decode.drains
    assert not other.drains


async def test_a_worker_out_of_reach_cannot_be_told(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    decode.hung = True
    await until(lambda: not cluster.router.fleet.registry.members.get(decode.id).connected)  # type: ignore[union-attr]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _drain(cluster, decode.id)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    decode.hung = False


async def test_a_stopping_router_is_not_ready_yet_alive_and_hints_when_to_come_back(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster()
    await cluster.pair(decode=Script(token_delay_s=0.05))
    call = cluster.stub.Generate(request(max_tokens=20))
    await anext(aiter(call))
    stopping = asyncio.create_task(cluster.server.stop(drain_timeout_s=10))
    await until(lambda: cluster.router.draining)
    health = health_pb2_grpc.HealthStub(cluster.channel)
    # A failing liveness probe would end the very streams that the drain lets finish.
    for name, status in (("", SERVING), ("baton.v1.Inference", NOT_SERVING)):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == status
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=2)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
    refused = await cluster.complete(max_tokens=2)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    ids = [token.id async for response in call for token in response.tokens]
    assert len(ids) == 19
    await stopping


async def test_an_instance_that_started_earlier_never_takes_an_address_back(
    cluster: Cluster,
) -> None:
    await cluster.pair()
    registry = cluster.router.fleet.registry
    newer = worker_pb2.RegisterRequest()
    newer.CopyFrom(registry.workers()[0].registration)
    newer.instance_id, newer.epoch, newer.role = "prefill-new", 200, PREFILL
    assert await registry.register(newer) == ""
    older = worker_pb2.RegisterRequest()
    older.CopyFrom(newer)
    older.instance_id, older.epoch = "prefill-old", 100
    assert "prefill-new" in await registry.register(older)
    assert "prefill-old" not in [record.id for record in registry.workers()]


async def test_a_prefill_worker_that_took_its_leave_is_not_missed(cluster: Cluster) -> None:
    """Its goodbye may come before decode's first token: decode has all the KV by then."""
    prefill, _ = await cluster.pair(decode=Script(token_delay_s=0.3))
    running = asyncio.create_task(cluster.generate(max_tokens=4))
    await until(lambda: prefill.kinds("ticket"))
    link = cluster.router.fleet._links[prefill.id]
    await until(lambda: not link.pending_tokens)  # its token is here
    prefill.say(goodbye=worker_pb2.Goodbye())
    await until(lambda: link.left)
    result = await running
    assert result.ids == expected([1, 2, 3], 4)
    assert result.last.report.replays == 0
    await asyncio.sleep(0.3)
    assert not link.record.connected  # nobody dials it again


async def test_a_request_that_met_a_worker_on_its_way_out_goes_elsewhere(
    cluster: Cluster,
) -> None:
    prefill, decode = await cluster.pair(prefill=Script(token_delay_s=5))
    running = asyncio.create_task(cluster.generate(max_tokens=4))
    await until(lambda: prefill.kinds("prefill"))
    other = await cluster.worker(PREFILL)
    await cluster.usable(other, decode)
    prefill.say(goodbye=worker_pb2.Goodbye())
    result = await running
    assert result.ids == expected([1, 2, 3], 4)
    report = result.last.report
    # A goodbye means that nothing of what was taken is open: this was not taken, so nothing failed.
    assert (report.replays, report.prefill_worker) == (0, other.id)


@pytest.mark.parametrize(
    ("role", "asked"), [(PREFILL, "prefill"), (DECODE, "reserve"), (UNIFIED, "generate")]
)
async def test_a_request_turned_away_by_a_draining_worker_is_no_replay(
    make_cluster: MakeCluster, role: Any, asked: str
) -> None:
    # Nobody else is there yet: it waits, and is not given to the same one again.
    cluster = await make_cluster(max_replays=0, replay_wait_s=10.0)
    draining = Script(turn_away=True)
    if role == UNIFIED:
        victim = await cluster.unified(draining)
    elif role == PREFILL:
        victim, _ = await cluster.pair(prefill=draining)
    else:
        _, victim = await cluster.pair(decode=draining)
    running = asyncio.create_task(cluster.generate(max_tokens=4))
    await until(lambda: victim.kinds(asked))
    other = await cluster.worker(role)
    result = await running
    assert result.ids == expected([1, 2, 3], 4)
    assert result.last.report.replays == 0
    assert len(victim.kinds(asked)) == 1
    assert other.id in (result.last.report.prefill_worker, result.last.report.decode_worker)
    assert not cluster.router.fleet.registry.members.get(victim.id).ready  # type: ignore[union-attr]


async def test_last_tokens_are_read_though_the_registry_heard_first_that_the_worker_is_gone(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(silence_timeout_s=5.0)
    prefill, decode = await cluster.pair(decode=Script(token_delay_s=0.02))
    link = cluster.router.fleet._links[decode.id]
    read, readable = link._read, asyncio.Event()

    async def reads_late(call: Any) -> worker_pb2.WorkerMessage:
        await readable.wait()
        return await read(call)

    running = asyncio.create_task(cluster.generate(max_tokens=10))
    await until(lambda: prefill.kinds("ticket"))
    link._read = reads_late  # type: ignore[method-assign]
    await until(lambda: not decode._tasks)  # its last token is said
    decode.say(goodbye=worker_pb2.Goodbye())
    await decode.deregister()
    assert decode.id not in [record.id for record in cluster.router.fleet.registry.workers()]
    readable.set()
    result = await running
    assert result.ids == expected([1, 2, 3], 10)
    assert result.last.report.replays == 0
    await until(lambda: not cluster.router.fleet._retiring)


async def test_a_goodbye_takes_a_worker_off_the_list_where_its_word_to_the_registry_is_lost(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(forget_lost_s=600.0)
    _, decode = await cluster.pair()
    decode._heart.cancel()
    decode.say(goodbye=worker_pb2.Goodbye())
    registry = cluster.router.fleet.registry
    await until(lambda: registry.members.get(decode.id) is None)


async def test_a_status_that_comes_late_makes_no_draining_worker_ready(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    registry = cluster.router.fleet.registry
    before = decode.status()
    await _drain(cluster, decode.id)
    assert await registry.heartbeat(decode.id, before)
    assert not registry.members.get(decode.id).ready  # type: ignore[union-attr]


async def test_a_router_that_stops_waits_for_no_worker_that_leaves(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    await cluster.router.fleet.registry.remove(decode.id, reason="a test")
    await until(lambda: cluster.router.fleet._retiring)
    async with asyncio.timeout(3):
        await cluster.router.fleet.close()


async def test_a_worker_that_only_left_the_list_keeps_no_session(cluster: Cluster) -> None:
    """A pod that lost its label, say: it has no reason to end the session itself."""
    _, decode = await cluster.pair()
    fleet = cluster.router.fleet
    await fleet.registry.remove(decode.id, reason="a test")
    await until(lambda: fleet._retiring)
    await until(lambda: not fleet._retiring)

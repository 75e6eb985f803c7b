"""Workers die, hang, fail and come back: exact tokens, or a typed error soon."""

import time

import grpc
import pytest

from protos.baton.v1 import inference_pb2, worker_pb2
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, Script, expected, until

LENGTH = 6


async def add_spare(cluster: Cluster, role: int) -> None:
    """A second worker of that role, which works as it should."""
    spare = await cluster.worker(role)
    other = next(w for w in cluster.workers if w.role != role)
    await cluster.usable(*((spare, other) if role == PREFILL else (other, spare)))


async def prefer(cluster: Cluster, worker_id: str) -> None:
    """Has the policy choose that worker while it is usable."""
    choose = cluster.router._policy.choose

    def biased(pairs, *, prompt_tokens):  # type: ignore[no-untyped-def]
        favoured = [p for p in pairs if p.involves(frozenset({worker_id}))]
        return choose(favoured or pairs, prompt_tokens=prompt_tokens)

    cluster.router._policy.choose = biased  # type: ignore[method-assign]


async def test_decode_dies_at_any_token_and_the_client_does_not_notice(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair()
    choose = cluster.router._policy.choose
    for index in range(1, LENGTH):
        doomed = await cluster.worker(DECODE, Script(die_before=index))
        await cluster.usable(prefill, doomed)
        cluster.router._policy.choose = choose  # type: ignore[method-assign]
        await prefer(cluster, doomed.id)
        result = await cluster.generate(max_tokens=LENGTH, seed=2)
        assert result.ids == expected([1, 2, 3], LENGTH, seed=2)
        assert result.indices == list(range(LENGTH))
        assert result.last.report.replays == 1
        assert result.last.usage.completion_tokens == LENGTH
        replay = prefill.kinds("prefill")[-1]
        assert list(replay.prompt_ids) == [1, 2, 3]
        # A dying worker's last message may be lost with it; what arrived is replayed, no more.
        so_far = list(replay.output_so_far)
        assert 1 <= len(so_far) <= index
        assert so_far == expected([1, 2, 3], len(so_far), seed=2)
        assert (replay.attempt, replay.sampling.seed) == (1, 2)


async def test_prefill_dies_before_its_token_and_another_takes_over(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(prefill=Script(die_before=0))
    await prefer(cluster, prefill.id)
    await add_spare(cluster, PREFILL)
    result = await cluster.generate(max_tokens=LENGTH)
    assert result.ids == expected([1, 2, 3], LENGTH)
    assert result.last.report.replays == 1
    assert decode.kinds("abort")[0].attempt == 0


async def test_prefill_may_die_once_decode_has_spoken(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair(decode=Script(token_delay_s=0.03))
    call = cluster.stub.Generate(request(max_tokens=LENGTH))
    ids: list[int] = []
    async for response in call:
        ids += [token.id for token in response.tokens]
        if len(ids) == 2:
            prefill.die()
    assert ids == expected([1, 2, 3], LENGTH)
    assert response.report.replays == 0


async def test_a_retryable_failure_is_replayed_on_the_same_pair_where_it_is_the_only_one(
    cluster: Cluster,
) -> None:
    _, decode = await cluster.pair()
    for index in range(1, LENGTH):
        decode.script.fail_before = index
        result = await cluster.generate(max_tokens=LENGTH)
        assert result.ids == expected([1, 2, 3], LENGTH)
        assert result.last.report.replays == 1


@pytest.mark.parametrize("between", [True, False])
async def test_after_a_failure_between_two_workers_both_are_left_out_where_there_is_a_choice(
    cluster: Cluster, between: bool
) -> None:
    prefill, decode = await cluster.pair()
    await add_spare(cluster, PREFILL)
    await add_spare(cluster, DECODE)
    spare, other = cluster.workers[-2:]
    await cluster.usable(spare, other)
    # The first of the two where there is a choice.
    await prefer(cluster, decode.id)
    await prefer(cluster, prefill.id)
    if between:
        decode.script.lose_peer_before = 1
    else:
        decode.script.fail_before = 1
    result = await cluster.generate(max_tokens=LENGTH)
    assert result.ids == expected([1, 2, 3], LENGTH)
    assert result.last.report.replays == 1
    again = spare if between else prefill
    assert result.last.report.prefill_worker == again.id


async def test_the_only_decode_worker_dies_and_the_client_is_told(cluster: Cluster) -> None:
    _, decode = await cluster.pair(decode=Script(die_before=3))
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=LENGTH)
    assert time.monotonic() - started < 5
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert decode.id in str(caught.value.details())
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"


async def test_a_hung_worker_is_told_within_five_seconds_on_the_default_clocks(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(ping_interval_s=0.5, silence_timeout_s=2.5, replay_wait_s=0.5)
    await cluster.pair(decode=Script(hang_before=2))
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=LENGTH)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert 1 < time.monotonic() - started < 5


@pytest.mark.parametrize("role", [PREFILL, DECODE])
async def test_a_hung_worker_is_replaced_by_a_spare(cluster: Cluster, role: int) -> None:
    script = Script(hang_before=0 if role == PREFILL else 2)
    pair = await cluster.pair(
        prefill=script if role == PREFILL else None, decode=script if role == DECODE else None
    )
    await prefer(cluster, pair[0 if role == PREFILL else 1].id)
    await add_spare(cluster, role)
    result = await cluster.generate(max_tokens=LENGTH)
    assert result.ids == expected([1, 2, 3], LENGTH)


async def test_a_worker_that_hung_is_used_again_when_it_comes_back(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    decode.hung = True
    await until(lambda: not cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1))
    health = await cluster.http.get("/health")
    assert health.status_code == 503
    assert decode.id in health.json()["reason"]
    states = {w["id"]: w["state"] for w in (await cluster.http.get("/workers")).json()}
    assert states[decode.id] == "lost"
    decode.hung = False
    await until(lambda: cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1))
    assert (await cluster.generate(max_tokens=4)).ids == expected([1, 2, 3], 4)


async def test_replays_are_bounded(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(max_replays=2)
    error = worker_pb2.Error(code=worker_pb2.ERROR_CODE_DATA_LOSS, message="again and again")
    _, decode = await cluster.pair(decode=Script(reserve_error=error, retryable=True))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=4)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert [r.attempt for r in decode.kinds("reserve")] == [0, 1, 2]


async def test_no_memory_is_429_with_a_hint_and_not_tried_again_there(cluster: Cluster) -> None:
    error = worker_pb2.Error(
        code=worker_pb2.ERROR_CODE_RESOURCE_EXHAUSTED, message="no pages", retry_after_s=2.5
    )
    _, decode = await cluster.pair(decode=Script(reserve_error=error, retryable=True))
    answer = await cluster.complete(max_tokens=4)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert len(decode.kinds("reserve")) == 1
    streamed = await cluster.complete(max_tokens=4, stream=True)
    assert streamed.status_code == 429


async def test_an_error_after_the_stream_began_is_an_event_without_done(cluster: Cluster) -> None:
    await cluster.pair(decode=Script(die_before=3))
    body = {"prompt": [1, 2, 3], "stream": True, "max_tokens": 9}
    async with cluster.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = [line async for line in answer.aiter_lines() if line]
    assert '"error":{"message"' in lines[-1]
    assert '"code":"unavailable"' in lines[-1]
    assert not any("[DONE]" in line for line in lines)


async def test_a_new_instance_at_an_address_replaces_the_old_one(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    port = int(decode.registration.address.rpartition(":")[2])
    decode.hung = True  # its process is gone, though nothing says so
    await decode._server.stop(0)
    reborn = await cluster.worker(DECODE)
    reborn.registration.address = f"127.0.0.1:{port}"
    await reborn._registry.Register(reborn.registration)
    listed = [w["id"] for w in (await cluster.http.get("/workers")).json()]
    assert decode.id not in listed
    assert reborn.id in listed


async def test_a_silent_lost_worker_leaves_the_list(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    decode.die()
    await until(lambda: decode.id not in [r.id for r in cluster.router.fleet.registry.workers()])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"fingerprint": "beef"}, "fingerprint"), ({"protocol_version": 99}, "version 99")],
)
async def test_an_incompatible_worker_is_listed_and_never_paired(
    cluster: Cluster, wrong: dict[str, object], reason: str
) -> None:
    await cluster.worker(PREFILL)
    odd = await cluster.worker(DECODE, **wrong)
    listed = {w["id"]: w for w in (await cluster.http.get("/workers")).json()}
    assert listed[odd.id]["state"] == "incompatible"
    assert reason in listed[odd.id]["reason"]
    assert not odd.received
    assert (await cluster.http.get("/health")).status_code == 503


async def test_an_incompatible_worker_is_taken_once_the_others_have_left(cluster: Cluster) -> None:
    first, _ = await cluster.pair()
    newer = (
        await cluster.worker(PREFILL, fingerprint="beef"),
        await cluster.worker(DECODE, fingerprint="beef"),
    )
    for old in cluster.workers[:2]:
        old._heart.cancel()
        await old._registry.Deregister(worker_pb2.DeregisterRequest(instance_id=old.id))
    await cluster.usable(*newer)
    assert first.id not in [r.id for r in cluster.router.fleet.registry.workers()]


async def test_a_draining_worker_gets_nothing_new(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    decode.state = inference_pb2.WORKER_STATE_DRAINING
    await until(lambda: not cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1))
    states = {w["id"]: w["state"] for w in (await cluster.http.get("/workers")).json()}
    assert states[decode.id] == "draining"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=4)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_an_unknown_instance_is_told_to_register_again(cluster: Cluster) -> None:
    worker = await cluster.worker(PREFILL)
    answer = await worker._registry.Heartbeat(worker_pb2.HeartbeatRequest(instance_id="who"))
    assert not answer.known

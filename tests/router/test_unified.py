"""A unified worker takes a request by itself, in place of a pair, and after one."""

from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.baton.v1 import inference_pb2, worker_pb2
from router.fleet import ModelFacts
from router.policy import LeastLoaded, Pair
from tests.router.conftest import Cluster, request
from tests.router.fakes import DECODE, PREFILL, UNIFIED, FakeWorker, Script, expected, until
from tests.router.test_doors import assert_phases_sum
from tests.router.test_faults import prefer

LENGTH = 6


async def test_it_serves_alone_and_says_that_nothing_moved(cluster: Cluster) -> None:
    worker = await cluster.unified()
    result = await cluster.generate(max_tokens=LENGTH, seed=3)
    assert result.ids == expected([1, 2, 3], LENGTH, seed=3)
    assert result.indices == list(range(LENGTH))
    report = result.last.report
    assert (report.transport, report.kv_bytes, report.replays) == ("none", 0, 0)
    assert (report.prefill_worker, report.decode_worker) == (worker.id, worker.id)
    assert result.last.usage.cached_tokens == 2
    (sent,) = [m.WhichOneof("kind") for m in worker.received]
    assert sent == "generate"


async def test_its_phases_have_no_transfer_and_still_sum(cluster: Cluster) -> None:
    timing = {"queue_ms": 5.5, "prefill_ms": 20.0}
    await cluster.unified(Script(token_delay_s=0.03, timing=timing))
    phases = (await cluster.generate(max_tokens=4)).last.report.phases
    assert_phases_sum(phases)
    assert (phases.queue_ms, phases.prefill_ms) == (5.5, 20.0)
    assert (phases.reserve_ms, phases.transfer_tail_ms, phases.verify_ms) == (0, 0, 0)
    assert phases.join_ms == pytest.approx(0.03)
    assert phases.first_decode_step_ms == pytest.approx(0.04)


@pytest.mark.parametrize("length", [1, 2])
async def test_the_shortest_outputs(cluster: Cluster, length: int) -> None:
    worker = await cluster.unified()
    result = await cluster.generate(max_tokens=length)
    assert result.ids == expected([1, 2, 3], length)
    assert_phases_sum(result.last.report.phases)
    assert result.last.report.decode_worker == worker.id
    assert result.last.finish_reason == inference_pb2.FINISH_REASON_LENGTH


async def test_the_request_reaches_it_whole(cluster: Cluster) -> None:
    worker = await cluster.unified()
    call = request([7, 8, 9], max_tokens=3, temperature=0.7, top_k=5, seed=11)
    call.cache_salt, call.priority = "tenant", -4
    async for _ in cluster.stub.Generate(call, timeout=30):
        pass
    (sent,) = worker.kinds("generate")
    assert list(sent.prompt_ids) == [7, 8, 9]
    assert (sent.cache_salt, sent.priority, sent.attempt) == ("tenant", -4, 0)
    assert (sent.sampling.temperature, sent.sampling.top_k, sent.sampling.seed) == (0.7, 5, 11)
    assert sent.sampling.max_tokens == 3


async def test_every_worker_hears_how_long_the_request_may_take(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    await _use(cluster, timeout=30)
    for worker, kind in ((prefill, "prefill"), (decode, "reserve")):
        (sent,) = worker.kinds(kind)
        assert 25 < sent.deadline_s < 31
    worker = await cluster.unified()
    await prefer(cluster, worker.id)
    await _use(cluster, timeout=30)
    assert 25 < worker.kinds("generate")[0].deadline_s < 31
    await _use(cluster)
    limit_s = cluster.router.config.request_timeout_s
    assert limit_s - 5 < worker.kinds("generate")[1].deadline_s <= limit_s


async def _use(cluster: Cluster, *, timeout: float | None = None) -> None:
    async for _ in cluster.stub.Generate(request(max_tokens=3), timeout=timeout):
        pass


async def test_prompt_logprobs_come_with_its_first_token(cluster: Cluster) -> None:
    await cluster.unified()
    result = await cluster.generate(max_tokens=3, prompt_logprobs=0)
    assert [len(response.prompt_tokens) for response in result.responses] == [3, 0, 0]


# ---- faults -------------------------------------------------------------------------------------


async def test_it_dies_at_any_token_and_another_goes_on(cluster: Cluster) -> None:
    spare = await cluster.unified()
    choose = cluster.router._policy.choose
    for index in range(LENGTH):
        doomed = await cluster.unified(Script(die_before=index))
        cluster.router._policy.choose = choose  # type: ignore[method-assign]
        await prefer(cluster, doomed.id)
        result = await cluster.generate(max_tokens=LENGTH, seed=2)
        assert result.ids == expected([1, 2, 3], LENGTH, seed=2)
        assert result.indices == list(range(LENGTH))
        assert result.last.report.replays == 1
        assert result.last.report.decode_worker == spare.id
        replay = spare.kinds("generate")[-1]
        so_far = list(replay.output_so_far)
        assert len(so_far) <= index
        assert so_far == expected([1, 2, 3], len(so_far), seed=2)
        assert_phases_sum(result.last.report.phases)


async def test_a_pair_goes_on_after_it(cluster: Cluster) -> None:
    _, decode = await cluster.pair()
    for index in range(LENGTH):
        doomed = await cluster.unified(Script(die_before=index))
        await prefer(cluster, doomed.id)
        result = await cluster.generate(max_tokens=LENGTH)
        assert result.ids == expected([1, 2, 3], LENGTH)
        assert result.last.report.replays == 1
        if index + 1 < LENGTH:  # else one token was left, which prefill alone gives
            assert result.last.report.decode_worker == decode.id
            assert result.last.report.transport == "grpc"


@pytest.mark.parametrize("role", [PREFILL, DECODE])
async def test_it_goes_on_after_a_pair(cluster: Cluster, role: int) -> None:
    script = Script(die_before=0 if role == PREFILL else 2)
    pair = await cluster.pair(
        prefill=script if role == PREFILL else None, decode=script if role == DECODE else None
    )
    worker = await cluster.unified()
    await prefer(cluster, pair[0].id)
    result = await cluster.generate(max_tokens=LENGTH)
    assert result.ids == expected([1, 2, 3], LENGTH)
    report = result.last.report
    assert (report.replays, report.prefill_worker, report.decode_worker) == (1, *[worker.id] * 2)
    # What the pair had moved before it broke was moved for this request.
    moved = ("grpc", 1000) if role == DECODE else ("none", 0)
    assert (report.transport, report.kv_bytes) == moved


async def test_it_takes_what_a_full_pair_turns_away(cluster: Cluster) -> None:
    error = worker_pb2.Error(code=worker_pb2.ERROR_CODE_RESOURCE_EXHAUSTED, message="no pages")
    _, decode = await cluster.pair(decode=Script(reserve_error=error, retryable=True))
    worker = await cluster.unified()
    await prefer(cluster, decode.id)
    result = await cluster.generate(max_tokens=LENGTH)
    assert result.ids == expected([1, 2, 3], LENGTH)
    assert result.last.report.decode_worker == worker.id


async def test_the_only_one_dies_and_the_client_is_told(cluster: Cluster) -> None:
    worker = await cluster.unified(Script(die_before=2))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=LENGTH)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    details = str(caught.value.details())
    assert f"unified worker {worker.id} was lost after" in details
    assert "no unified worker is ready" in details


async def test_a_retryable_failure_is_tried_again_there(cluster: Cluster) -> None:
    worker = await cluster.unified()
    for index in range(LENGTH):
        worker.script.fail_before = index
        result = await cluster.generate(max_tokens=LENGTH)
        assert result.ids == expected([1, 2, 3], LENGTH)
        assert result.last.report.replays == 1


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_client_that_leaves_aborts_there(cluster: Cluster, tokens: int) -> None:
    worker = await cluster.unified(Script(token_delay_s=0.05 if tokens else 10))
    call = cluster.stub.Generate(request(max_tokens=200))
    for _ in range(tokens):
        await call.read()
    await until(lambda: worker.kinds("generate"))
    call.cancel()
    await until(lambda: worker.kinds("abort"), timeout_s=1)
    await until(lambda: cluster.router.live == 0)


# ---- what operators see -------------------------------------------------------------------------


async def test_it_makes_the_router_ready_and_is_listed(cluster: Cluster) -> None:
    assert (await cluster.http.get("/health")).status_code == 503
    worker = await cluster.unified()
    assert (await cluster.http.get("/health")).status_code == 200
    health = health_pb2_grpc.HealthStub(cluster.channel)
    question = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
    serving = health_pb2.HealthCheckResponse.SERVING
    for _ in range(100):
        status = (await health.Check(question)).status
        if status == serving:
            break
    assert status == serving
    (listed,) = (await cluster.http.get("/workers")).json()
    assert (listed["id"], listed["role"], listed["state"]) == (worker.id, "unified", "ready")
    info = await cluster.stub.GetServerInfo(inference_pb2.GetServerInfoRequest())
    assert info.workers[0].role == inference_pb2.WORKER_ROLE_UNIFIED
    assert info.workers[0].state == inference_pb2.WORKER_STATE_READY
    await cluster.generate(max_tokens=3)
    metrics = (await cluster.http.get("/metrics")).text
    assert 'baton_workers{role="unified",state="ready"} 1.0' in metrics
    # Nothing was handed over.
    assert "baton_handover_seconds_count 0.0" in metrics
    worker.state = inference_pb2.WORKER_STATE_DRAINING
    await until(lambda: not cluster.pairs())
    health_answer = await cluster.http.get("/health")
    assert health_answer.status_code == 503
    assert worker.id in health_answer.json()["reason"]


async def test_what_is_missing_names_both_ways_to_serve(cluster: Cluster) -> None:
    worker = await cluster.unified()
    await cluster.worker(PREFILL)
    await until(lambda: cluster.router.fleet.registry.workers()[-1].ready)
    worker.die()
    await until(lambda: not cluster.pairs())
    reason = cluster.router.why_not_ready()
    assert "no decode worker is ready" in reason
    assert "no unified worker is ready" in reason


# ---- size ---------------------------------------------------------------------------------------


async def test_what_it_cannot_hold_is_refused_at_the_door(cluster: Cluster) -> None:
    await cluster.worker(UNIFIED, max_total_tokens=64)
    await until(cluster.pairs)
    long = await cluster.complete(prompt=[1] * 64, max_tokens=1)
    assert long.status_code == 400
    assert "empty unified worker" in long.json()["error"]["message"]
    much = await cluster.complete(prompt=[1] * 60, max_tokens=5)
    assert much.status_code == 400
    assert "ask for at most 4" in much.json()["error"]["message"]
    assert (await cluster.complete(prompt=[1] * 60, max_tokens=4)).status_code == 200


async def test_a_request_that_only_it_holds_goes_there(cluster: Cluster) -> None:
    workers = [await cluster.worker(role, max_total_tokens=64) for role in (PREFILL, DECODE)]
    await cluster.usable(*workers)
    worker = await cluster.unified()
    result = await cluster.generate(prompt=[1] * 100, max_tokens=4)
    assert result.last.report.decode_worker == worker.id


@pytest.mark.parametrize(
    ("prefill", "decode", "unified", "prompt", "memory"),
    [
        (100, 200, 0, 50, (200, "decode")),
        (100, 200, 150, 50, (200, "decode")),
        (100, 200, 150, 120, (150, "unified")),
        (0, 0, 150, 120, (150, "unified")),
        (0, 0, 0, 120, (0, "decode")),
    ],
)
def test_the_larger_memory_that_holds_the_prompt_counts(
    prefill: int, decode: int, unified: int, prompt: int, memory: tuple[int, str]
) -> None:
    facts = ModelFacts("m", "", 0, 10, prefill, decode, unified_capacity_tokens=unified)
    assert facts.memory_for(prompt) == memory


# ---- the choice ---------------------------------------------------------------------------------


@dataclass
class Record:
    status: worker_pb2.WorkerStatus


@dataclass(eq=False)
class Link:
    """What a policy looks at."""

    pending_tokens: int = 0
    requests: int = 0
    rows: int = 10
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        self.record = Record(worker_pb2.WorkerStatus(rows_total=self.rows))


def _pair(prefill: Link, decode: Link | None) -> Pair:
    return Pair(cast(Any, prefill), cast(Any, decode))


@pytest.mark.parametrize(
    ("prefill", "decode", "unified", "takes_it"),
    [
        (Link(), Link(), Link(), "pair"),
        (Link(pending_tokens=500), Link(), Link(), "unified"),
        (Link(pending_tokens=500), Link(), Link(pending_tokens=600), "pair"),
        (Link(), Link(requests=4), Link(requests=3), "unified"),
        (Link(), Link(requests=4), Link(requests=4), "pair"),
        (Link(), Link(requests=4, rows=100), Link(requests=3), "pair"),
    ],
)
def test_the_less_loaded_takes_it_and_a_pair_among_equals(
    prefill: Link, decode: Link, unified: Link, takes_it: str
) -> None:
    choices = {"pair": _pair(prefill, decode), "unified": _pair(unified, unified)}
    policy = LeastLoaded()
    for _ in range(4):  # whoever's turn it is
        chosen = policy.choose(list(choices.values()), prompt_tokens=10)
        assert chosen is choices[takes_it]


def test_equal_unified_workers_take_turns() -> None:
    pairs = [_pair(link, link) for link in (Link(), Link())]
    policy = LeastLoaded()
    chosen = [policy.choose(pairs, prompt_tokens=10) for _ in range(4)]
    assert chosen[0] is not chosen[1]
    assert chosen[:2] == chosen[2:]


def test_a_worker_is_not_a_pair_because_it_stands_alone() -> None:
    link = Link()
    assert _pair(link, link).unified
    assert not _pair(link, None).unified
    assert not _pair(link, Link()).unified


async def test_light_load_goes_to_the_pair_and_what_comes_beside_it_elsewhere(
    cluster: Cluster,
) -> None:
    _, decode = await cluster.pair(decode=Script(token_delay_s=0.05))
    worker = await cluster.unified()

    async def serves() -> FakeWorker | str:
        return (await cluster.generate(max_tokens=3)).last.report.decode_worker

    assert await serves() == decode.id
    first = cluster.stub.Generate(request(max_tokens=100))
    await first.read()
    assert await serves() == worker.id
    first.cancel()

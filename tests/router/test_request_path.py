"""What happens between a door and the workers at odd moments: nothing is lost, nothing stays."""

import asyncio
from collections.abc import Callable

import pytest

from protos.baton.v1 import inference_pb2, worker_pb2
from tests.router.conftest import Cluster, MakeCluster
from tests.router.fakes import PREFILL, Script, expected, until

LIMIT_S = 3.0
"""How long a replay may take here, for busy machines."""


async def test_an_abort_counts_while_the_request_is_being_admitted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, _ = await cluster.pair()
    encode = cluster.router._tokens
    admit = asyncio.Event()

    async def slow(*arguments: object) -> object:
        await admit.wait()
        return await encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster.router, "_tokens", slow)
    result = asyncio.create_task(cluster.generate(max_tokens=50, request_id="early"))
    await until(lambda: cluster.router.live == 1)
    answer = await cluster.stub.Abort(inference_pb2.AbortRequest(request_id="early"))
    assert answer.found
    admit.set()
    assert (await result).last.finish_reason == inference_pb2.FINISH_REASON_ABORT
    assert not prefill.kinds("prefill")


async def test_an_id_may_be_used_again_while_workers_still_end_the_request_before(
    cluster: Cluster,
) -> None:
    prefill, _ = await cluster.pair()
    for _ in range(2):
        await cluster.generate(max_tokens=2, request_id="again")
    first, second = (message.request_id for message in prefill.kinds("prefill"))
    assert first != second


async def test_prefill_that_dies_with_the_first_token_is_replayed_though_decode_spoke(
    cluster: Cluster,
) -> None:
    """Decode's second token may come before prefill's first one, which nobody else has."""
    prefill, _ = await cluster.pair(prefill=Script(first_token_delay_s=30))
    call = asyncio.create_task(cluster.generate(max_tokens=4))
    await until(lambda: [j for j in cluster.router._live.values() if j and j.attempts])
    journey = next(iter(cluster.router._live.values()))
    assert journey is not None
    await until(lambda: journey.attempts[0].decode_spoke)
    spare = await cluster.worker(PREFILL)
    await cluster.usable(spare, cluster.workers[1])
    prefill.die()
    result = await asyncio.wait_for(call, LIMIT_S)
    assert result.ids == expected([1, 2, 3], 4)
    assert result.last.report.replays == 1


async def test_a_worker_whose_front_alone_answers_is_not_taken_for_ready(
    make_cluster: MakeCluster,
) -> None:
    """Pings go through the engine; the hello does not."""
    cluster = await make_cluster()
    _, decode = await cluster.pair()
    take: Callable[[worker_pb2.RouterMessage], None] = decode._take
    deaf = True

    def front_alone(message: worker_pb2.RouterMessage) -> None:
        if not deaf:
            take(message)

    decode._take = front_alone  # type: ignore[method-assign]
    await until(lambda: not cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1))
    loop = asyncio.get_running_loop()
    end = loop.time() + 3 * cluster.server.config.silence_timeout_s
    while loop.time() < end:
        assert not cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1)
        await asyncio.sleep(0.01)
    deaf = False
    await until(lambda: cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1))

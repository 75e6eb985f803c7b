"""Requests end early, late, or not at all: workers are freed and bounds hold."""

import asyncio
import json
import socket

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, Script, expected, until

SLOW = Script(token_delay_s=0.02)


async def test_a_grpc_client_that_leaves_aborts_on_both_workers(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(decode=Script(token_delay_s=10))
    call = cluster.stub.Generate(request(max_tokens=50, request_id="gone"))
    await call.read()
    call.cancel()
    await until(lambda: decode.kinds("abort") and prefill.kinds("abort"), timeout_s=1)
    assert decode.kinds("abort")[0].request_id.startswith("gone~")
    await until(lambda: cluster.router.live == 0)
    text = (await cluster.http.get("/metrics")).text
    assert 'baton_requests_total{outcome="client_gone"} 1.0' in text


async def test_a_client_that_leaves_before_its_first_token_aborts_too(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(decode=Script(never_reserve=True))
    call = cluster.stub.Generate(request(max_tokens=50))
    await until(lambda: prefill.kinds("prefill"))
    call.cancel()
    await until(lambda: decode.kinds("abort") and prefill.kinds("abort"), timeout_s=1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", [True, False])
async def test_an_http_client_that_leaves_aborts_on_both_workers(
    cluster: Cluster, stream: bool, first: bool
) -> None:
    slow = Script(token_delay_s=10)
    prefill, decode = await cluster.pair(
        prefill=None if first else Script(token_delay_s=10), decode=slow
    )
    body = json.dumps({"prompt": [1, 2], "max_tokens": 50, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.ports.http)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    await until(lambda: prefill.kinds("ticket"))
    if stream and first:
        assert b"200" in await reader.readline()
    writer.close()
    await writer.wait_closed()
    await until(lambda: decode.kinds("abort") and prefill.kinds("abort"), timeout_s=1)
    await until(lambda: cluster.router.live == 0)


async def test_abort_by_id_ends_the_stream_with_what_there_is(cluster: Cluster) -> None:
    _, decode = await cluster.pair(decode=SLOW)
    call = cluster.stub.Generate(request(max_tokens=500, request_id="mine"))
    responses = [await anext(aiter(call))]
    answer = await cluster.stub.Abort(inference_pb2.AbortRequest(request_id="mine"))
    assert answer.found
    responses += [response async for response in call]
    assert responses[-1].finish_reason == inference_pb2.FINISH_REASON_ABORT
    ids = [token.id for response in responses for token in response.tokens]
    assert ids == expected([1, 2, 3], len(ids))
    assert responses[-1].usage.completion_tokens == len(ids) < 500
    await until(lambda: decode.kinds("abort"))
    unknown = await cluster.stub.Abort(inference_pb2.AbortRequest(request_id="mine"))
    assert not unknown.found


async def test_a_live_id_cannot_be_used_twice(cluster: Cluster) -> None:
    await cluster.pair(decode=SLOW)
    call = cluster.stub.Generate(request(max_tokens=500, request_id="mine"))
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_id="mine", max_tokens=2)
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    call.cancel()
    await until(lambda: cluster.router.live == 0)
    assert (await cluster.generate(request_id="mine", max_tokens=2)).ids


async def test_one_request_beyond_the_bound_is_refused_with_a_hint(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_queued_requests=3)
    await cluster.pair(decode=SLOW)
    calls = [cluster.stub.Generate(request(max_tokens=900)) for _ in range(3)]
    for call in calls:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(max_tokens=2)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
    answer = await cluster.complete(max_tokens=2)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    for call in calls:
        call.cancel()
    await until(lambda: cluster.router.live == 0)
    assert (await cluster.complete(max_tokens=2)).status_code == 200


async def test_a_clients_deadline_counts(cluster: Cluster) -> None:
    _, decode = await cluster.pair(decode=SLOW)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.stub.Generate(request(max_tokens=900), timeout=0.2):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: decode.kinds("abort"))
    assert cluster.router.live == 0


async def test_the_routers_own_deadline_is_504(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(request_timeout_s=0.2)
    _, decode = await cluster.pair(decode=Script(never_reserve=True))
    assert (await cluster.complete(max_tokens=9)).status_code == 504
    await until(lambda: decode.kinds("abort"))


@pytest.mark.parametrize(
    "bound", [{"max_buffered_tokens": 100}, {"write_timeout_s": 0.2}], ids=["buffer", "write"]
)
async def test_a_reader_that_stops_reading_is_ended_and_others_go_on(
    make_cluster: MakeCluster, bound: dict[str, int]
) -> None:
    cluster = await make_cluster(silence_timeout_s=5, **bound)
    prefill = await cluster.worker(PREFILL, context_length=10_000, max_total_tokens=10_000)
    decode = await cluster.worker(
        DECODE,
        Script(token_delay_s=0.0001),
        context_length=10_000,
        max_total_tokens=10_000,
    )
    await cluster.usable(prefill, decode)
    body = json.dumps({"prompt": [1], "max_tokens": 9000, "stream": True, "logprobs": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", cluster.ports.http))
        stuck.sendall(head + body)
        await until(lambda: cluster.router.live == 1)
        other = await cluster.generate(max_tokens=5)
        assert other.ids == expected([1, 2, 3], 5)
        await until(lambda: decode.kinds("abort"), timeout_s=15)
        if "write_timeout_s" in bound:
            await until(lambda: cluster.router.live == 0)
    await until(lambda: cluster.router.live == 0)


async def test_a_stopping_router_finishes_what_runs_and_refuses_what_comes(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster()
    await cluster.pair(decode=SLOW)
    call = cluster.stub.Generate(request(max_tokens=20))
    await anext(aiter(call))
    stopping = asyncio.create_task(cluster.server.stop(drain_timeout_s=5))
    await until(lambda: cluster.router.draining)
    assert (await cluster.http.get("/health")).status_code == 503
    assert (await cluster.complete(max_tokens=2)).status_code == 503
    ids = [token.id async for response in call for token in response.tokens]
    assert len(ids) == 19
    await stopping


async def test_a_drain_is_bounded(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    await cluster.pair(decode=SLOW)
    call = cluster.stub.Generate(request(max_tokens=900))
    await anext(aiter(call))
    await cluster.server.stop(drain_timeout_s=0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_load_is_spread_over_equal_workers(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(decode=SLOW)
    others = [
        await cluster.worker(PREFILL),
        await cluster.worker(DECODE, Script(token_delay_s=0.02)),
    ]
    await cluster.usable(others[0], others[1])
    await cluster.usable(prefill, others[1])
    await cluster.usable(others[0], decode)
    await asyncio.gather(*(cluster.generate(max_tokens=5) for _ in range(8)))
    assert len(decode.kinds("reserve")) == len(others[1].kinds("reserve")) == 4
    assert min(len(w.kinds("prefill")) for w in (prefill, others[0])) >= 2

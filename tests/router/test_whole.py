"""An output that nobody looks at before its end: the same tokens, in few messages."""

from typing import Any

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, Script, expected, until
from tests.router.test_faults import prefer

SLOW = Script(token_delay_s=0.01)


async def messages(cluster: Cluster, **asked: Any) -> list[inference_pb2.GenerateResponse]:
    return [message async for message in cluster.stub.Generate(request(**asked))]


async def test_it_comes_in_one_message_and_says_what_a_stream_says(cluster: Cluster) -> None:
    await cluster.pair(decode=SLOW)
    asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 20, "seed": 3}
    streamed = await cluster.generate(**asked)
    (only,) = await messages(cluster, whole=True, **asked)
    assert [token.id for token in only.tokens] == streamed.ids
    assert only.text == streamed.text
    assert only.finish_reason == streamed.last.finish_reason
    assert only.usage.completion_tokens == 20


async def test_one_longer_than_the_buffer_comes_in_bounded_parts(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(max_buffered_tokens=100)
    await cluster.pair(decode=Script(token_delay_s=0.0005))
    parts = await messages(cluster, whole=True, max_tokens=400)
    ids = [token.id for part in parts for token in part.tokens]
    assert ids == expected([1, 2, 3], 400)
    assert all(50 <= len(part.tokens) <= 100 for part in parts[:-1])
    assert 4 <= len(parts) <= 8


async def test_a_replay_is_part_of_the_one_message(cluster: Cluster) -> None:
    prefill, spare = await cluster.pair()
    doomed = await cluster.worker(DECODE, Script(die_before=4))
    await cluster.usable(prefill, doomed)
    await prefer(cluster, doomed.id)
    (only,) = await messages(cluster, whole=True, max_tokens=9, seed=2)
    assert [token.id for token in only.tokens] == expected([1, 2, 3], 9, seed=2)
    assert (only.report.replays, only.report.decode_worker) == (1, spare.id)
    assert prefill.kinds("prefill")[-1].output_so_far


async def test_a_stop_string_ends_it_at_once(cluster: Cluster) -> None:
    tokens = [ord(letter) - 33 for letter in "abcdefgh"]
    _, decode = await cluster.pair(
        prefill=Script(tokens=tokens), decode=Script(tokens=tokens, token_delay_s=0.01)
    )
    (only,) = await messages(cluster, whole=True, max_tokens=900, stop=["ef"])
    assert (only.text, only.stop_text) == ("abcd", "ef")
    await until(lambda: decode.kinds("abort"))


async def test_a_client_that_leaves_before_the_end_frees_both_workers(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair(decode=SLOW)
    call = cluster.stub.Generate(request(whole=True, max_tokens=900))
    await until(lambda: prefill.kinds("ticket"))
    call.cancel()
    await until(lambda: decode.kinds("abort"), timeout_s=1)
    await until(lambda: cluster.router.live == 0)


async def test_an_error_is_an_error_whatever_was_kept(cluster: Cluster) -> None:
    await cluster.worker(PREFILL)
    await cluster.usable(cluster.workers[0], await cluster.worker(DECODE, Script(die_before=4)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await messages(cluster, whole=True, max_tokens=9)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

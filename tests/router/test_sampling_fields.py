"""Sampling fields: refused by name outside their ranges, and within them told to both workers."""

from typing import Any

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster, request
from tests.router.fakes import VOCAB, expected

NAN, INF = float("nan"), float("inf")

REFUSED: list[dict[str, Any]] = [
    {"min_p": -0.01},
    {"min_p": 1.01},
    {"min_p": NAN},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"repetition_penalty": NAN},
    {"repetition_penalty": INF},
    {"presence_penalty": 2.01},
    {"presence_penalty": -2.01},
    {"presence_penalty": NAN},
    {"frequency_penalty": 2.01},
    {"frequency_penalty": -INF},
    {"frequency_penalty": NAN},
    {"logit_bias": {VOCAB: 1.0}},
    {"logit_bias": {2**64 - 1: 1.0}},
    {"logit_bias": {3: 100.1}},
    {"logit_bias": {3: -100.1}},
    {"logit_bias": {3: NAN}},
    {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    {"top_logprobs": -1},
    {"top_logprobs": 21},
    {"top_logprobs": 2**63 - 1},
    {"min_tokens": -1},
    {"min_tokens": 5, "max_tokens": 4},
    {"min_tokens": 2**62},
    {"prompt_logprobs": -1},
    {"prompt_logprobs": 21},
]


async def test_values_outside_their_ranges_are_refused_by_name(cluster: Cluster) -> None:
    workers = await cluster.pair()
    for bad in REFUSED:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.Generate(request(**bad)).read()
        error, name = caught.value, next(iter(bad))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, bad
        assert name in str(error.details())
        assert ("baton-param", name) in list(error.trailing_metadata() or ())
    assert not any(worker.kinds("reserve") or worker.kinds("prefill") for worker in workers)
    assert (await cluster.generate(max_tokens=3)).ids == expected([1, 2, 3], 3)


async def test_a_salt_that_is_too_long_is_refused(cluster: Cluster) -> None:
    await cluster.pair()
    bad = request()
    bad.cache_salt = "x" * 257
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.stub.Generate(bad).read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert ("baton-param", "cache_salt") in list(caught.value.trailing_metadata() or ())


async def test_more_prompt_logprobs_than_an_answer_carries_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.sampling.MAX_PROMPT_ALTERNATIVES", 11)
    await cluster.pair()
    assert (await cluster.generate(prompt=[1] * 11, prompt_logprobs=0, max_tokens=1)).ids
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(prompt=[1] * 6, prompt_logprobs=1, max_tokens=1)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert ("baton-param", "prompt_logprobs") in list(caught.value.trailing_metadata() or ())


ACCEPTED: list[dict[str, Any]] = [
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"repetition_penalty": 1e-3},
    {"repetition_penalty": 50.0},
    {"presence_penalty": -2.0},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"logit_bias": {0: -100.0, VOCAB - 1: 100.0}},
    {"top_logprobs": 20},
    {"min_tokens": 4},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 20},
]


async def test_values_at_their_bounds_reach_both_workers_as_they_are(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    for good in ACCEPTED:
        asked = request(max_tokens=4, **good)
        asked.cache_salt = "tenant"
        async for _ in cluster.stub.Generate(asked):
            pass
        for worker, kind in ((prefill, "prefill"), (decode, "reserve")):
            work = worker.kinds(kind)[-1]
            assert work.cache_salt == "tenant"
            for name, value in good.items():
                told = getattr(work.sampling, name)
                assert (dict(told) if name == "logit_bias" else told) == value
            assert work.sampling.HasField("prompt_logprobs") == ("prompt_logprobs" in good)
            assert work.sampling.logprobs == bool(good.get("top_logprobs"))


async def test_absent_fields_are_neutral_at_the_workers(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair()
    await cluster.generate(max_tokens=2)
    work = prefill.kinds("prefill")[-1]
    resolved = work.sampling
    assert resolved.repetition_penalty == 1.0
    neutral = ("min_p", "presence_penalty", "frequency_penalty", "top_logprobs", "min_tokens")
    assert all(getattr(resolved, name) == 0 for name in neutral)
    assert not resolved.logit_bias
    assert not resolved.HasField("prompt_logprobs")
    assert work.cache_salt == ""


async def test_alternatives_and_the_prompt_are_passed_on(cluster: Cluster) -> None:
    await cluster.pair()
    result = await cluster.generate(
        prompt=[5, 6, 7], max_tokens=4, top_logprobs=2, prompt_logprobs=1
    )
    first, *rest = result.responses
    assert [(t.index, t.id) for t in first.prompt_tokens] == [(0, 5), (1, 6), (2, 7)]
    assert not first.prompt_tokens[0].HasField("logprob")
    assert all(token.logprob == -1.0 for token in first.prompt_tokens[1:])
    assert [len(token.top) for token in first.prompt_tokens] == [0, 1, 1]
    assert not any(response.prompt_tokens for response in rest)
    tokens: list[inference_pb2.Token] = [t for r in result.responses for t in r.tokens]
    assert len(tokens) == 4
    assert all([top.id for top in t.top] == [t.id + 1, t.id + 2] for t in tokens)
    plain = await cluster.generate(prompt=[5, 6, 7], max_tokens=4)
    assert not any(t.top or t.HasField("logprob") for r in plain.responses for t in r.tokens)
    assert not plain.responses[0].prompt_tokens

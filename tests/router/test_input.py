"""Bad input is refused with a clear error, and the next request works."""

import json
from typing import Any

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import DECODE, PREFILL, expected

BAD_BODIES: list[tuple[str, int, str | None]] = [
    ("{", 400, None),
    ("[1]", 400, None),
    ('"text"', 400, None),
    ("", 400, None),
    ("\udcff", 400, None),
    ("[" * 100_000, 400, None),
    ('{"prompt": [1], "seed": ' + "9" * 5000 + "}", 400, None),
    ('{"prompt": [1], "temperature": NaN}', 400, None),
    ('{"prompt": [1], "temperature": Infinity}', 400, None),
    ('{"prompt": [1], "temperature": 1e999}', 400, "temperature"),
    ('{"prompt": [1], "temperature": -0.1}', 400, "temperature"),
    ('{"prompt": [1], "temperature": "1"}', 400, "temperature"),
    ('{"prompt": [1], "temperature": true}', 400, "temperature"),
    ('{"prompt": [1], "top_p": 0}', 400, "top_p"),
    ('{"prompt": [1], "top_p": 1.5}', 400, "top_p"),
    ('{"prompt": [1], "top_k": -1}', 400, "top_k"),
    ('{"prompt": [1], "seed": -1}', 400, "seed"),
    ('{"prompt": [1], "seed": 18446744073709551616}', 400, "seed"),
    ('{"prompt": [1], "seed": 1.0}', 400, "seed"),
    ('{"prompt": [1], "max_tokens": 0}', 400, "max_tokens"),
    ('{"prompt": [1], "max_tokens": -5}', 400, "max_tokens"),
    ('{"prompt": [1], "max_tokens": 1.5}', 400, "max_tokens"),
    ('{"prompt": [1], "max_tokens": "7"}', 400, "max_tokens"),
    ('{"prompt": [1], "max_tokens": 1024}', 400, "max_tokens"),
    ('{"max_tokens": 3}', 400, "prompt"),
    ('{"prompt": null}', 400, "prompt"),
    ('{"prompt": ""}', 400, "prompt"),
    ('{"prompt": []}', 400, "prompt"),
    ('{"prompt": [[]]}', 400, "prompt"),
    ('{"prompt": {"a": 1}}', 400, "prompt"),
    ('{"prompt": [true]}', 400, "prompt"),
    ('{"prompt": [1.5]}', 400, "prompt"),
    ('{"prompt": [1.0]}', 400, "prompt"),
    ('{"prompt": [1, "1"]}', 400, "prompt"),
    ('{"prompt": ["1", ""]}', 400, "prompt"),
    ('{"prompt": [[1], "1"]}', 400, "prompt"),
    ('{"prompt": [[1], [true]]}', 400, "prompt"),
    ('{"prompt": [[1], [[2]]]}', 400, "prompt"),
    ('{"prompt": [-1]}', 400, "prompt"),
    ('{"prompt": [256]}', 400, "prompt"),
    ('{"prompt": [99999999999999999999999]}', 400, "prompt"),
    ('{"prompt": "\\ud800"}', 400, "prompt"),
    ('{"prompt": [1], "model": "other"}', 404, "model"),
    ('{"prompt": [1], "model": 3}', 400, "model"),
    ('{"prompt": [1], "stop_token_ids": [300]}', 400, "stop_token_ids"),
    ('{"prompt": [1], "stop_token_ids": [true]}', 400, "stop_token_ids.0"),
    ('{"prompt": [1], "n": 0}', 400, "n"),
    ('{"prompt": [1], "n": 129}', 400, "n"),
    ('{"prompt": ["a", "b"], "n": 65}', 400, "n"),
    ('{"prompt": [1], "n": true}', 400, "n"),
    ('{"prompt": [1], "echo": 1}', 400, "echo"),
    ('{"prompt": [1], "best_of": 3}', 400, "best_of"),
    ('{"prompt": [1], "n": 2, "best_of": 1}', 400, "best_of"),
    ('{"prompt": [1], "stop": ""}', 400, "stop"),
    ('{"prompt": [1], "stop": [""]}', 400, "stop"),
    ('{"prompt": [1], "stop": [1]}', 400, "stop"),
    ('{"prompt": [1], "stop": ["a", "b", "c", "d", "e"]}', 400, "stop"),
    ('{"prompt": [1], "stop": "' + "x" * 1001 + '"}', 400, "stop"),
    ('{"prompt": [1], "suffix": "x"}', 400, "suffix"),
    ('{"prompt": [1], "logit_bias": {"1": "2"}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": {"1": true}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": {"1": 101}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": {"-1": 1}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": {"256": 1}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": {"\u00b2": 1}}', 400, "logit_bias"),
    ('{"prompt": [1], "logit_bias": [1]}', 400, "logit_bias"),
    ('{"prompt": [1], "presence_penalty": 2.5}', 400, "presence_penalty"),
    ('{"prompt": [1], "frequency_penalty": -2.5}', 400, "frequency_penalty"),
    ('{"prompt": [1], "repetition_penalty": 0}', 400, "repetition_penalty"),
    ('{"prompt": [1], "min_p": 1.5}', 400, "min_p"),
    ('{"prompt": [1], "min_tokens": -1}', 400, "min_tokens"),
    ('{"prompt": [1], "max_tokens": 3, "min_tokens": 4}', 400, "min_tokens"),
    ('{"prompt": [1], "logprobs": 21}', 400, "logprobs"),
    ('{"prompt": [1], "logprobs": -1}', 400, "logprobs"),
    ('{"prompt": [1], "logprobs": true}', 400, "logprobs"),
    ('{"prompt": [1], "cache_salt": 1}', 400, "cache_salt"),
    ('{"prompt": [1], "skip_special_tokens": "no"}', 400, "skip_special_tokens"),
    ('{"prompt": [1], "stream": "yes"}', 400, "stream"),
    ('{"prompt": [1], "stream_options": {"include_usage": true}}', 400, "stream_options"),
    (
        '{"prompt": [1], "stream": true, "stream_options": {"include_obfuscation": true}}',
        400,
        "stream_options.include_obfuscation",
    ),
    ('{"prompt": [1], "max_token": 5}', 400, "max_token"),
]


async def test_bad_bodies_are_refused_by_name_and_the_next_request_works(cluster: Cluster) -> None:
    await cluster.pair()
    for body, status, param in BAD_BODIES:
        answer = await cluster.http.post(
            "/v1/completions", content=body.encode("utf-8", "surrogateescape")
        )
        assert answer.status_code == status, (body[:80], answer.text)
        error = answer.json()["error"]
        assert error["param"] == param, body[:80]
        assert error["type"] == "invalid_request_error"
        assert param is None or param in error["message"], error
        assert f"{param} {param}" not in error["message"], error
        assert error["code"]
    good = await cluster.complete(max_tokens=3, seed=0, return_token_ids=True)
    assert good.json()["choices"][0]["token_ids"] == expected([1, 2, 3], 3)


async def test_fields_at_their_neutral_values_are_accepted(cluster: Cluster) -> None:
    await cluster.pair()
    answer = await cluster.complete(
        max_tokens=2,
        n=1,
        best_of=1,
        echo=False,
        stop=None,
        suffix=None,
        logit_bias={},
        frequency_penalty=0,
        presence_penalty=0.0,
        user="me",
        stream=False,
        temperature=1,
    )
    assert answer.status_code == 200, answer.text


async def test_an_unknown_field_is_refused_in_openais_words(cluster: Cluster) -> None:
    error = (await cluster.complete(nucleus=1)).json()["error"]
    assert error["message"] == "Unrecognized request argument supplied: nucleus"


BAD_REQUESTS: list[tuple[inference_pb2.GenerateRequest, grpc.StatusCode, str]] = [
    (inference_pb2.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (request(prompt=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    (request(prompt=[]), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    (request(prompt=[256]), grpc.StatusCode.INVALID_ARGUMENT, "token id 256"),
    (request(prompt=[2**40]), grpc.StatusCode.INVALID_ARGUMENT, "0 to 255"),
    (request(prompt=[1] * 1024), grpc.StatusCode.INVALID_ARGUMENT, "1024 tokens"),
    (request(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    (request(max_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    (request(max_tokens=1022), grpc.StatusCode.INVALID_ARGUMENT, "1021"),
    (request(temperature=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (request(temperature=float("inf")), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (request(temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    (request(top_p=float("nan")), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
    (request(top_k=-2), grpc.StatusCode.INVALID_ARGUMENT, "top_k"),
    (request(stop_token_ids=[999]), grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
    (request(stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    (request(stop=["x"] * 17), grpc.StatusCode.INVALID_ARGUMENT, "16"),
    (request(stop=["x" * 1001]), grpc.StatusCode.INVALID_ARGUMENT, "1000"),
    (request(model="other"), grpc.StatusCode.NOT_FOUND, "'other'"),
    (request(request_id="x" * 300), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
]


async def test_bad_grpc_requests_get_a_status_and_the_next_one_works(cluster: Cluster) -> None:
    await cluster.pair()
    for bad, code, hint in BAD_REQUESTS:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.Generate(bad).read()
        assert caught.value.code() == code, bad
        assert hint in str(caught.value.details())
    assert (await cluster.generate(max_tokens=3)).ids == expected([1, 2, 3], 3)


async def test_what_an_empty_worker_could_never_hold_is_refused_with_the_numbers(
    cluster: Cluster,
) -> None:
    prefill = await cluster.worker(PREFILL, max_total_tokens=64)
    await cluster.usable(prefill, await cluster.worker(DECODE, max_total_tokens=100))
    for prompt, length, numbers in (([1] * 64, 1, ("64",)), ([1] * 50, 51, ("100", "51", "50"))):
        answer = await cluster.complete(prompt=prompt, max_tokens=length)
        assert answer.status_code == 400
        assert all(number in answer.json()["error"]["message"] for number in numbers)
    assert (await cluster.generate(prompt=[1] * 63)).last.usage.completion_tokens == 100 - 63


async def test_a_body_over_the_limit_is_413_whether_it_says_so_or_not(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster(max_body_bytes=1000)
    await cluster.pair()
    declared = await cluster.complete(prompt="x" * 2000)
    assert declared.status_code == 413

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 100

    undeclared = await cluster.http.post("/v1/completions", content=pieces())
    assert undeclared.status_code == 413
    assert undeclared.json()["error"]["type"] == "invalid_request_error"
    assert (await cluster.complete(max_tokens=2)).status_code == 200


async def test_a_body_that_does_not_arrive_is_408(make_cluster: MakeCluster) -> None:
    import asyncio

    cluster = await make_cluster(body_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.ports.http)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_message_over_the_limit_is_refused(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(max_message_bytes=10_000)
    await cluster.pair()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(prompt="x" * 20_000)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await cluster.generate(max_tokens=3)).ids == expected([1, 2, 3], 3)


async def test_unknown_paths_and_methods_get_error_objects(cluster: Cluster) -> None:
    missing = await cluster.http.get("/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"
    wrong = await cluster.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert json.loads(wrong.text)["error"]["message"]


async def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(
    cluster: Cluster, tmp_path: Any
) -> None:
    prefill = await cluster.worker(PREFILL, path=str(tmp_path))
    await cluster.usable(prefill, await cluster.worker(DECODE, path=str(tmp_path)))
    result = await cluster.generate(max_tokens=4)
    assert (result.ids, result.text) == (expected([1, 2, 3], 4), "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(prompt="text")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "tokenizer" in str(caught.value.details())
    stopped = await cluster.complete(stop="x")
    assert (stopped.status_code, stopped.json()["error"]["param"]) == (400, "stop")


async def test_no_workers_is_503_with_a_hint(cluster: Cluster) -> None:
    answer = await cluster.complete(max_tokens=2)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"

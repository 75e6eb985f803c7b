"""The happy path through both doors."""

import json
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.baton.v1 import inference_pb2
from tests.router.conftest import Cluster
from tests.router.fakes import DECODE, EOS, PREFILL, Script, expected, until


async def test_tokens_come_from_both_workers_in_order(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    result = await cluster.generate(max_tokens=8)
    assert result.ids == expected([1, 2, 3], 8)
    assert result.indices == list(range(8))
    last = result.last
    assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 8)
    assert last.usage.cached_tokens == 2
    assert (last.report.transport, last.report.kv_bytes) == ("grpc", 1000)
    assert (last.report.prefill_worker, last.report.decode_worker) == (prefill.id, decode.id)
    assert last.report.replays == 0


async def test_both_doors_give_the_same_for_the_same_request(cluster: Cluster) -> None:
    await cluster.pair()
    over_grpc = await cluster.generate(prompt="hello", max_tokens=12, seed=3)
    answer = await cluster.complete(
        prompt="hello", max_tokens=12, seed=3, return_token_ids=True, model="tiny"
    )
    body = answer.json()
    assert answer.status_code == 200
    assert body["choices"][0]["text"] == over_grpc.text
    assert body["choices"][0]["token_ids"] == over_grpc.ids
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 5 + 12
    assert body["baton"]["seed"] == 3
    assert body["baton"]["transport"] == "grpc"
    assert set(body["baton"]["phases_ms"]) >= {"ttft", "admission", "handover", "network"}


async def stream(cluster: Cluster, **body: Any) -> list[Any]:
    events = []
    request = {"prompt": [1, 2, 3], "stream": True, **body}
    async with cluster.http.stream("POST", "/v1/completions", json=request) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line:
                assert line.startswith("data: ")
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events


async def test_a_stream_ends_with_baton_and_done(cluster: Cluster) -> None:
    await cluster.pair()
    *chunks, done = await stream(cluster, max_tokens=6, seed=0, return_token_ids=True)
    assert done == "[DONE]"
    ids = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
    assert ids == expected([1, 2, 3], 6)
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["baton"]["kv_bytes"] == 1000
    assert not any("baton" in chunk for chunk in chunks[:-1])


async def test_include_usage_adds_a_last_chunk(cluster: Cluster) -> None:
    await cluster.pair()
    *chunks, _ = await stream(cluster, max_tokens=3, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-1]["baton"]["transport"] == "grpc"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_logprobs_come_in_the_legacy_format(cluster: Cluster) -> None:
    await cluster.pair()
    body = (await cluster.complete(max_tokens=3, seed=0, logprobs=0)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 3


async def test_one_token_needs_no_decode_worker(cluster: Cluster) -> None:
    prefill = await cluster.worker(PREFILL)
    await until(lambda: cluster.router.fleet.pairs(total_tokens=1, prompt_tokens=1, one_token=True))
    result = await cluster.generate(max_tokens=1)
    assert result.ids == expected([1, 2, 3], 1)
    report = result.last.report
    assert (report.transport, report.kv_bytes, report.decode_worker) == ("none", 0, "")
    assert prefill.kinds("prefill")[0].decode_instance == ""


async def test_a_first_token_that_stops_voids_decodes_promise(cluster: Cluster) -> None:
    _, decode = await cluster.pair(prefill=Script(stop_at=0))
    result = await cluster.generate(max_tokens=9)
    assert result.ids == [EOS]
    assert result.text == ""
    assert result.last.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert result.last.stop_token_id == EOS
    await until(lambda: decode.kinds("abort"))


async def test_decodes_second_token_may_come_before_prefills_first(cluster: Cluster) -> None:
    await cluster.pair(prefill=Script(first_token_delay_s=0.1))
    result = await cluster.generate(max_tokens=5)
    assert result.ids == expected([1, 2, 3], 5)
    assert result.indices == list(range(5))
    phases = result.last.report.phases
    assert_phases_sum(phases)
    # Nobody waited for the second token: decode's step lies within the time of the first one.
    assert phases.handover_ms == phases.first_decode_step_ms == 0
    text = (await cluster.http.get("/metrics")).text
    assert "baton_handover_seconds_count 1.0" in text
    assert 'baton_phase_seconds_count{phase="first_decode_step"} 1.0' in text


def assert_phases_sum(phases: inference_pb2.Phases) -> None:
    ttft = ("admission_ms", "reserve_ms", "queue_ms", "prefill_ms", "network_ms")
    handover = (
        "transfer_tail_ms",
        "verify_ms",
        "join_ms",
        "first_decode_step_ms",
        "handover_network_ms",
    )
    assert all(getattr(phases, name) >= 0 for name in (*ttft, *handover))
    assert sum(getattr(phases, name) for name in ttft) == pytest.approx(phases.ttft_ms)
    assert sum(getattr(phases, name) for name in handover) == pytest.approx(phases.handover_ms)
    assert phases.ttft_ms > 0


async def test_every_millisecond_has_a_name(cluster: Cluster) -> None:
    timing = {"queue_ms": 5.5, "prefill_ms": 20.0}
    await cluster.pair(
        prefill=Script(token_delay_s=0.03, timing=timing), decode=Script(token_delay_s=0.005)
    )
    phases = (await cluster.generate(max_tokens=4)).last.report.phases
    assert_phases_sum(phases)
    assert phases.prefill_ms == 20.0
    assert phases.reserve_ms == 0.5
    assert phases.queue_ms == 5.5
    assert phases.first_decode_step_ms == 0.04
    assert phases.handover_ms >= 4


async def test_defaults_are_resolved_by_the_router(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    await cluster.complete()
    sampling = prefill.kinds("prefill")[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens == 16
    assert sampling == decode.kinds("reserve")[-1].sampling
    unlimited = inference_pb2.GenerateRequest(text="hi")
    call = cluster.stub.Generate(unlimited)
    await call.read()
    call.cancel()
    sampling = prefill.kinds("prefill")[-1].sampling
    assert sampling.max_tokens == 1024 - 2
    assert sampling.seed != 0


async def test_a_drawn_seed_repeats_the_answer(cluster: Cluster) -> None:
    await cluster.pair()
    first = (await cluster.complete(max_tokens=9, return_token_ids=True)).json()
    again = await cluster.complete(max_tokens=9, return_token_ids=True, seed=first["baton"]["seed"])
    assert again.json()["choices"] == first["choices"]


async def test_models_health_metrics_and_workers_are_served(cluster: Cluster) -> None:
    assert (await cluster.http.get("/v1/models")).json()["data"] == []
    health = await cluster.http.get("/health")
    assert health.status_code == 503
    assert "no prefill worker" in health.json()["reason"]
    prefill, decode = await cluster.pair()
    assert (await cluster.http.get("/health")).status_code == 200
    card = (await cluster.http.get("/v1/models")).json()["data"][0]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert (await cluster.http.get("/v1/models/tiny")).json()["id"] == "tiny"
    assert (await cluster.http.get("/v1/models/other")).status_code == 404
    await cluster.complete(max_tokens=3)
    text = (await cluster.http.get("/metrics")).text
    assert 'baton_requests_total{outcome="length"} 1.0' in text
    assert 'baton_kv_bytes_total{transport="grpc"} 1000.0' in text
    assert 'baton_workers{role="decode",state="ready"} 1.0' in text
    decode.status_running = 7
    workers = {w["id"]: w for w in (await cluster.http.get("/workers")).json()}
    assert workers[decode.id]["running"] == 7
    assert workers[prefill.id] == {
        "id": prefill.id,
        "role": "prefill",
        "address": prefill.registration.address,
        "pid": 4242,
        "engine_pids": [4243],
        "state": "ready",
        "reason": "",
        "transports": ["grpc"],
        "pages": {"free": 90, "cached": 4, "held": 1, "in_use": 5, "total": 100},
        "running": 0,
        "waiting": 0,
    }


async def test_readiness_follows_the_workers_and_liveness_does_not(cluster: Cluster) -> None:
    checks = health_pb2_grpc.HealthStub(cluster.channel)

    async def status(name: str) -> int:
        return (await checks.Check(health_pb2.HealthCheckRequest(service=name))).status

    serving = health_pb2.HealthCheckResponse.SERVING
    assert await status("") == serving
    assert await status("baton.v1.Inference") == health_pb2.HealthCheckResponse.NOT_SERVING
    await cluster.pair()
    watch = checks.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference"))
    async for answer in watch:
        if answer.status == serving:
            break
    watch.cancel()


async def test_grpc_tells_models_and_workers(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair()
    models = (await cluster.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (models[0].id, models[0].context_length, models[0].vocab_size) == ("tiny", 1024, 256)
    info = await cluster.stub.GetServerInfo(inference_pb2.GetServerInfoRequest())
    assert info.workers[0].id == prefill.id
    assert info.workers[0].state == inference_pb2.WORKER_STATE_READY
    assert info.workers[0].pages.total == 100


async def test_concurrent_requests_give_what_each_gives_alone(cluster: Cluster) -> None:
    import asyncio

    await cluster.pair()
    await cluster.worker(DECODE)
    prompts = [[i, 7, i * 2 % 250] for i in range(40)]
    results = await asyncio.gather(*(cluster.generate(prompt=p, max_tokens=10) for p in prompts))
    assert [r.ids for r in results] == [expected(p, 10) for p in prompts]


async def test_the_served_document_describes_the_body(cluster: Cluster) -> None:
    document = (await cluster.http.get("/openapi.json")).json()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("CompletionRequest")
    schemas = document["components"]["schemas"]
    assert {"CompletionRequest", "StreamOptions", "Error"} <= schemas.keys()

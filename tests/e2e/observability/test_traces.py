"""A request's trace: one span, its phases as siblings beneath it, filling it from end to end."""

import itertools
import secrets
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.cluster import Cluster
from tests.e2e.observability.conftest import Collector, end_of, log_lines

FIRST_TOKEN = ["admission", "reserve", "queue", "prefill", "network"]
HANDOVER = ["transfer_tail", "verify", "join", "first_decode_step", "handover_network"]


def new_trace() -> tuple[str, str, str]:
    """(trace id, span id, traceparent) of a client that samples."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, f"00-{trace}-{span}-01"


def attributes(span: trace_pb2.Span) -> dict[str, Any]:
    values = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        if kind == "array_value":
            value = [item.string_value for item in value.values]
        values[pair.key] = value
    return values


def took_ns(span: trace_pb2.Span) -> int:
    return span.end_time_unix_nano - span.start_time_unix_nano


def handed_over(cluster: Cluster) -> tuple[str, str, dict[str, float]]:
    """A request whose handover took time: (trace id, its client's span id, the phases told to it).

    Where the router reads the first token only together with decode's, which worked meanwhile, no
    time has passed for the client between the two, and no phase of the handover has a length.
    """
    body = {"prompt": list(range(5, 60)), "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    for _ in range(20):
        trace, parent, header = new_trace()
        answer = httpx.post(
            f"{cluster.http}/v1/completions",
            json=body,
            headers={"traceparent": header},
            timeout=60.0,
        )
        assert answer.status_code == 200, answer.text
        told: dict[str, float] = answer.json()["baton"]["phases_ms"]
        if told["handover"] > 0:
            return trace, parent, told
    raise AssertionError("of 20 requests none was handed over in a time that can be measured")


def test_phases_are_siblings_that_fill_the_requests_span(
    cluster: Cluster, collector: Collector
) -> None:
    trace, parent, told = handed_over(cluster)
    request, phases = collector.request_of(trace)
    assert request.parent_span_id.hex() == parent
    assert {span.parent_span_id for span in phases} == {request.span_id}
    names = [span.name for span in phases]
    assert len(names) == len(set(names))
    took_time = {name for name in (*FIRST_TOKEN, *HANDOVER) if told[name] > 0}
    assert {"admission", "prefill", "first_decode_step"} <= took_time
    assert set(names) == {*took_time, "decode"}
    assert sum(map(took_ns, phases)) == pytest.approx(took_ns(request), abs=1_000_000)
    for before, after in itertools.pairwise(phases):
        assert before.end_time_unix_nano == pytest.approx(after.start_time_unix_nano, abs=2_000)
    for span in phases:
        if span.name != "decode":
            assert took_ns(span) / 1e6 == pytest.approx(told[span.name], abs=1.0)


def test_a_span_names_model_usage_and_workers_by_the_conventions(
    cluster: Cluster, collector: Collector
) -> None:
    trace, _, header = new_trace()
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0.5, "ignore_eos": True}
    answer = httpx.post(
        f"{cluster.http}/v1/completions", json=body, headers={"traceparent": header}, timeout=60.0
    ).json()
    request, _ = collector.request_of(trace)
    assert request.name == f"text_completion {answer['model']}"
    known = attributes(request)
    assert known["gen_ai.operation.name"] == "text_completion"
    assert known["gen_ai.request.model"] == known["gen_ai.response.model"] == answer["model"]
    assert known["gen_ai.request.temperature"] == 0.5
    assert known["gen_ai.request.max_tokens"] == 3
    assert known["gen_ai.usage.input_tokens"] == 3
    assert known["gen_ai.usage.output_tokens"] == 3
    assert known["gen_ai.response.finish_reasons"] == ["length"]
    assert known["baton.prefill_worker"] == answer["baton"]["prefill_worker"]
    assert known["baton.kv_bytes"] == answer["baton"]["kv_bytes"]


def test_the_grpc_door_takes_trace_and_name_from_metadata_and_passes_them_on(
    cluster: Cluster, collector: Collector
) -> None:
    import grpc

    trace, parent, header = new_trace()
    name = f"grpc-{trace[:8]}"
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream = stub.Generate(
            inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
                sampling=inference_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
            ),
            metadata=(("traceparent", header), ("x-request-id", name)),
            timeout=60.0,
        )
        assert {response.request_id for response in stream} == {name}
    request, _ = collector.request_of(trace)
    assert request.parent_span_id.hex() == parent
    end_of(cluster, name)
    cluster.wait_until_balanced()
    told = [r for r in log_lines(cluster, name) if r.get("process") == "front"]
    assert told
    assert {r["trace_id"] for r in told} == {trace}


def test_a_client_that_does_not_sample_gets_no_spans(
    cluster: Cluster, collector: Collector
) -> None:
    trace, _, header = new_trace()
    sampled, _, follows = new_trace()
    body = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    for one in (header[:-2] + "00", follows):
        httpx.post(
            f"{cluster.http}/v1/completions", json=body, headers={"traceparent": one}, timeout=60.0
        ).raise_for_status()
    collector.request_of(sampled)
    assert not collector.of(trace)


def test_nonsense_in_traceparent_is_no_error(cluster: Cluster) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    for header in ("", "00", "garbage" * 1000, f"00-{'0' * 32}-{'1' * 16}-01", "ff-" + "1" * 52):
        answer = httpx.post(
            f"{cluster.http}/v1/completions", json=body, headers={"traceparent": header}, timeout=60
        )
        assert answer.status_code == 200

"""A client's name of its request leads through every process's log."""

import json
import time

import httpx

from tests.e2e.cluster import Cluster
from tests.e2e.observability.conftest import end_of, log_lines
from tests.e2e.worker_status import wait_for

BODY = {"prompt": list(range(5, 45)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def post(cluster: Cluster, request_id: str, **body: object) -> httpx.Response:
    return httpx.post(
        f"{cluster.http}/v1/completions",
        json={**BODY, **body},
        headers={"X-Request-Id": request_id},
        timeout=60.0,
    )


def test_an_id_is_honoured_returned_and_found_in_every_process(cluster: Cluster) -> None:
    answer = post(cluster, "the-clients-own-id")
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "the-clients-own-id"
    assert answer.json()["id"] == "cmpl-the-clients-own-id"
    cluster.wait_until_balanced()
    wanted = {("router", None), ("prefill", "front"), ("prefill", "engine"),
              ("decode", "front"), ("decode", "engine")}  # fmt: skip

    def everywhere() -> bool:
        lines = log_lines(cluster, "the-clients-own-id")
        return {(line["role"], line.get("process")) for line in lines} >= wanted

    wait_for(everywhere, "the id in every process's log")
    workers = [r for r in log_lines(cluster, "the-clients-own-id") if r["role"] != "router"]
    assert all(line["request_id"].endswith("#0") for line in workers)
    assert {line["worker"] for line in workers} == {
        answer.json()["baton"]["prefill_worker"],
        answer.json()["baton"]["decode_worker"],
    }


def test_the_access_line_says_how_it_went_and_where_the_time_went(cluster: Cluster) -> None:
    told = post(cluster, "access-line").json()
    line = end_of(cluster, "access-line")
    assert line["outcome"] == "length"
    assert (line["prompt_tokens"], line["output_tokens"]) == (40, 4)
    assert line["decode_worker"] == told["baton"]["decode_worker"]
    assert line["kv_bytes"] == told["baton"]["kv_bytes"]
    for name, value in told["baton"]["phases_ms"].items():
        assert abs(line["phases_ms"][name] - value) < 0.01
    assert line["duration_ms"] >= line["phases_ms"]["ttft"] + line["phases_ms"]["handover"] - 0.01


def test_errors_carry_the_id_too(cluster: Cluster) -> None:
    answer = post(cluster, "goes-wrong", prompt=[], max_tokens=4)
    assert answer.status_code == 400
    assert answer.headers["x-request-id"] == "goes-wrong"


def test_two_requests_of_one_name_run_side_by_side(cluster: Cluster) -> None:
    with httpx.stream(
        "POST",
        f"{cluster.http}/v1/completions",
        json={**BODY, "max_tokens": 1000, "stream": True},
        headers={"X-Request-Id": "twice"},
        timeout=60.0,
    ) as first:
        lines = first.iter_lines()
        next(lines)
        second = post(cluster, "twice")
        assert second.status_code == 200
        assert first.headers["x-request-id"] == "twice"
        assert second.headers["x-request-id"].startswith("twice.")
    cluster.wait_until_balanced()


def test_a_name_that_is_none_is_replaced(cluster: Cluster) -> None:
    for name in ("with blank", "x" * 500, ""):
        answer = post(cluster, name)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] not in ("", name)


def test_every_line_of_ours_is_one_json_object_with_level_and_time(cluster: Cluster) -> None:
    post(cluster, "well-formed")
    end_of(cluster, "well-formed")
    # A line may be on its way when the file is read: all but the last are whole.
    lines = [line for line in cluster.log.read_text().splitlines()[:-1] if line.startswith("{")]
    assert lines
    for line in map(json.loads, lines):
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
        assert time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S")
        assert line["role"] in ("router", "prefill", "decode", "unified")

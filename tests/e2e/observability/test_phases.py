"""Every millisecond has a name: phases are siblings, and sum to what the client measures."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from baton import Client
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster
from tests.e2e.deaths import ready, run
from tests.e2e.observability.conftest import PAGE, end_of
from tests.e2e.worker_status import wait_for

FIRST_TOKEN = ("admission", "reserve", "queue", "prefill", "network")
HANDOVER = ("transfer_tail", "verify", "join", "first_decode_step", "handover_network")
SAMPLING = {"temperature": 0, "ignore_eos": True}
ROUNDS = 8
number = itertools.count()


@dataclass
class Measured:
    """One request, as its client saw it and as its answer told it. Milliseconds."""

    phases: dict[str, float]
    first_ms: float | None
    """Until the client had a first token; None where all came at once."""
    hops_ms: float = 0.0
    """There and back by the same door at the same time, for an answer that costs nothing."""


def assert_siblings(phases: dict[str, float], *, one_token: bool = False) -> None:
    """Within 1 ms, inside one process's clock."""
    assert all(value >= 0 for value in phases.values()), phases
    assert abs(sum(phases[p] for p in FIRST_TOKEN) - phases["ttft"]) < 1.0, phases
    assert abs(sum(phases[p] for p in HANDOVER) - phases["handover"]) < 1.0, phases
    assert phases["ttft"] > 0
    assert phases["prefill"] > 0
    # It may be 0 without one_token, too: decode's second token can be there before prefill's first.
    assert phases["handover"] == 0 or not one_token


def fresh(length: int = 60) -> list[int]:
    return random_prompt(length, seed=1000 + next(number))


def over_grpc(cluster: Cluster, prompt: list[int], max_tokens: int) -> Measured:
    with Client(cluster.grpc) as client:
        client.models()  # the connection is there
        asked = time.monotonic()
        client.models()
        began = time.monotonic()
        first, report = None, None
        for chunk in client.generate(prompt, max_tokens=max_tokens, **SAMPLING):
            first = first or time.monotonic()
            report = chunk.report or report
    assert first is not None
    assert report is not None
    return Measured(report.phases_ms, 1e3 * (first - began), 1e3 * (began - asked))


def over_http(cluster: Cluster, prompt: list[int], max_tokens: int) -> Measured:
    import json

    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, **SAMPLING}
    with httpx.Client(base_url=cluster.http, timeout=60.0) as client:
        client.get("/health")
        asked = time.monotonic()
        client.get("/health")
        began = time.monotonic()
        first, last = None, {}
        with client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                first = first or time.monotonic()
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
    assert first is not None
    phases = last["baton"]["phases_ms"]
    return Measured(phases, 1e3 * (first - began), 1e3 * (began - asked))


def whole_over_http(cluster: Cluster, prompt: list[int], max_tokens: int) -> Measured:
    answer = cluster.complete(prompt=prompt, max_tokens=max_tokens, **SAMPLING)
    return Measured(answer.json()["baton"]["phases_ms"], None)


Ask = Callable[[Cluster, list[int], int], Measured]


def test_they_sum_at_both_doors_and_the_client_measures_no_more(cluster: Cluster) -> None:
    doors: list[Ask] = [over_grpc, over_http, whole_over_http]
    for ask in doors:
        gaps, hops = [], []
        for _ in range(ROUNDS):
            one = ask(cluster, fresh(), 4)
            assert_siblings(one.phases)
            if one.first_ms is not None:
                gaps.append(one.first_ms - one.phases["ttft"])
                hops.append(one.hops_ms)
        # Not less than the router saw (across processes: 2 ms), and at the quietest moment hardly
        # more than the client's own hops: what nobody counted would show in every request.
        assert all(gap > -2.0 for gap in gaps), gaps
        assert not gaps or min(gaps) < 2.0 + 3 * sorted(hops)[ROUNDS // 2], (gaps, hops)
    cluster.wait_until_balanced()


def test_they_sum_for_one_token_and_for_a_prefix_hit(cluster: Cluster) -> None:
    for _ in range(ROUNDS):
        assert_siblings(over_grpc(cluster, fresh(), 1).phases, one_token=True)
    prompt = fresh(4 * PAGE + 3)
    for _ in range(4):
        with Client(cluster.grpc) as client:
            answer = client.complete(prompt, max_tokens=4, **SAMPLING)
        assert answer.report is not None
        assert_siblings(answer.report.phases_ms)
        cluster.wait_until_balanced()
    assert answer.usage is not None
    assert answer.usage.cached_tokens >= PAGE


def test_they_sum_under_load_on_pair_and_unified_alike(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client, ThreadPoolExecutor(12) as pool:

        def ask(prompt: list[int]) -> Any:
            return client.complete(prompt, max_tokens=8, **SAMPLING).report

        reports = list(pool.map(ask, [fresh(40 + 9 * i) for i in range(36)]))
    for report in reports:
        assert_siblings(report.phases_ms)
    assert {report.decode_worker.split("-")[0] for report in reports} == {"decode", "unified"}
    cluster.wait_until_balanced()


def test_they_sum_and_the_log_agrees_where_a_request_was_replayed(cluster: Cluster) -> None:
    result = run(cluster, fresh(), {"temperature": 0}, length=40, role="decode", after=10)
    assert len(result.ids) == 40
    assert result.report is not None
    assert result.report.replays >= 1
    assert_siblings(result.report.phases_ms)
    wait_for(lambda: ready(cluster, "decode"), "a decode worker again", within_s=60.0)
    name = f"after-replay-{next(number)}"
    httpx.post(
        f"{cluster.http}/v1/completions",
        json={"prompt": fresh(), "max_tokens": 4, **SAMPLING},
        headers={"X-Request-Id": name},
        timeout=60.0,
    ).raise_for_status()
    line = end_of(cluster, name)
    assert_siblings(line["phases_ms"])
    cluster.wait_until_balanced()

"""Every process of a running Baton serves Prometheus metrics, and they say what happened."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from baton import Client
from tests.e2e.cluster import Cluster
from tests.e2e.observability import scrape
from tests.e2e.observability.conftest import MAX_TOTAL_TOKENS, PAGE
from tests.e2e.observability.scrape import Scrape
from tests.e2e.worker_status import wait_for

ROOT = Path(__file__).resolve().parents[3]
ROLES = {"prefill", "decode", "unified"}

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
}
"""What the endpoint picker of the Gateway API reads, and what dashboards show."""


def serve(cluster: Cluster, *, requests: int, at_once: int = 8, **body: object) -> None:
    """Completions of 40 tokens' prompts, 6 tokens each, all different."""

    def ask(number: int) -> None:
        prompt = [5 + (number * 7 + i * 3) % 200 for i in range(40)]
        sampling = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
        answer = cluster.complete(prompt=prompt, **sampling, **body)
        assert answer.status_code == 200, answer.text

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(ask, range(requests)))
    cluster.wait_until_balanced()


def test_the_router_names_every_worker_as_a_target_and_each_answers(cluster: Cluster) -> None:
    scraped = scrape.workers(cluster)
    assert set(scraped) == ROLES
    for role, one in scraped.items():
        assert one.sum("baton_worker_info", role=role) == 1
        own = [dict(labels) for name, labels in one.series if name.startswith("baton_")]
        assert {labels["role"] for labels in own} == {role}
        assert one.sum("baton_worker_figures_age_seconds") == 0


def test_requests_tokens_pages_and_bytes_are_counted_where_they_happen(cluster: Cluster) -> None:
    before, router_before = scrape.workers(cluster), scrape.router(cluster)
    serve(cluster, requests=12)
    after, router_after = scrape.workers(cluster), scrape.router(cluster)

    def grew(role: str, name: str, **labels: str) -> float:
        was = before[role].sum(name, **labels) if name in before[role].names else 0.0
        return after[role].sum(name, **labels) - was

    name = "baton_worker_requests_total"
    handed_over = grew("prefill", name, outcome="handed_over")
    alone = grew("unified", name, outcome="length") if name in after["unified"].names else 0.0
    assert handed_over + alone == 12
    assert grew("decode", name, outcome="length") == handed_over > 0
    # Prefill makes the first token of six, decode the others.
    tokens = "baton_worker_generation_tokens_total"
    assert grew("prefill", tokens) == handed_over
    assert grew("decode", tokens) == 5 * handed_over
    assert grew("decode", "baton_worker_itl_seconds_count") == 4 * handed_over
    assert grew("prefill", "baton_worker_ttft_seconds_count") == handed_over
    assert grew("decode", "baton_worker_phase_seconds_count", phase="verify") == handed_over
    assert grew("prefill", "baton_worker_phase_seconds_count", phase="prefill") == handed_over
    assert grew("prefill", "baton_worker_scheduler_pass_seconds_count") > 0

    moved = "baton_worker_kv_transfer_bytes_total"
    assert grew("prefill", moved, transport="nixl") == grew("decode", moved, transport="nixl") > 0
    counted = "baton_worker_kv_transfer_seconds_count"
    assert grew("decode", counted, transport="nixl") == handed_over

    def answered(one: Scrape) -> float:
        key = ("baton_requests_total", (("outcome", "length"),))
        return one.series.get(key, 0.0)

    assert answered(router_after) - answered(router_before) == 12
    assert router_after.sum("baton_phase_seconds_count", phase="prefill") >= 12
    assert router_after.sum("baton_e2e_seconds_count") >= 12


def test_pages_by_state_add_up_and_are_nobodys_while_idle(cluster: Cluster) -> None:
    serve(cluster, requests=2)
    for role, one in scrape.workers(cluster).items():
        total = one.sum("baton_worker_kv_pages")
        assert total == MAX_TOTAL_TOKENS / PAGE, role
        assert one.sum("baton_worker_kv_pages", state="in_use") == 0
        assert one.sum("baton_worker_kv_pages", state="held") == 0
        assert one.sum("baton_worker_kv_cache_usage_perc") == 0


def test_a_prefix_hit_counts_as_one(cluster: Cluster) -> None:
    def hits() -> float:
        scraped = scrape.workers(cluster)
        return sum(scraped[r].sum("baton_worker_prefix_cache_hits_total") for r in ROLES)

    prompt = list(range(5, 5 + 3 * PAGE))
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    cluster.complete(**body)
    cluster.wait_until_balanced()
    before = hits()
    for _ in range(3):
        # Whoever has served it before has it: after as many requests as workers, somebody did.
        cluster.complete(**body)
        cluster.wait_until_balanced()
    assert hits() - before >= PAGE


def test_what_runs_and_waits_is_seen_while_it_does(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        stream = client.generate([7, 8, 9], max_tokens=3500, temperature=0, ignore_eos=True)
        with stream:
            next(iter(stream))

            def running() -> bool:
                scraped = scrape.workers(cluster)
                return (
                    sum(
                        one.sum("baton_worker_num_requests_running")
                        for role, one in scraped.items()
                        if role != "prefill"
                    )
                    == 1
                    and scrape.router(cluster).sum("baton_num_requests_running") == 1
                )

            wait_for(running, "a running request in the metrics", within_s=10.0)
    cluster.wait_until_balanced()


def test_vllm_names_are_served_by_router_and_workers_alike(cluster: Cluster) -> None:
    serve(cluster, requests=2)
    for one in (scrape.router(cluster), *scrape.workers(cluster).values()):
        assert one.names >= VLLM
        info = next(dict(labels) for name, labels in one.series if name == "vllm:cache_config_info")
        assert info["block_size"] == str(PAGE)
        assert int(info["num_gpu_blocks"]) > 0
        assert 0 <= one.sum("vllm:kv_cache_usage_perc") <= 1
        assert one.types["vllm:num_requests_waiting"] == "gauge"


def test_a_thousand_strangers_add_no_series(cluster: Cluster) -> None:
    """Whatever clients make up — models, users, keys, paths, ids — is no label of anything."""
    serve(cluster, requests=8, user="user-0")
    cluster.complete(prompt=[5], model="unknown-model")
    httpx.get(f"{cluster.http}/nowhere", timeout=10.0)
    before = [set(scrape.router(cluster).series)]
    before += [set(one.series) for one in scrape.workers(cluster).values()]
    with httpx.Client(base_url=cluster.http, timeout=30.0) as client:
        for number in range(1000):
            headers = {"Authorization": f"Bearer key-{number}", "X-Request-Id": f"id-{number}"}
            if number % 20 == 0:
                body = {"prompt": [5, 6, 7], "max_tokens": 2, "user": f"user-{number}",
                        "temperature": 0, "ignore_eos": True}  # fmt: skip
                client.post("/v1/completions", json=body, headers=headers).raise_for_status()
            elif number % 3 == 0:
                client.get(f"/path-{number}", headers=headers)
            else:
                body = {"prompt": [5], "model": f"model-{number}", "user": f"user-{number}"}
                client.post("/v1/completions", json=body, headers=headers)
    cluster.wait_until_balanced()
    after = [set(scrape.router(cluster).series)]
    after += [set(one.series) for one in scrape.workers(cluster).values()]
    assert [now - was for now, was in zip(after, before, strict=True)] == [set()] * 4


def test_garbage_and_silence_on_the_metrics_port_harm_nobody(cluster: Cluster) -> None:
    target = httpx.get(f"{cluster.http}/metrics/targets", timeout=10.0).json()[0]["targets"][0]
    host, _, port = target.rpartition(":")
    silent = [socket.create_connection((host, int(port)), timeout=5.0) for _ in range(40)]
    try:
        with socket.create_connection((host, int(port)), timeout=5.0) as garbage:
            garbage.sendall(b"\x00\xff" * 20_000)
        started = time.monotonic()

        def answers() -> bool:
            try:
                return httpx.get(f"http://{target}/metrics", timeout=2.0).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, "an answer beside silent connections", within_s=15.0)
        assert time.monotonic() - started < 15
        assert httpx.get(f"http://{target}/other", timeout=5.0).status_code == 404
        assert httpx.post(f"http://{target}/metrics", timeout=5.0).status_code == 405
    finally:
        for one in silent:
            one.close()


def test_every_metric_that_is_written_about_is_served(cluster: Cluster) -> None:
    """Dashboard, alerts, scaling and the manual name nothing that no process serves; and the manual
    names all that is."""
    serve(cluster, requests=2)
    served = [scrape.router(cluster), *scrape.workers(cluster).values()]
    exposed = {
        family + suffix
        for one in served
        for family in one.types
        for suffix in ("", "_total", "_bucket", "_sum", "_count")
    }
    chart = ROOT / "helm" / "baton" / "templates"
    manual = (ROOT / "docs" / "observability.md").read_text()
    for text in (
        (ROOT / "deploy" / "grafana" / "baton.json").read_text(),
        (chart / "monitoring.yaml").read_text() + (chart / "autoscaling.yaml").read_text(),
        manual,
    ):
        asked = set(re.findall(r"\b(?:baton_[a-z0-9_]+|vllm:[a-z0-9_]+)\b(?!\*)", text))
        assert asked
        assert asked <= exposed, asked - exposed
    for one in served:
        for family, kind in one.types.items():
            name = f"{family}_total" if kind == "counter" else family
            assert name in manual, f"docs/observability.md does not explain {name}"

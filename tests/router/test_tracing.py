"""A collector that is away is nobody's business but its own."""

import time

import pytest

from observability.tracing import TracingUnavailableError
from router.config import RouterConfig
from router.core import Router
from router.registry import InMemoryRegistry
from tests.router.conftest import MakeCluster
from tests.router.fakes import expected

AWAY = "http://127.0.0.1:9"


async def test_requests_do_not_notice_a_collector_that_is_away(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(otlp_endpoint=AWAY)
    await cluster.pair()
    for seed in range(20):
        result = await cluster.generate(max_tokens=5, seed=seed)
        assert result.ids == expected([1, 2, 3], 5, seed=seed)
    started = time.monotonic()
    await cluster.router.close()
    assert time.monotonic() - started < 10


async def test_workers_are_told_the_span_of_a_traced_request(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(otlp_endpoint=AWAY)
    workers = await cluster.pair()
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    answer = await cluster.http.post(
        "/v1/completions",
        json={"prompt": [1, 2, 3], "max_tokens": 3},
        headers={"traceparent": parent},
    )
    assert answer.status_code == 200
    for worker in workers:
        kinds = ("prefill", "reserve")
        (told,) = [
            getattr(m, m.WhichOneof("kind")).traceparent
            for m in worker.received
            if m.WhichOneof("kind") in kinds
        ]
        # The same trace, another span: the router's own.
        assert told.split("-")[1] == "a" * 32
        assert told.split("-")[2] != "b" * 16


async def test_without_a_collector_the_clients_context_is_passed_on(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_cluster()
    worker = await cluster.unified()
    parent = f"00-{'a' * 32}-{'b' * 16}-00"
    await cluster.http.post(
        "/v1/completions",
        json={"prompt": [1, 2, 3], "max_tokens": 2},
        headers={"traceparent": parent},
    )
    (told,) = [m.generate.traceparent for m in worker.received if m.HasField("generate")]
    assert told == parent


@pytest.mark.parametrize(
    "wrong", [{"otlp_endpoint": "collector:4317"}, {"trace_sample_ratio": 1.5}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RouterConfig(**wrong)  # type: ignore[arg-type]


def test_a_router_without_opentelemetry_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingUnavailableError, match=r"baton-serve\[otel\]"):
        Router(RouterConfig(otlp_endpoint=AWAY), InMemoryRegistry())

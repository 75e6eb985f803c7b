"""The served document: what it says of answers is so, and a fuzzer finds no way around it."""

import asyncio
import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from router.http.key_gate import OPEN_PATHS
from tests.router.conftest import Cluster
from tests.router.fakes import DECODE, PREFILL, FakeWorker


async def small_pair(cluster: Cluster) -> FakeWorker:
    """The prefill worker of a pair that is soon at the end of its context."""
    prefill = await cluster.worker(PREFILL, context_length=96)
    await cluster.usable(prefill, await cluster.worker(DECODE, context_length=96))
    return prefill


async def document(cluster: Cluster) -> dict[str, Any]:
    served: dict[str, Any] = (await cluster.http.get("/openapi.json")).json()
    return served


async def test_a_refusal_is_described_wherever_a_key_is_asked_for(cluster: Cluster) -> None:
    served = await document(cluster)
    for path, operations in served["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS), path
            assert "422" not in operation["responses"], "an error that this door does not know"


async def test_a_fuzzer_finds_no_server_error_and_no_undescribed_answer(cluster: Cluster) -> None:
    await small_pair(cluster)
    served = await document(cluster)
    schema = schemathesis.openapi.from_dict(served)
    url = f"http://127.0.0.1:{cluster.ports.http}"
    statuses: dict[str, set[int]] = {}
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]

    def fuzz(path: str, method: str, mode: Any) -> None:
        strategy = schema[path][method].as_strategy(generation_mode=mode)

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def one(case: Any) -> None:
            response = case.call(base_url=url, timeout=10)
            statuses.setdefault(path, set()).add(response.status_code)
            assert response.status_code < 500, (case.body, response.text)
            case.validate_response(response, checks=checks)

        one()

    for path, operations in served["paths"].items():
        for method in operations:
            for mode in schemathesis.GenerationMode:
                if method == "get" and mode is schemathesis.GenerationMode.NEGATIVE:
                    continue  # nothing to get wrong
                await asyncio.to_thread(fuzz, path, method, mode)
    assert cluster.router.live == 0
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert 400 in statuses[path], json.dumps({k: sorted(v) for k, v in statuses.items()})
        assert 200 in statuses[path], json.dumps({k: sorted(v) for k, v in statuses.items()})

"""The served document: each field of each body is known, and a fuzzer finds no way around it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.router.conftest import Cluster
from tests.router.fakes import DECODE, PREFILL, FakeWorker

HONOURED, REFUSED, NO_EFFECT = "honoured", "refused", "no effect"

GENERATION = {
    "model": HONOURED,
    "n": HONOURED,
    "temperature": HONOURED,
    "top_p": HONOURED,
    "top_k": HONOURED,
    "min_p": HONOURED,
    "presence_penalty": HONOURED,
    "frequency_penalty": HONOURED,
    "repetition_penalty": HONOURED,
    "logit_bias": HONOURED,
    "seed": HONOURED,
    "stop": HONOURED,
    "stop_token_ids": HONOURED,
    "ignore_eos": HONOURED,
    "min_tokens": HONOURED,
    "skip_special_tokens": HONOURED,
    "response_format": HONOURED,
    "regex": HONOURED,
    "ebnf": HONOURED,
    "stream": HONOURED,
    "stream_options": HONOURED,
    "return_token_ids": HONOURED,
    "priority": HONOURED,
    "cache_salt": HONOURED,
    "user": NO_EFFECT,
}
FIELDS: dict[str, dict[str, str]] = {
    "CompletionRequest": GENERATION
    | {
        "prompt": HONOURED,
        "max_tokens": HONOURED,
        "echo": HONOURED,
        "logprobs": HONOURED,
        "best_of": REFUSED,
        "suffix": REFUSED,
    },
    "ChatRequest": GENERATION
    | {
        "messages": HONOURED,
        "tools": HONOURED,
        "tool_choice": HONOURED,
        "add_generation_prompt": HONOURED,
        "continue_final_message": HONOURED,
        "chat_template_kwargs": HONOURED,
        "max_completion_tokens": HONOURED,
        "max_tokens": HONOURED,
        "logprobs": HONOURED,
        "top_logprobs": HONOURED,
        "parallel_tool_calls": NO_EFFECT,
        "prompt_cache_key": NO_EFFECT,
        "safety_identifier": NO_EFFECT,
        "modalities": REFUSED,
        "audio": REFUSED,
        "prediction": REFUSED,
        "reasoning_effort": REFUSED,
        "verbosity": REFUSED,
        "web_search_options": REFUSED,
        "functions": REFUSED,
        "function_call": REFUSED,
        "store": REFUSED,
        "metadata": REFUSED,
        "service_tier": REFUSED,
    },
    "ResponseFormat": {"type": HONOURED, "json_schema": HONOURED},
    "JsonSchemaFormat": {
        "name": HONOURED,
        "schema": HONOURED,
        "description": NO_EFFECT,
        "strict": NO_EFFECT,
    },
    "StreamOptions": {"include_usage": HONOURED, "include_obfuscation": REFUSED},
}
"""REFUSED: every value but those that ask for nothing. NO_EFFECT: said to have none."""

ASKS_FOR_SOMETHING = {"best_of": 7, "store": True, "metadata": {"a": "b"}}
"""Values of refused fields, where "surely not" is of the wrong type."""


async def small_pair(cluster: Cluster) -> FakeWorker:
    """The prefill worker of a pair that is soon at the end of its context."""
    prefill = await cluster.worker(PREFILL, context_length=96)
    await cluster.usable(prefill, await cluster.worker(DECODE, context_length=96))
    return prefill


async def document(cluster: Cluster) -> dict[str, Any]:
    served: dict[str, Any] = (await cluster.http.get("/openapi.json")).json()
    return served


async def test_every_field_of_the_document_is_accounted_for(cluster: Cluster) -> None:
    schemas = (await document(cluster))["components"]["schemas"]
    for name, fields in FIELDS.items():
        assert schemas[name]["properties"].keys() == fields.keys(), name
        assert schemas[name]["additionalProperties"] is False, name
        for field, shown in schemas[name]["properties"].items():
            assert shown.keys() & {"type", "anyOf", "enum", "$ref", "allOf"}, (name, field)


def test_the_documentation_names_every_field() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    for name, fields in FIELDS.items():
        missing = {field for field in fields if f"`{field}`" not in text}
        assert not missing, name


@pytest.mark.parametrize(
    ("path", "name", "base"),
    [
        ("/v1/completions", "CompletionRequest", {"prompt": "x"}),
        ("/v1/chat/completions", "ChatRequest", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_a_refused_field_is_refused_by_its_name(
    cluster: Cluster, path: str, name: str, base: dict[str, Any]
) -> None:
    await small_pair(cluster)
    for field, what in FIELDS[name].items():
        if what == REFUSED:
            value = ASKS_FOR_SOMETHING.get(field, "surely not")
            answer = await cluster.http.post(path, json={**base, field: value})
            assert answer.status_code == 400, (field, answer.text)
            assert answer.json()["error"]["param"] == field
        nothing = await cluster.http.post(path, json={**base, field: base.get(field)})
        assert nothing.status_code == 200, (field, "null asks for nothing", nothing.text)


@pytest.mark.parametrize(
    ("path", "base", "tries"),
    [
        (
            "/v1/completions",
            {"prompt": [1, 2, 3]},
            {
                "temperature": 0.5,
                "top_p": 0.5,
                "top_k": 3,
                "min_p": 0.5,
                "presence_penalty": 1,
                "frequency_penalty": 1,
                "repetition_penalty": 2,
                "logit_bias": {"3": 4},
                "seed": 77,
                "stop_token_ids": [7],
                "ignore_eos": True,
                "min_tokens": 2,
                "response_format": {"type": "json_object"},
                "regex": "a",
                "ebnf": 'root ::= "a"',
                "max_tokens": 5,
                "logprobs": 3,
                "priority": 9,
                "cache_salt": "s",
            },
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}]},
            {
                "temperature": 0.5,
                "logit_bias": {"3": 4},
                "response_format": {"type": "json_object"},
                "regex": "a",
                "max_tokens": 5,
                "max_completion_tokens": 6,
                "logprobs": True,
                "cache_salt": "s",
                "messages": [{"role": "user", "content": "y"}],
                "add_generation_prompt": False,
                "continue_final_message": True,
                "chat_template_kwargs": {"mood": "!"},
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        ),
    ],
)
async def test_an_honoured_field_changes_what_the_workers_are_asked(
    cluster: Cluster, path: str, base: dict[str, Any], tries: dict[str, Any]
) -> None:
    prefill = await small_pair(cluster)

    async def asked(**body: Any) -> str:
        answer = await cluster.http.post(path, json={**base, "max_tokens": 4, "seed": 1, **body})
        assert answer.status_code == 200, answer.text
        request = prefill.kinds("prefill")[-1]
        return str([request.sampling, request.prompt_ids, request.priority, request.cache_salt])

    plain = await asked()
    for field, value in tries.items():
        body = {field: value}
        if field == "max_completion_tokens":
            body["max_tokens"] = value
        assert await asked(**body) != plain, field


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

"""Grammars at the doors: bounded, told to both workers as they were sent, or refused by name."""

import json
from typing import Any

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from router.grammar import MAX_GRAMMAR_BYTES
from tests.router.conftest import Cluster, request
from tests.router.fakes import expected

USER = {"role": "user", "content": "x"}
SCHEMA = {"type": "object", "properties": {"b": {"const": "é"}, "a": {"type": "integer"}}}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    part = {"name": "thing", "schema": schema, **more}
    return {"response_format": {"type": "json_schema", "json_schema": part}}


TOLD: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "", None),
    ({"response_format": None, "regex": None, "ebnf": None}, "", None),
    ({"response_format": {"type": "text"}}, "", None),
    ({"response_format": {"type": "text"}, "regex": "a+"}, "regex", "a+"),
    ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
    (json_schema(SCHEMA), "json_schema", SCHEMA),
    (json_schema(SCHEMA, strict=True, description="d"), "json_schema", SCHEMA),
    (json_schema(SCHEMA, strict=False), "json_schema", SCHEMA),
    (json_schema({}), "json_schema", {}),
    (json_schema(True), "json_schema", True),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "json_schema",
     {"type": "object"}),
    ({"regex": "[0-9]{3}|é"}, "regex", "[0-9]{3}|é"),
    ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_both_workers_are_told_the_grammar(cluster: Cluster, path: str) -> None:
    prefill, decode = await cluster.pair()
    base = {"prompt": "x"} if path == "/v1/completions" else {"messages": [USER]}
    for body, kind, text in TOLD:
        answer = await cluster.http.post(path, json={**base, "max_tokens": 2, **body})
        assert answer.status_code == 200, answer.text
        for worker, work in ((prefill, "prefill"), (decode, "reserve")):
            grammar = worker.kinds(work)[-1].sampling.grammar
            assert (grammar.WhichOneof("kind") or "") == kind, body
            if kind:
                said = getattr(grammar, kind)
                assert (json.loads(said) if kind == "json_schema" else said) == text
            if kind == "json_schema" and text == SCHEMA:
                assert list(json.loads(said)["properties"]) == ["b", "a"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format"),
    ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
     "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
     "response_format.json_schema.name"),
    (json_schema([1]), "response_format.json_schema.schema"),
    (json_schema(False), "response_format.json_schema.schema"),
    (json_schema({"enum": ["x" * MAX_GRAMMAR_BYTES]}), "response_format"),
    (json_schema(SCHEMA, extra=1), "response_format.json_schema.extra"),
    ({"regex": ""}, "regex"),
    ({"regex": 3}, "regex"),
    ({"regex": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)}, "regex"),
    ({"ebnf": ""}, "ebnf"),
    ({"ebnf": "a\ud800"}, "ebnf"),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
    ({"regex": "a", **json_schema({})}, "regex"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"json_schema": "{}"}, "json_schema"),
]  # fmt: skip


async def test_what_is_no_grammar_is_refused_by_name(cluster: Cluster) -> None:
    workers = await cluster.pair()
    for body, param in REFUSED:
        answer = await cluster.http.post(
            "/v1/completions", content=json.dumps({"prompt": "x", **body}).encode()
        )
        assert answer.status_code == 400, (body, answer.text)
        said = answer.json()["error"]
        assert said["param"] == param, said
    assert not any(worker.kinds("reserve") or worker.kinds("prefill") for worker in workers)
    assert (await cluster.generate(max_tokens=3)).ids == expected([1, 2, 3], 3)


GRPC_REFUSED = [
    inference_pb2.Grammar(json_schema="{"),
    inference_pb2.Grammar(json_schema="[" * 100_000),
    inference_pb2.Grammar(json_schema="3"),
    inference_pb2.Grammar(json_schema="false"),
    inference_pb2.Grammar(json_schema=""),
    inference_pb2.Grammar(regex=""),
    inference_pb2.Grammar(ebnf="x" * (MAX_GRAMMAR_BYTES + 1)),
]


async def test_grpc_clients_are_told_the_same(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    for bad in GRPC_REFUSED:
        asked = request()
        asked.sampling.grammar.CopyFrom(bad)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.Generate(asked).read()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert ("baton-param", "grammar") in list(caught.value.trailing_metadata() or ())
    for good in (
        inference_pb2.Grammar(),
        inference_pb2.Grammar(json_schema=" true"),
        inference_pb2.Grammar(regex="a"),
        inference_pb2.Grammar(ebnf="x" * MAX_GRAMMAR_BYTES),
    ):
        asked = request(max_tokens=2)
        asked.sampling.grammar.CopyFrom(good)
        async for _ in cluster.stub.Generate(asked):
            pass
        for worker, work in ((prefill, "prefill"), (decode, "reserve")):
            assert worker.kinds(work)[-1].sampling.grammar == good

"""Whatever the contract lets a client say can be said, and arrives as it was said."""

from typing import Any, get_type_hints

import pytest

from baton import InvalidRequest, RequestOptions
from baton.options import build_request
from protos.baton.v1 import inference_pb2

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "seed": 2**63,
    "max_tokens": 9,
    "stop_token_ids": [1, 2],
    "ignore_eos": True,
    "logprobs": True,
    "min_p": 0.1,
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {3: -1.5, 4: 2.0},
    "top_logprobs": 5,
    "min_tokens": 2,
    "stop": ["\n\n", "end"],
    "prompt_logprobs": 0,
    "skip_special_tokens": False,
}
REQUEST: dict[str, Any] = {"request_id": "r", "model": "m", "priority": -3, "cache_salt": "s"}


def test_every_field_of_the_contract_is_an_option() -> None:
    sampling = {field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields}
    request = {field.name for field in inference_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert sampling == set(SAMPLING) | {"grammar"}
    assert request - {"text", "token_ids", "sampling", "whole"} == set(REQUEST)
    grammars = {field.name for field in inference_pb2.Grammar.DESCRIPTOR.fields}
    assert set(get_type_hints(RequestOptions)) == set(SAMPLING) | set(REQUEST) | grammars


def test_options_arrive_as_they_were_said() -> None:
    options: Any = SAMPLING | REQUEST
    request = build_request([1], options)
    for name, value in SAMPLING.items():
        got = getattr(request.sampling, name)
        kind = type(value)
        assert (kind(got) if kind in (list, dict) else got) == value, name
    assert {name: getattr(request, name) for name in REQUEST} == REQUEST


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"json_schema": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"json_schema": {"b": 1, "a": 2}}, "json_schema", '{"b": 1, "a": 2}'),
        ({"json_schema": {}}, "json_schema", "{}"),
        ({"regex": "a|b"}, "regex", "a|b"),
        ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ],
)
def test_a_grammar_arrives_as_its_kind(options: Any, kind: str, text: str) -> None:
    grammar = build_request("text", options).sampling.grammar
    assert grammar.WhichOneof("kind") == kind
    assert getattr(grammar, kind) == text


def test_whether_it_is_wanted_whole_is_said_by_the_call_not_by_an_option() -> None:
    assert not build_request([1], {}).whole
    assert build_request([1], {}, whole=True).whole


def test_options_left_out_are_absent() -> None:
    assert not build_request("text", {}).sampling.ListFields()


@pytest.mark.parametrize(
    "bad",
    [
        {"stop": "one text"},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: "2"}},
        {"regex": "a", "ebnf": 'root ::= "a"'},
        {"json_schema": {"a": object()}},
    ],
)
def test_what_the_wire_cannot_carry_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidRequest):
        build_request([1], bad)


def test_an_option_that_does_not_exist_is_refused_by_its_name() -> None:
    misspelt: Any = {"max_token": 5}
    with pytest.raises(TypeError, match="'max_token'"):
        build_request([1], misspelt)

"""POST /v1/chat/completions, /tokenize and /detokenize."""

from typing import Any

import pytest

from tests.router.conftest import Cluster, byte_level_bpe
from tests.router.fakes import DECODE, PREFILL, Script, expected

TOKENIZER = byte_level_bpe()
PROMPT = TOKENIZER.encode("user: hi\nassistant:").ids
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": None}}}


async def prompt_of(cluster: Cluster, **body: Any) -> str:
    """The prompt that the template makes."""
    answer = await cluster.http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return str(TOKENIZER.decode(answer.json()["tokens"], skip_special_tokens=False))


async def test_a_chat_is_completed_in_the_models_own_template(cluster: Cluster) -> None:
    await cluster.pair()
    body = (await cluster.chat(max_completion_tokens=5, return_token_ids=True)).json()
    (choice,) = body["choices"]
    assert choice["token_ids"] == expected(PROMPT, 5)
    assert body["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == TOKENIZER.decode(choice["token_ids"])
    assert choice["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert body["baton"]["transport"] == "grpc"


async def test_both_doors_give_the_same_tokens(cluster: Cluster) -> None:
    await cluster.pair()
    over_grpc = await cluster.generate(prompt=PROMPT, max_tokens=9, seed=4)
    chat = (await cluster.chat(max_tokens=9, seed=4, return_token_ids=True)).json()["choices"][0]
    assert (chat["token_ids"], chat["message"]["content"]) == (over_grpc.ids, over_grpc.text)


async def test_without_a_limit_the_answer_may_fill_the_context(cluster: Cluster) -> None:
    prefill, _ = await cluster.pair(decode=Script(stop_at=3))
    assert (await cluster.chat()).json()["choices"][0]["finish_reason"] == "stop"
    assert prefill.kinds("prefill")[0].sampling.max_tokens == 1024 - len(PROMPT)


async def test_a_stream_has_the_role_first_and_ends_with_usage_and_done(cluster: Cluster) -> None:
    await cluster.pair()
    *chunks, usage, done = await cluster.events(
        "/v1/chat/completions",
        messages=[USER],
        seed=0,
        n=2,
        max_tokens=4,
        stream_options={"include_usage": True},
        logprobs=True,
        return_token_ids=True,
    )
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 8)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        first, *middle, end = [chunk["choices"][0] for chunk in own]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in (first, *middle)] == [None] * (1 + len(middle))
        assert (end["delta"], end["finish_reason"]) == ({}, "length")
        assert own[-1]["baton"]["seed"] == index
        ids = [i for c in middle for i in c["token_ids"]]
        assert ids == expected(PROMPT, 4, index)
        assert "".join(c["delta"]["content"] for c in middle) == TOKENIZER.decode(ids)
        assert sum(len(c["logprobs"]["content"]) for c in middle) == 4


async def test_log_probabilities_come_in_the_chat_format(cluster: Cluster) -> None:
    tokens = TOKENIZER.encode("the 你").ids
    prefill = await cluster.worker(PREFILL, Script(tokens=tokens))
    await cluster.usable(prefill, await cluster.worker(DECODE, Script(tokens=tokens)))
    body = (await cluster.chat(max_tokens=len(tokens), logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[:4]] == ["th", "e", " ", "bytes:\\xe4"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "the 你"
    assert [entry["logprob"] for entry in content] == [-0.5] * len(tokens)
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(tokens)
    plain = (await cluster.chat(max_tokens=2, logprobs=True)).json()["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in plain["content"]] == [[], []]


async def test_messages_reach_the_template_in_its_own_form(cluster: Cluster) -> None:
    await cluster.pair()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": "x", "refusal": None},
    ]
    assert await prompt_of(cluster, messages=messages) == (
        "system: short\nuser: a\nb\nassistant: x\nassistant:"
    )
    assert await prompt_of(cluster, messages=[USER], add_generation_prompt=False) == "user: hi\n"
    assert (
        await prompt_of(cluster, messages=[USER], chat_template_kwargs={"mood": "!"})
        == "user: hi\nassistant:!"
    )
    assert await prompt_of(cluster, messages=messages, continue_final_message=True) == (
        "system: short\nuser: a\nb\nassistant: x"
    )


async def test_tools_are_shown_as_they_were_sent_unless_none_may_be_called(
    cluster: Cluster,
) -> None:
    prefill, _ = await cluster.pair()
    shown = '[[{"type": "function", "function": {"name": "f", "parameters": {"a": null}}}]]'
    assert await prompt_of(cluster, messages=[USER], tools=[TOOL]) == (
        shown + "user: hi\nassistant:"
    )
    for choice, text in ((None, shown), ("auto", shown), ("none", "")):
        answer = await cluster.chat(
            tools=[TOOL], tool_choice=choice, max_tokens=1, parallel_tool_calls=True
        )
        assert answer.status_code == 200, answer.text
        ids = prefill.kinds("prefill")[-1].prompt_ids
        assert TOKENIZER.decode(ids) == text + "user: hi\nassistant:"


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "assistant"}]}, "messages.0"),
    ({"messages": [{**USER, "mood": 1}]}, "messages.0.mood"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}
                    ],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"prompt": "x"}, "prompt"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools.0.function.strict",
    ),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"store": True}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"functions": []}, "functions"),
    ({"n": 0}, "n"),
]


async def test_bad_chats_are_refused_by_name_and_the_next_request_works(cluster: Cluster) -> None:
    await cluster.pair()
    for body, param in BAD_CHATS:
        answer = await cluster.http.post(
            "/v1/chat/completions",
            content=json_bytes({"messages": [USER], **body}),
        )
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"] == param, answer.text
    assert (await cluster.chat(max_tokens=2)).status_code == 200


def json_bytes(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()  # lone surrogates as escapes


async def test_fields_that_ask_for_nothing_are_accepted(cluster: Cluster) -> None:
    await cluster.pair()
    answer = await cluster.chat(
        max_completion_tokens=2,
        max_tokens=2,
        store=False,
        metadata={},
        modalities=["text"],
        response_format={"type": "text"},
        service_tier="auto",
        user="me",
        safety_identifier="me",
        prompt_cache_key="k",
        tool_choice="none",
    )
    assert answer.status_code == 200, answer.text


async def test_a_model_without_a_template_refuses_chats(cluster: Cluster, tmp_path: Any) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    prefill = await cluster.worker(PREFILL, path=str(tmp_path))
    await cluster.usable(prefill, await cluster.worker(DECODE, path=str(tmp_path)))
    answer = await cluster.chat()
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]
    assert (await cluster.complete(prompt="x", max_tokens=2)).status_code == 200


async def test_tokens_and_text_go_both_ways(cluster: Cluster) -> None:
    await cluster.pair()
    body = {"prompt": "the 你<eos>", "return_token_strs": True, "model": "tiny"}
    tokens = (await cluster.http.post("/tokenize", json=body)).json()
    assert tokens["tokens"] == TOKENIZER.encode("the 你<eos>").ids
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 1024)
    assert tokens["token_strs"][0] == "th"
    back = await cluster.http.post("/detokenize", json={"tokens": tokens["tokens"][1:-1]})
    assert back.json() == {"prompt": "e 你"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens"),
        ("/v1/responses", {"input": "hi"}, 404, None),
    ],
)
async def test_bad_bodies_elsewhere_are_refused_too(
    cluster: Cluster, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    await cluster.pair()
    answer = await cluster.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text

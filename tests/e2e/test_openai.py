"""The official OpenAI client against real processes and the embedded model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton import Client, Completion
from protos.baton.v1 import inference_pb2
from tests.e2e.cluster import Cluster, running_cluster

MODEL = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
PROMPT = "def add(a, b):\n"
MESSAGES = [{"role": "user", "content": "What is a list in Python?"}]
MOST_REQUESTS = 6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--page-size", "16", "--max-queued-requests", str(MOST_REQUESTS))
    with running_cluster(MODEL, tmp_path_factory.mktemp("openai"), *flags) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as made:
        yield made
    cluster.wait_until_balanced()


@pytest.fixture(scope="module")
def model(cluster: Cluster) -> str:
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none") as made:
        (card,) = made.models.list().data
        assert made.models.retrieve(card.id) == card
    return card.id


def test_the_embedded_model_answers_in_whole_characters_and_ends_its_turn(
    client: openai.OpenAI, model: str
) -> None:
    """Characters of several tokens, and a real end of sequence, equal to transformers' own."""
    messages = [{"role": "user", "content": "Say hello in Japanese."}]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = reference.generate(**ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    asked: Any = {"model": model, "messages": messages, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "stop"
    assert any(ord(character) > 0x3000 for character in text)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
BOTH_DOORS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7},
    "penalties": {
        "temperature": 0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {100: 3.0, 200: -100.0},
    },
    "stop text": {"temperature": 0, "stop": ["return", "zzz"], "ignore_eos": True},
    "stop token": {"temperature": 0, "logit_bias": {33: 100}, "stop_token_ids": [33]},
    "a later end": {
        "temperature": 0,
        "logit_bias": {33: 100},
        "stop_token_ids": [33],
        "min_tokens": 4,
        "skip_special_tokens": False,
    },
    "log probabilities": {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    "the prompt's": {"temperature": 0, "logprobs": True, "prompt_logprobs": 0, "max_tokens": 2},
    "schema": {"seed": 1, "json_schema": SCHEMA, "max_tokens": 80},
    "expression": {"seed": 1, "regex": "(yes|no)!"},
    "grammar": {"seed": 1, "ebnf": 'root ::= [0-9] [0-9] "."'},
    "a name space": {"temperature": 0, "cache_salt": "s", "priority": 3},
}
"""Options by gRPC's names."""

APART = {"whole", "request_id", "model", "text", "token_ids", "sampling", "grammar"}
"""Fields of the contract that are no options, or that the cases hold under other names: `whole` is
HTTP's `stream: false`, `request_id` its X-Request-Id, `grammar` one of three."""


def test_the_cases_hold_every_option_that_grpc_has() -> None:
    fields = {
        field.name
        for message in (inference_pb2.GenerateRequest, inference_pb2.SamplingParams)
        for field in message.DESCRIPTOR.fields
    }
    kinds = {field.name for field in inference_pb2.Grammar.DESCRIPTOR.fields}
    cased = {name for options in BOTH_DOORS.values() for name in options}
    assert fields - APART | kinds == cased


def over_http(options: dict[str, Any]) -> dict[str, Any]:
    """The same options by HTTP's names."""
    body = {**options, "return_token_ids": True}
    alternatives = body.pop("top_logprobs", 0)
    if body.pop("logprobs", False):
        body["logprobs"] = alternatives
    if body.pop("prompt_logprobs", None) is not None:
        body["echo"] = True
    if "json_schema" in body:
        schema = {"name": "n", "schema": body.pop("json_schema")}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def from_grpc(answer: Completion) -> dict[str, Any]:
    """What both doors tell. Of a prompt that is echoed, HTTP tells the two as one."""
    stop: str | int | None = answer.stop_token_id
    judged = [*answer.prompt_tokens, *answer.tokens]
    return {
        "token_ids": answer.token_ids,
        "text": (PROMPT if answer.prompt_tokens else "") + answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_text if answer.stop_text is not None else stop,
        "logprobs": None if answer.logprobs is None else [token.logprob for token in judged],
        "usage": (answer.usage.prompt_tokens, answer.usage.completion_tokens),
    }


def from_http(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of a whole answer, or of the chunks of one."""
    choices = [choice for answer in answers for choice in answer["choices"]]
    told = [choice["logprobs"]["token_logprobs"] for choice in choices if choice["logprobs"]]
    usage = answers[-1]["usage"]
    return {
        "token_ids": [token for choice in choices for token in choice["token_ids"]],
        "text": "".join(choice["text"] for choice in choices),
        "finish_reason": choices[-1]["finish_reason"],
        "stop_reason": choices[-1]["stop_reason"],
        "logprobs": [value for values in told for value in values] if told else None,
        "usage": (usage["prompt_tokens"], usage["completion_tokens"]),
    }


@pytest.mark.parametrize("case", BOTH_DOORS)
def test_a_completion_is_the_same_whole_streamed_and_over_grpc(cluster: Cluster, case: str) -> None:
    options = {"max_tokens": 12, **BOTH_DOORS[case]}
    body = {**over_http(options), "prompt": PROMPT}
    with Client(cluster.grpc) as client:
        whole = from_grpc(client.complete(PROMPT, **options))
        chunks = list(client.generate(PROMPT, **options))
    assert [token.id for chunk in chunks for token in chunk.tokens] == whole["token_ids"]
    assert whole["token_ids"]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = cluster.complete(**body, **more).text.split("\n\n")
    events = [json.loads(event.removeprefix("data: ")) for event in streamed[:-2]]
    answers = [from_http([cluster.complete(**body).json()]), from_http(events)]
    for answer in answers:
        assert answer.pop("logprobs") == pytest.approx(whole["logprobs"], abs=1e-4)
        assert answer == {name: whole[name] for name in answer}
    cluster.wait_until_balanced()


def test_a_chat_is_the_same_whole_streamed_and_over_grpc(
    client: openai.OpenAI, model: str, cluster: Cluster
) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 24, "seed": 5}
    whole = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    text = f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    with Client(cluster.grpc) as other:
        over_grpc = other.complete(text, max_tokens=24, seed=5)
    assert over_grpc.token_ids == choice.model_extra["token_ids"]
    assert over_grpc.text == choice.message.content


def test_an_answer_is_sent_back_as_the_next_turns_history(
    client: openai.OpenAI, model: str
) -> None:
    """As the client's own object, and as a plain dictionary with all that it might hold."""
    asked: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
    said = client.chat.completions.create(**asked, messages=MESSAGES).choices[0].message
    turns = [{"role": "user", "content": "And?"}]
    histories: list[Any] = [said, said.model_dump(), {"role": said.role, "content": said.content}]
    texts = {
        client.chat.completions.create(**asked, messages=[*MESSAGES, history, *turns])
        .choices[0]
        .message.content
        for history in histories
    }
    assert len(texts) == 1


class Ball(pydantic.BaseModel):
    """What a caller wants to be told of a ball."""

    colour: Literal["red", "green"]
    size: int = pydantic.Field(ge=1, le=9)


def test_an_answer_is_parsed_into_the_callers_own_model(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "seed": 1, "max_tokens": 100}
    whole = client.chat.completions.parse(**asked, response_format=Ball).choices[0].message
    assert isinstance(whole.parsed, Ball)
    with client.chat.completions.stream(**asked, response_format=Ball) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.parsed == whole.parsed


def test_a_seed_and_a_fingerprint_repeat_the_choices(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    first = client.completions.create(**asked, n=3)
    again = client.completions.create(**asked, n=3)
    assert first.system_fingerprint == again.system_fingerprint
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    assert texts[0] == client.completions.create(**asked).choices[0].text


@pytest.mark.parametrize("stop", ["\n", ["return", "zzz"]])
def test_stop_strings_end_the_output(
    client: openai.OpenAI, model: str, stop: str | list[str]
) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    free = client.completions.create(**{**asked, "max_tokens": 60}, extra_body=extra)
    ended = client.completions.create(**asked, stop=stop, extra_body=extra)
    (choice,) = ended.choices
    first = stop if isinstance(stop, str) else stop[0]
    assert first in free.choices[0].text, "the model says it"
    assert choice.text == free.choices[0].text.split(first)[0]
    assert choice.finish_reason == "stop"
    ids = choice.model_extra["token_ids"]
    decoded = Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(ids)
    assert first in decoded
    assert decoded.split(first)[0] == choice.text
    assert ended.usage is not None
    assert ended.usage.completion_tokens == len(ids)


def test_log_probabilities_in_both_formats_agree(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "max_tokens": 6, "temperature": 0}
    legacy = client.completions.create(**asked, prompt=PROMPT, logprobs=3).choices[0].logprobs
    assert legacy is not None
    assert legacy.token_logprobs is not None
    for name, value, top in zip(
        legacy.tokens or [], legacy.token_logprobs, legacy.top_logprobs or [], strict=True
    ):
        assert len(top) == 3
        assert max(top.values()) == pytest.approx(value)
        assert top[name] == value
    chat = client.chat.completions.create(
        **asked, messages=MESSAGES, logprobs=True, top_logprobs=2
    ).choices[0]
    assert chat.logprobs is not None
    content = chat.logprobs.content or []
    said = [entry for entry in content if not entry.token.startswith("<|")]
    assert "".join(entry.token for entry in said) == chat.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)


def test_echo_tells_the_prompts_log_probabilities(
    client: openai.OpenAI, model: str, cluster: Cluster
) -> None:
    prompt = httpx.post(f"{cluster.http}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    asked = {"model": model, "temperature": 0, "logprobs": 1}
    said = client.completions.create(
        **asked, prompt=prompt, max_tokens=8, extra_body={"return_token_ids": True}
    ).choices[0]
    whole = prompt + said.model_extra["token_ids"]
    echoed = client.completions.create(**asked, prompt=whole, max_tokens=1, echo=True).choices[0]
    assert echoed.text.startswith(PROMPT + said.text)
    assert echoed.logprobs is not None
    assert said.logprobs is not None
    values = echoed.logprobs.token_logprobs or []
    assert len(values) == len(whole) + 1
    assert values[0] is None
    assert values[len(prompt) : len(whole)] == pytest.approx(said.logprobs.token_logprobs, abs=0.05)
    assert (echoed.logprobs.text_offset or [])[len(prompt)] == len(PROMPT)


def test_errors_are_openais_classes(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=model, prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=model, messages=MESSAGES, reasoning_effort="high")
    assert bad.value.param == "reasoning_effort"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=model, input="hi")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=model, prompt=PROMPT, n=MOST_REQUESTS + 1)
    assert client.completions.create(model=model, prompt=PROMPT, max_tokens=2).choices[0].text


def test_a_stream_left_early_frees_its_workers(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, n=3, extra_body={"ignore_eos": True}
    )
    with stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break


async def test_many_at_once_give_what_each_gives_alone(cluster: Cluster, model: str) -> None:
    import asyncio

    async with openai.AsyncOpenAI(
        base_url=f"{cluster.http}/v1", api_key="none", max_retries=0
    ) as client:

        async def ask(seed: int) -> str | None:
            answer = await client.chat.completions.create(
                model=model, messages=MESSAGES, max_tokens=10, seed=seed
            )
            return answer.choices[0].message.content

        together = await asyncio.gather(*(ask(seed) for seed in range(MOST_REQUESTS)))
        assert [await ask(seed) for seed in range(MOST_REQUESTS)] == list(together)
    cluster.wait_until_balanced()

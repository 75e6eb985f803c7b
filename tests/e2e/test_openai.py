"""The official OpenAI client against real processes and the embedded model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton import Client
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


def test_a_completion_is_the_same_whole_streamed_and_over_grpc(
    client: openai.OpenAI, model: str, cluster: Cluster
) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    with Client(cluster.grpc) as other:
        assert other.complete(PROMPT, max_tokens=24, temperature=0).text == whole.choices[0].text


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

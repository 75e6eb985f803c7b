"""Sampling in full through the real processes, against `transformers`' logits in float32.

What a request asks of its logits is applied here once more in numpy, token by token. The first
token is drawn by prefill and the others by decode, so each answer crosses the handover.
"""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from baton import Client, Completion, InvalidRequest
from engine.execution.noise import gumbel_noise
from tests.e2e.cluster import Cluster, running_cluster

PAGE, CHUNK, NEW = 16, 32, 24
FLAGS = ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
PROMPT = [5, 6, 7, 8, 9, 9, 9, 40, 41, 42] * 5
"""Ends within a page and within a chunk."""


class Reference:
    """Logits of `transformers`, and what a request makes of them."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        config = json.loads((directory / "config.json").read_text())
        self.vocab, self.eos = config["vocab_size"], config["eos_token_id"]

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> np.ndarray:
        """[tokens, vocab]."""
        logits: np.ndarray = self._model(torch.tensor([tokens])).logits[0].float().numpy()
        return logits

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        return torch.log_softmax(torch.from_numpy(self.logits(tokens)).double(), -1).numpy()

    def generate(self, prompt: list[int], new: int, **asked: Any) -> list[int]:
        output: list[int] = []
        stops = set(asked.get("stop_token_ids", ()))
        if not asked.get("ignore_eos"):
            stops.add(self.eos)
        while len(output) < new and not (output and output[-1] in stops):
            output.append(self._draw(prompt, output, **asked))
        return output

    def _draw(self, prompt: list[int], output: list[int], **asked: Any) -> int:
        edited = self.logits(prompt + output)[-1].copy()
        for token, bias in asked.get("logit_bias", {}).items():
            edited[token] += np.float32(bias)
        penalty = np.float32(asked.get("repetition_penalty", 1.0))
        for token in {*prompt, *output}:
            positive = edited[token] > 0
            edited[token] = edited[token] / penalty if positive else edited[token] * penalty
        for token in set(output):
            edited[token] -= np.float32(asked.get("presence_penalty", 0.0))
            edited[token] -= np.float32(asked.get("frequency_penalty", 0.0)) * output.count(token)
        if len(output) < asked.get("min_tokens", 0):
            edited[[self.eos, *asked.get("stop_token_ids", ())]] = -np.inf
        temperature = asked.get("temperature", 0.0)
        if temperature == 0:
            return int(edited.argmax())
        scaled = (edited - edited.max()) / np.float32(temperature)
        scaled[np.exp(scaled) < asked.get("min_p", 0.0)] = -np.inf
        position = torch.tensor([len(prompt) + len(output)])
        seed = torch.tensor([asked["seed"]])
        return int((scaled + gumbel_noise(seed, position, self.vocab)[0].numpy()).argmax())


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(llama, tmp_path_factory.mktemp("sampling"), *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.grpc) as connected:
        yield connected


@pytest.fixture(autouse=True)
def balanced(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.wait_until_balanced()


@pytest.fixture(scope="module")
def reference(llama: Path) -> Reference:
    return Reference(llama)


CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition, inviting": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "frequency, inviting": {"frequency_penalty": -2.0},
    "bias": {"logit_bias": {11: 100.0, 12: 99.5, 13: -100.0}, "presence_penalty": 1.0},
    "all penalties": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "logit_bias": {100: 5.0, 101: -5.0},
    },
    "min-p": {"temperature": 1.2, "min_p": 0.1, "seed": 5},
    "min-p and all penalties": {
        "temperature": 0.8,
        "min_p": 0.05,
        "seed": 6,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
    },
}


def test_every_edit_gives_the_tokens_of_the_reference_alone_and_together(
    cluster: Cluster, client: Client, reference: Reference
) -> None:
    expected = {
        name: reference.generate(PROMPT, NEW, ignore_eos=True, **asked)
        for name, asked in CASES.items()
    }
    plain = reference.generate(PROMPT, NEW, ignore_eos=True)
    assert plain not in expected.values(), "a case that changes nothing shows nothing"

    def ask(name: str) -> list[int]:
        asked = {"temperature": 0.0, "ignore_eos": True, "max_tokens": NEW, **CASES[name]}
        return client.complete(PROMPT, **asked).token_ids

    for name in CASES:
        assert ask(name) == expected[name], name
    with ThreadPoolExecutor(len(CASES)) as pool:
        assert dict(zip(CASES, pool.map(ask, CASES), strict=True)) == expected


@pytest.mark.parametrize("least", [0, 1, 2, 9])
def test_no_end_comes_before_min_tokens(client: Client, reference: Reference, least: int) -> None:
    asked: dict[str, Any] = {
        "logit_bias": {reference.eos: 100.0, 33: 99.0},
        "stop_token_ids": [33],
        "min_tokens": least,
    }
    answer = client.complete(PROMPT, temperature=0, max_tokens=NEW, **asked)
    assert answer.token_ids == reference.generate(PROMPT, NEW, **asked)
    assert len(answer.token_ids) == least + 1
    assert answer.finish_reason == "stop"
    assert answer.stop_token_id == answer.token_ids[-1]
    assert not {33, reference.eos} & set(answer.token_ids[:-1])


def test_logprobs_and_alternatives_are_of_the_unmodified_distribution(
    client: Client, reference: Reference
) -> None:
    answer = client.complete(
        PROMPT,
        max_tokens=6,
        temperature=0.9,
        seed=3,
        top_logprobs=20,
        repetition_penalty=1.5,
        logit_bias={17: 100.0},
        ignore_eos=True,
    )
    judged = reference.logprobs(PROMPT + answer.token_ids)[len(PROMPT) - 1 :]
    assert 17 in answer.token_ids
    for token, row in zip(answer.tokens, judged, strict=False):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-3)
        assert_alternatives(token.top, row, 20)


def assert_alternatives(top: Any, row: np.ndarray, count: int) -> None:
    best = np.argsort(-row, kind="stable")[:count]
    assert len(top) == count
    assert [t.logprob for t in top] == pytest.approx(row[best].tolist(), abs=1e-3)
    # By value: two that differ in the last digits only may change places.
    assert [row[t.id] for t in top] == pytest.approx(row[best].tolist(), abs=1e-3)
    assert len({t.id for t in top}) == count


@pytest.mark.parametrize("length", [1, PAGE, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("max_tokens", [1, 4])
def test_prompt_logprobs_are_those_of_the_reference_with_and_without_a_cached_prefix(
    client: Client, reference: Reference, length: int, max_tokens: int
) -> None:
    prompt = [(7 * i * i + max_tokens) % (reference.vocab - 1) + 1 for i in range(length)]
    judged = reference.logprobs(prompt)
    for count in (3, 0):  # the second one meets its prompt in the prefix cache
        answer = client.complete(
            prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, prompt_logprobs=count
        )
        assert answer.token_ids == reference.generate(prompt, max_tokens, ignore_eos=True)
        assert answer.usage.cached_tokens == 0
        assert [(t.index, t.id) for t in answer.prompt_tokens] == list(enumerate(prompt))
        assert (answer.prompt_tokens[0].logprob, answer.prompt_tokens[0].top) == (None, ())
        for token, row in zip(answer.prompt_tokens[1:], judged, strict=False):
            assert token.logprob == pytest.approx(row[token.id], abs=1e-3)
            assert_alternatives(token.top, row, count)
    assert client.complete(prompt, max_tokens=1).prompt_tokens == []


def test_salts_share_cached_tokens_with_their_like_alone(client: Client) -> None:
    prompt = [(11 * i * i) % 300 + 1 for i in range(5 * PAGE)]

    def ask(salt: str) -> Completion:
        return client.complete(
            prompt, cache_salt=salt, max_tokens=4, temperature=0, ignore_eos=True
        )

    first = {salt: ask(salt) for salt in ("", "one", "two", "\U0001f511")}
    again = {salt: ask(salt) for salt in first}
    assert [answer.usage.cached_tokens for answer in first.values()] == [0] * 4
    assert [answer.usage.cached_tokens for answer in again.values()] == [4 * PAGE] * 4
    # Decode, too, keeps them apart: what it has already is not sent again.
    moved = {answer.report.kv_bytes for answer in first.values()}
    moved_again = {answer.report.kv_bytes for answer in again.values()}
    assert len(moved) == len(moved_again) == 1
    assert max(moved_again) < min(moved)
    assert len({tuple(a.token_ids) for a in [*first.values(), *again.values()]}) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": -3.0},
        {"logit_bias": {320: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: 101.0}},
        {"top_logprobs": 21},
        {"prompt_logprobs": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"stop_token_ids": range(320), "min_tokens": 1},
        {"cache_salt": "x" * 300},
        {"stop": "a text and no list"},
    ],
    ids=str,
)
def test_bad_values_are_refused_and_the_next_request_works(
    client: Client, bad: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        client.complete(PROMPT, **{"max_tokens": 8, **bad})
    assert client.complete(PROMPT, max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_a_replay_after_a_dead_decode_worker_counts_what_the_client_has(
    llama: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        **CASES["min-p and all penalties"],
        "max_tokens": 400,
        "min_tokens": 400,
        "prompt_logprobs": 1,
        "top_logprobs": 2,
    }
    with running_cluster(llama, tmp_path, *FLAGS, "--decode", "2") as twins:
        with Client(twins.grpc) as client:
            undisturbed = client.complete(PROMPT, **asked)
            stream = client.generate(PROMPT, **asked)
            chunks = [next(stream)]
            while sum(len(chunk.tokens) for chunk in chunks) < 40:
                chunks.append(next(stream))
            (busy,) = [w for w in twins.workers() if w["role"] == "decode" and w["running"]]
            for pid in (busy["pid"], *busy["engine_pids"]):
                os.kill(pid, signal.SIGKILL)
            chunks += stream
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert chunks[-1].report is not None
        assert chunks[-1].report.replays == 1
        assert [token.id for token in tokens] == undisturbed.token_ids
        assert [[t.id for t in token.top] for token in tokens] == [
            [t.id for t in token.top] for token in undisturbed.tokens
        ]
        judged = [token for chunk in chunks for token in chunk.prompt_tokens]
        assert [token.id for token in judged] == PROMPT
        twins.wait_until_balanced()

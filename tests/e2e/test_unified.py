"""Unified workers alone: what a user with one GPU runs, and the embedded model over every door."""

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton import Client
from protos.baton.v1 import worker_pb2
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.deaths import Stream, ready, replayed, run
from tests.e2e.leaving import WAYS, grpc_cancel
from tests.e2e.test_oracle import Reference, prompts
from tests.e2e.worker_status import statuses, wait_for, wait_until_free

MODEL = Path(__file__).resolve().parents[2] / "models" / "baton-tiny"
CONTEXT = 2048
CHUNK = 16
LENGTH = 48
PROMPT = random_prompt(600, seed=5)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.3, "top_p": 0.95, "seed": 2**63 + 11},
}
LIMIT_S = 1.0
"""Within this of its client's leaving nothing of a request is left."""

TTFT_PARTS = ("admission", "reserve", "queue", "prefill", "network")
HANDOVER_PARTS = ("transfer_tail", "verify", "join", "first_decode_step", "handover_network")

SEEDS = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--prefill", "0",
        "--decode", "0",
        "--unified", "2",
        "--restart",
        "--page-size", "16",
        "--chunked-prefill-size", str(CHUNK),
        "--max-total-tokens", str(CONTEXT),
    )  # fmt: skip
    with running_cluster(MODEL, tmp_path_factory.mktemp("unified"), *flags) as running:
        yield running


@pytest.fixture(autouse=True)
def balanced(cluster: Cluster) -> Iterator[None]:
    yield
    wait_for(lambda: len(ready(cluster, "unified")) == 2, "both workers", within_s=30.0)
    cluster.wait_until_balanced()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


def fresh(length: int) -> list[int]:
    """A prompt that no cache knows."""
    return random_prompt(length, seed=1000 + next(SEEDS))


# ---- answers ------------------------------------------------------------------------------------


def test_tokens_equal_transformers_and_the_report_says_that_nothing_moved(
    cluster: Cluster, reference: Reference
) -> None:
    with Client(cluster.grpc) as client:
        for prompt in prompts(reference.vocab):
            answer = client.complete(
                prompt, max_tokens=12, temperature=0, ignore_eos=True, logprobs=True
            )
            tokens, logprobs = reference.continue_greedily(prompt, 12)
            assert answer.token_ids == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
            report = answer.report
            assert report is not None
            assert (report.transport, report.kv_bytes, report.replays) == ("none", 0, 0)
            assert report.prefill_worker == report.decode_worker
            assert report.prefill_worker.startswith("unified-")
            phases = report.phases_ms
            for total, parts in (("ttft", TTFT_PARTS), ("handover", HANDOVER_PARTS)):
                assert sum(phases[p] for p in parts) == pytest.approx(phases[total], abs=0.01)
            assert (phases["reserve"], phases["transfer_tail"], phases["verify"]) == (0, 0, 0)
            assert phases["prefill"] > 0
            assert phases["first_decode_step"] > 0


def test_requests_that_share_steps_get_what_they_get_alone(cluster: Cluster) -> None:
    """Prompts of many chunks and requests that decode run in the same steps, on both workers."""
    asked = [fresh(5 + 13 * i) for i in range(10)]
    with Client(cluster.grpc) as client, ThreadPoolExecutor(len(asked)) as pool:

        def ask(prompt: list[int], cache_salt: str = "") -> tuple[list[int], str]:
            answer = client.complete(
                prompt, max_tokens=16, temperature=0, ignore_eos=True, cache_salt=cache_salt
            )
            assert answer.report is not None
            return answer.token_ids, answer.report.decode_worker

        answers = list(pool.map(ask, asked))
        for prompt, (tokens, _) in zip(asked, answers, strict=True):
            assert tokens == ask(prompt, "computed anew")[0]
    assert len({worker for _, worker in answers}) == 2


def test_a_prompt_computed_once_is_cached(cluster: Cluster) -> None:
    prompt = fresh(200)
    with Client(cluster.grpc) as client:
        cached = []
        for _ in range(3):  # two workers: the third request meets one of the first two
            answer = client.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True)
            assert answer.usage is not None
            cached.append(answer.usage.cached_tokens)
    assert cached[0] == 0
    assert max(cached) >= 192


def test_chat_and_completions_answer_over_http(cluster: Cluster) -> None:
    messages: Any = [{"role": "user", "content": "Say hello in Japanese."}]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "baton-tiny", "messages": messages, "max_tokens": 40}
        whole = client.chat.completions.create(**asked, temperature=0)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, "stop")
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**asked, temperature=0, stream=True)
            if chunk.choices
        ]
        assert "".join(pieces) == text
        plain: Any = {"model": "baton-tiny", "prompt": "def add(a, b):\n", "max_tokens": 16, "n": 2}
        both = client.completions.create(**plain, temperature=0)
        assert both.choices[0].text == both.choices[1].text != ""


def test_requests_that_decode_go_on_while_a_prompt_is_computed(cluster: Cluster) -> None:
    """Mixed chunks: each chunk's step gives every running request a token, too."""
    with Client(cluster.grpc) as client, contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                client.generate(fresh(20), max_tokens=1000, ignore_eos=True, temperature=0)
            )
            for _ in range(2)
        ]
        counts = [0, 0]
        ended = threading.Event()

        def read(i: int) -> None:
            for chunk in streams[i]:
                counts[i] += len(chunk.tokens)
                if ended.is_set():
                    return

        with ThreadPoolExecutor(2) as pool:
            for i in range(2):
                pool.submit(read, i)
            wait_for(lambda: min(counts) > 2, "both to decode")
            before = list(counts)
            client.complete(fresh(60 * CHUNK), max_tokens=1, temperature=0, ignore_eos=True)
            came = [after - b for after, b in zip(counts, before, strict=True)]
            ended.set()
    # One of the two shared its worker with the 60 chunks; neither stood still.
    assert min(came) > 40


# ---- deaths -------------------------------------------------------------------------------------


def _run(cluster: Cluster, name: str, **death: Any) -> Stream:
    """The one prompt, never from a cache: its chunks take long enough to see who works on it."""
    sampling = {**SAMPLINGS[name], "cache_salt": f"salt-{next(SEEDS)}"}
    return run(cluster, PROMPT, sampling, length=LENGTH, **death)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, Stream]:
    streams = {name: _run(cluster, name) for name in SAMPLINGS}
    assert streams["greedy"].ids != streams["drawn"].ids
    return streams


@pytest.mark.parametrize(
    ("after", "name"), [(0, "drawn"), (1, "greedy"), (2, "drawn"), (9, "greedy")]
)
def test_one_dies_and_the_other_goes_on(
    cluster: Cluster, undisturbed: dict[str, Stream], after: int, name: str
) -> None:
    def ask() -> Stream:
        wait_for(lambda: len(ready(cluster, "unified")) == 2, "a restarted worker", within_s=30.0)
        return _run(cluster, name, role="unified", after=after)

    report = replayed(ask, undisturbed[name])
    assert (report.transport, report.kv_bytes) == ("none", 0)


def test_a_draining_one_finishes_what_it_has_and_gets_nothing_new(
    cluster: Cluster, undisturbed: dict[str, Stream]
) -> None:
    served: list[str] = []

    def drain(worker: dict[str, Any]) -> None:
        os.kill(worker["pid"], signal.SIGTERM)
        wait_for(lambda: len(ready(cluster, "unified")) == 1, "its drain", within_s=5.0)
        with Client(cluster.grpc) as client:
            answer = client.complete([5, 6, 7], max_tokens=2, temperature=0, ignore_eos=True)
        assert answer.report is not None
        served.extend([worker["id"], answer.report.decode_worker])

    result = _run(cluster, "greedy", role="unified", after=1, act=drain)
    assert result.ids == undisturbed["greedy"].ids
    assert result.report is not None
    drained, other = served
    assert (result.report.replays, result.report.decode_worker) == (0, drained)
    assert other != drained


# ---- clients that leave -------------------------------------------------------------------------

Statuses = list[worker_pb2.WorkerStatus]

PHASES: dict[str, tuple[int, int, Callable[[Statuses], bool]]] = {
    "between two chunks of its prompt": (
        1900,
        50,
        lambda all_: any(s.pages.in_use >= 4 and s.waiting == 1 for s in all_),
    ),
    "while it decodes": (40, 1500, lambda all_: any(s.running == 1 for s in all_)),
}
"""Prompt's length, most tokens, and whether the only request is there."""


@pytest.mark.parametrize("way", ["http stream", "grpc cancel", "abort"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_leaves(cluster: Cluster, phase: str, way: str) -> None:
    length, max_tokens, reached = PHASES[phase]
    visitor = WAYS[way](cluster, f"visitor-{next(SEEDS)}", fresh(length), max_tokens)
    wait_for(lambda: reached(list(statuses(cluster).values())), phase)
    visitor.leave()
    wait_until_free(cluster, within_s=LIMIT_S)


@pytest.mark.parametrize("way", ["http stream", "abort"])
def test_a_client_leaves_while_it_waits_for_memory(cluster: Cluster, way: str) -> None:
    def waits() -> bool:
        return any(s.waiting and s.running for s in statuses(cluster).values())

    others = [
        grpc_cancel(cluster, f"other-{next(SEEDS)}", fresh(20), CONTEXT - 20) for _ in range(2)
    ]
    try:
        wait_for(
            lambda: all(s.running == 1 for s in statuses(cluster).values()), "both to be taken"
        )
        visitor = WAYS[way](cluster, f"visitor-{next(SEEDS)}", fresh(1900), 100)
        wait_for(waits, "its wait")
        visitor.leave()
        wait_for(lambda: not waits(), "its end", within_s=LIMIT_S)
        assert all(s.running == 1 for s in statuses(cluster).values())
    finally:
        for other in others:
            other.leave()
    wait_until_free(cluster, within_s=LIMIT_S)


def test_a_client_leaves_before_any_worker_has_answered(cluster: Cluster) -> None:
    engines = [pid for worker in ready(cluster, "unified") for pid in worker["engine_pids"]]
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    try:
        grpc_cancel(cluster, f"visitor-{next(SEEDS)}", fresh(100), 50).leave()
        time.sleep(0.05)
    finally:
        for pid in engines:
            os.kill(pid, signal.SIGCONT)
    wait_until_free(cluster, within_s=LIMIT_S)

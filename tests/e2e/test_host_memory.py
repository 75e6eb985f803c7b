"""Host memory in real workers: a conversation that was evicted returns, and nobody notices but
those who count."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton import Client
from tests.checkpoints import random_prompt, reference_model
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import statuses

PAGE = 16
POOL_PAGES = 24
TURN = 11 * PAGE + 5


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--page-size", str(PAGE),
        "--chunked-prefill-size", "64",
        "--max-total-tokens", str(POOL_PAGES * PAGE),
        "--host-cache-tokens", str(200 * PAGE),
        "--retract-host-share", "1.7",
    )  # fmt: skip
    with running_cluster(llama, tmp_path_factory.mktemp("host"), *flags) as running:
        yield running


def fill_with_others(client: Client, seed: int) -> None:
    """More than the pool of either worker holds."""
    for n in range(3):
        client.complete(random_prompt(TURN, seed=seed + n), max_tokens=8, temperature=0)


def test_an_evicted_conversation_is_a_hit_on_prefill_and_on_decode(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        prompt = random_prompt(TURN, seed=1)
        first = client.complete(prompt, max_tokens=30, temperature=0, ignore_eos=True)
        page_bytes = first.report.kv_bytes // -(-len(prompt) // PAGE)
        fill_with_others(client, 100)
        turn = prompt + first.token_ids + [9, 8, 7]
        second = client.complete(turn, max_tokens=12, temperature=0, ignore_eos=True)
        # Prefill has had the first turn's prompt, which is more than half of its pool and gone.
        assert second.usage.cached_tokens == len(prompt) // PAGE * PAGE
        # Decode has had the answer, too, but for its last token: the rest is all that travels.
        held = (len(prompt) + 29) // PAGE
        assert second.report.kv_bytes == (-(-len(turn) // PAGE) - held) * page_bytes
        assert second.report.replays == 0
    cluster.wait_until_balanced()
    for status in statuses(cluster).values():
        host = status.host_cache
        assert (host.total, host.spoilt) == (200, 0)
        assert 0 < host.loaded <= host.written
        assert host.used > POOL_PAGES


def test_tokens_are_those_of_a_worker_that_computes_everything(
    cluster: Cluster, llama: Path
) -> None:
    reference = reference_model(llama)
    with Client(cluster.grpc) as client:
        prompt = random_prompt(TURN, seed=2)
        for round_ in range(3):
            answer = client.complete(prompt, max_tokens=16, temperature=0, ignore_eos=True)
            assert answer.token_ids == greedy(reference, prompt, 16)
            assert answer.usage.cached_tokens == (0 if round_ == 0 else 11 * PAGE)
            fill_with_others(client, 200 + 10 * round_)
            prompt = prompt + answer.token_ids
            if round_ == 1:
                prompt = prompt[:TURN]
    cluster.wait_until_balanced()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]

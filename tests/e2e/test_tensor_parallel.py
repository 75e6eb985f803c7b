"""A model over several processes: the tokens of one, and the end of all when one dies."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from baton import Client
from tests.e2e.cluster import Cluster
from tests.e2e.parts import Parts, running_parts
from tests.e2e.test_oracle import CHUNK, NEW, Reference, prompts

FLAGS = ("--page-size", "16", "--max-total-tokens", "4096", "--chunked-prefill-size", str(CHUNK))
END_LIMIT_S = 3.0
"""The promise is one second; the rest is for a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def parts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    with running_parts(llama, tmp_path_factory.mktemp("parallel")) as running:
        yield running


@pytest.fixture(scope="module")
def router(parts: Parts) -> Cluster:
    return parts.router()


@pytest.fixture(scope="module")
def two_ranks(parts: Parts, router: Cluster) -> Cluster:
    worker = parts.worker("unified", router, flags=(*FLAGS, "--tp", "2"))
    router.wait_until_ready()
    return worker


def test_two_ranks_draw_the_tokens_of_transformers(
    llama: Path, router: Cluster, two_ranks: Cluster
) -> None:
    reference = Reference(llama)
    with Client(router.grpc) as client:
        for prompt in prompts(reference.vocab):
            answer = client.complete(
                prompt, max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=True
            )
            tokens, logprobs = reference.continue_greedily(prompt, NEW)
            assert answer.token_ids == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-3)
            turn = prompt + tokens + [3, 4]
            again = client.complete(turn, max_tokens=NEW, temperature=0, ignore_eos=True)
            assert again.token_ids == reference.continue_greedily(turn, NEW)[0]
    router.wait_until_balanced()
    assert "cpu (rank 1 of 2)" in two_ranks.log.read_text()


def test_a_ranks_death_ends_its_worker_and_its_requests_go_on_elsewhere(
    llama: Path, parts: Parts, router: Cluster, two_ranks: Cluster
) -> None:
    other = parts.worker("unified", router, flags=FLAGS)
    deadline = time.monotonic() + 60
    while sum(w["state"] == "ready" for w in router.workers()) < 2:
        assert time.monotonic() < deadline, other.log.read_text()
        time.sleep(0.05)
    reference = Reference(llama)
    first_tokens = threading.Semaphore(0)

    def ask(seed: int) -> tuple[list[int], int]:
        prompt = [5 + (seed * 37 + i * 11) % 300 for i in range(20 + seed)]
        with Client(router.grpc) as client:
            tokens, replays = [], 0
            for event in client.generate(prompt, max_tokens=300, temperature=0, ignore_eos=True):
                if not tokens:
                    first_tokens.release()
                tokens += [token.id for token in event.tokens]
                if event.report is not None:
                    replays = event.report.replays
        return tokens, replays

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, seed) for seed in range(6)]
        for _ in answers:
            assert first_tokens.acquire(timeout=60)
        follower = next(
            process
            for process in two_ranks.processes()
            if "worker.rank_process" in process.cmdline()
        )
        family = two_ranks.processes()
        follower.kill()
        _, alive = psutil.wait_procs(family, timeout=END_LIMIT_S)
        assert not alive
        results = [answer.result() for answer in answers]
    assert sum(replays for _, replays in results) > 0
    for seed, (tokens, _) in enumerate(results):
        prompt = [5 + (seed * 37 + i * 11) % 300 for i in range(20 + seed)]
        assert tokens == reference.continue_greedily(prompt, 300)[0]
    router.wait_until_balanced()

"""A pair and a unified worker: load decides who serves, and each goes on after the other."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from baton import Client
from baton.messages import Report
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.deaths import Stream, ready, replayed, run
from tests.e2e.test_oracle import Reference
from tests.e2e.worker_status import wait_for

LENGTH = 48
PROMPT = random_prompt(600, seed=9)
SAMPLING = {"temperature": 1.2, "seed": 77}
ROLES = ("prefill", "decode", "unified")


@pytest.fixture(scope="module")
def cluster(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--unified", "1",
        "--restart",
        "--page-size", "16",
        "--chunked-prefill-size", "32",
        "--max-total-tokens", "4096",
        "--no-enable-radix-cache",
    )  # fmt: skip
    with running_cluster(slow_llama, tmp_path_factory.mktemp("beside"), *flags) as running:
        yield running


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """All three workers, before and after."""
    _wait_for_all(cluster)
    yield
    cluster.wait_until_balanced()


def _wait_for_all(cluster: Cluster) -> None:
    def there() -> bool:
        return all(ready(cluster, role) for role in ROLES)

    wait_for(there, "all workers", within_s=30.0)


def test_a_lone_request_goes_to_the_pair(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        report = client.complete(PROMPT, max_tokens=4, temperature=0, ignore_eos=True).report
    assert report is not None
    assert report.prefill_worker.startswith("prefill-")
    assert report.decode_worker.startswith("decode-")
    assert report.kv_bytes > 0


def test_under_load_both_serve_and_every_token_is_right(cluster: Cluster, slow_llama: Path) -> None:
    reference = Reference(slow_llama)
    asked = [random_prompt(20 + 17 * i, seed=100 + i) for i in range(6)]
    with Client(cluster.grpc) as client, ThreadPoolExecutor(len(asked)) as pool:

        def ask(prompt: list[int]) -> tuple[list[int], str, str, int]:
            answer = client.complete(prompt, max_tokens=12, temperature=0, ignore_eos=True)
            report = answer.report
            assert report is not None
            return answer.token_ids, report.decode_worker, report.transport, report.kv_bytes

        answers = list(pool.map(ask, asked))
    roles = set()
    for prompt, (tokens, worker, transport, kv_bytes) in zip(asked, answers, strict=True):
        assert tokens == reference.continue_greedily(prompt, 12)[0]
        role = worker.split("-")[0]
        roles.add(role)
        assert (transport == "none", kv_bytes == 0) == ((role == "unified"),) * 2
    assert roles == {"decode", "unified"}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Stream:
    return run(cluster, PROMPT, SAMPLING, length=LENGTH)


@pytest.mark.parametrize(("role", "after"), [("prefill", 0), ("decode", 3)])
def test_the_unified_worker_goes_on_after_the_pair(
    cluster: Cluster, undisturbed: Stream, role: str, after: int
) -> None:
    report = _replayed(cluster, undisturbed, role, after)
    assert report.prefill_worker == report.decode_worker
    assert report.decode_worker.startswith("unified-")
    # One of the two ways to serve is left, which is enough to take requests.
    assert httpx.get(f"{cluster.http}/health", timeout=5.0).status_code == 200
    answer = cluster.complete(prompt=[5, 6, 7], max_tokens=2, temperature=0)
    assert answer.status_code == 200


def test_the_pair_goes_on_after_the_unified_worker(cluster: Cluster, undisturbed: Stream) -> None:
    with (
        Client(cluster.grpc) as client,
        client.generate(PROMPT, max_tokens=2000, ignore_eos=True, temperature=0) as other,
    ):
        next(iter(other))  # while it is there, the unified worker is the emptier one
        report = _replayed(cluster, undisturbed, "unified", 3)
    assert report.decode_worker.startswith("decode-")
    assert report.kv_bytes > 0


def _replayed(cluster: Cluster, undisturbed: Stream, role: str, after: int) -> Report:
    def ask() -> Stream:
        _wait_for_all(cluster)
        return run(cluster, PROMPT, SAMPLING, length=LENGTH, role=role, after=after)

    return replayed(ask, undisturbed)

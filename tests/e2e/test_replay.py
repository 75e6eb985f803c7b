"""A worker may die at any token, and the client notices nothing: the same tokens, none missing and
none twice, greedy or drawn from a seed.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from baton import Client
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import get_status, wait_for

LENGTH = 64
"""Tokens of the output."""

DEATHS = range(1, 12)
"""Tokens after which decode dies; far from the end, or the death might come too late to matter."""

PROMPT = random_prompt(600, seed=5)
"""Long enough, in chunks of a page, to see who works on it before its first token."""

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 0.95, "seed": 2**63 + 11},
]
TRIES = 3
"""A death that comes when the last token is out already proves nothing: it is tried again."""


@pytest.fixture(scope="module")
def cluster(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--prefill", "2",
        "--decode", "3",
        "--restart",
        "--page-size", "16",
        "--chunked-prefill-size", "16",
        "--max-total-tokens", "4096",
        "--no-enable-radix-cache",
    )  # fmt: skip
    with running_cluster(slow_llama, tmp_path_factory.mktemp("replay"), *flags) as running:
        yield running


@dataclass
class Result:
    """Everything that one stream said."""

    ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    replays: int = 0


def _ready(cluster: Cluster, role: str) -> list[dict[str, Any]]:
    return [w for w in cluster.workers() if w["role"] == role and w["state"] == "ready"]


def _at_work(workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that hand over or await the KV of a request, the only one there is."""
    return [worker for worker in workers if get_status(worker["address"]).transferring]


def _kill(worker: dict[str, Any]) -> None:
    for pid in (*worker["engine_pids"], worker["pid"]):
        os.kill(pid, signal.SIGKILL)


def _run(
    cluster: Cluster, sampling: dict[str, Any], *, role: str = "", after: int = LENGTH
) -> Result:
    """One request; kills the worker of that role that works on it, after so many tokens."""
    result = Result()
    with Client(cluster.grpc) as client:
        workers = _ready(cluster, role) if role else []
        stream = client.generate(PROMPT, max_tokens=LENGTH, ignore_eos=True, **sampling)
        victims: list[dict[str, Any]] = []
        if role:
            wait_for(lambda: victims.extend(_at_work(workers)) or victims, "somebody at work")
        if role and after == 0:
            _kill(victims.pop())
        for chunk in stream:
            result.ids += [token.id for token in chunk.tokens]
            result.indices += [token.index for token in chunk.tokens]
            if victims and len(result.ids) >= after:
                _kill(victims.pop())
            if chunk.report is not None:
                result.replays = chunk.report.replays
    return result


def _expect_unnoticed(
    cluster: Cluster, sampling: dict[str, Any], undisturbed: Result, **death: Any
) -> None:
    for _ in range(TRIES):
        _wait_for_spares(cluster)
        result = _run(cluster, sampling, **death)
        assert result.ids == undisturbed.ids
        assert result.indices == list(range(LENGTH))
        if result.replays:
            break
    assert result.replays == 1


def _wait_for_spares(cluster: Cluster) -> None:
    """One worker of each role may die."""

    def enough() -> bool:
        return len(_ready(cluster, "prefill")) >= 2 and len(_ready(cluster, "decode")) >= 2

    wait_for(enough, "a restarted worker", within_s=30.0)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Result]:
    results = [_run(cluster, sampling) for sampling in SAMPLINGS]
    assert results[0].ids != results[1].ids
    assert all(len(result.ids) == LENGTH and not result.replays for result in results)
    return results


@pytest.mark.parametrize("index", DEATHS)
def test_decode_may_die_after_any_token(
    cluster: Cluster, undisturbed: list[Result], index: int
) -> None:
    kind = index % 2
    _expect_unnoticed(cluster, SAMPLINGS[kind], undisturbed[kind], role="decode", after=index)
    cluster.wait_until_balanced()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_may_die_before_the_first_token(
    cluster: Cluster, undisturbed: list[Result], role: str
) -> None:
    for sampling, expected in zip(SAMPLINGS, undisturbed, strict=True):
        _expect_unnoticed(cluster, sampling, expected, role=role, after=0)
    cluster.wait_until_balanced()

"""Ten thousand short requests, a fifth of them left at random moments, through real processes: what
every process holds is the same at the end as at the start. `make test-soak`; `test_bounds.py` has a
short one that always runs.
"""

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.leaving import WAYS
from tests.e2e.worker_status import Footprint, footprints, statuses, wait_until_free

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
WARM_UP = max(200, REQUESTS // 10)
"""Requests until pools, caches and lazy imports have reached their size."""
ABORTED = 0.2
CLIENTS = 8
SPARE_FILES = 8
SPARE_THREADS = 4
SPARE_BYTES = 32 << 20
"""Over all of the soak: 3.4 KiB a request would be seen."""
LIMIT_S = 3 * 3600


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--page-size", "16", "--max-total-tokens", "8192")
    with running_cluster(llama, tmp_path_factory.mktemp("soak"), *flags) as running:
        yield running


@pytest.mark.soak
@pytest.mark.timeout(LIMIT_S)
def test_ten_thousand_requests_leave_nothing_behind(cluster: Cluster) -> None:
    dice = random.Random(6)
    run(cluster, WARM_UP, dice)
    before, handles = at_rest(cluster)
    started = time.monotonic()
    failed = run(cluster, REQUESTS, dice)
    took_s = time.monotonic() - started
    after, handles_after = at_rest(cluster)
    assert not failed
    print(f"{REQUESTS} requests in {took_s:.0f} s")
    for pid, was in before.items():
        print(difference(was, after[pid]))
    assert handles_after == handles
    assert after.keys() == before.keys()
    for pid, was in before.items():
        now = after[pid]
        assert now.files <= was.files + SPARE_FILES, difference(was, now)
        assert now.threads <= was.threads + SPARE_THREADS, difference(was, now)
        assert now.memory_bytes <= was.memory_bytes + SPARE_BYTES, difference(was, now)


def at_rest(cluster: Cluster) -> tuple[dict[int, Footprint], dict[str, int]]:
    """What each process costs while pages, slots and rows are all back, and each worker's transfer
    handles."""
    wait_until_free(cluster, within_s=10.0)
    cluster.wait_until_balanced()
    handles = {worker: status.transfer_handles for worker, status in statuses(cluster).items()}
    return footprints(cluster), handles


def run(cluster: Cluster, count: int, dice: random.Random) -> list[str]:
    """What answered something else than it should."""
    ways = list(WAYS.values())[:4]  # those that end at once
    plans = [
        (random_prompt(dice.randint(1, 80), seed=n), dice.random(), dice.random() * 0.05, n)
        for n in range(count)
    ]
    failed: list[str] = []

    def work(mine: list[tuple[list[int], float, float, int]]) -> None:
        with httpx.Client(base_url=cluster.http, timeout=60.0) as client:
            for prompt, chance, pause_s, number in mine:
                if chance < ABORTED:
                    visitor = ways[number % 4](cluster, f"soak-{count}-{number}", prompt, 200)
                    time.sleep(pause_s)
                    visitor.leave()
                    continue
                body = {
                    "prompt": prompt,
                    "max_tokens": 1 + number % 6,
                    "ignore_eos": True,
                    "temperature": 0,
                }
                answer = client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    failed.append(answer.text)

    threads = [threading.Thread(target=work, args=(plans[i::CLIENTS],)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def difference(was: Footprint, now: Footprint) -> str:
    return (
        f"{was.name}: files {was.files} -> {now.files}, threads {was.threads} -> {now.threads}, "
        f"memory {was.memory_bytes >> 20} -> {now.memory_bytes >> 20} MiB"
    )

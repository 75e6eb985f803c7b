"""Workers leave with real processes: what they took is finished or handed over, token for token."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from baton import Client
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import get_status, wait_for

PATIENCE_S = 30.0
"""No promise of a worker's: other tests may have the machine."""

STANDS_STILL_S = 5.0
"""More than a drained worker gives an RPC, and than it once gave its leave."""

LONG = random_prompt(2000, seed=3)
PROMPT = random_prompt(90, seed=4)


@pytest.fixture(scope="module")
def cluster(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--prefill", "2",
        "--decode", "3",
        "--restart",
        "--page-size", "16",
        "--chunked-prefill-size", "64",
        "--max-total-tokens", "8192",
        "--no-enable-radix-cache",
        # A machine that is busy with other things must not look like a dead worker here.
        "--silence-timeout-s", "10",
    )  # fmt: skip
    with running_cluster(slow_llama, tmp_path_factory.mktemp("drain"), *flags) as running:
        yield running


@pytest.fixture(autouse=True)
def with_a_spare(cluster: Cluster) -> Iterator[None]:
    """One worker may leave; those that left before come back meanwhile."""

    def enough() -> bool:
        ready = [w["role"] for w in cluster.workers() if w["state"] == "ready"]
        return ready.count("prefill") >= 1 and ready.count("decode") >= 2

    wait_for(enough, "a restarted worker", within_s=40.0)
    yield
    cluster.wait_until_balanced()


def _drain(cluster: Cluster, worker: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton", "drain", worker, "--router", cluster.grpc, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _order(cluster: Cluster, worker: str, **terms: float) -> None:
    """What the command sends, without the time that its process takes to start."""
    drain = worker_pb2.DrainRequest(**terms)
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = worker_pb2_grpc.RegistryStub(channel)
        stub.DrainWorker(worker_pb2.DrainWorkerRequest(worker=worker, drain=drain), timeout=5.0)


def _generate(cluster: Cluster, prompt: list[int], tokens: int) -> tuple[list[int], int, str, str]:
    """Token ids, replays, and who served."""
    with Client(cluster.grpc) as client:
        answer = client.complete(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    report = answer.report
    return answer.token_ids, report.replays, report.prefill_worker, report.decode_worker


def _busy(cluster: Cluster, role: str) -> str:
    """The worker of that role that works on the only request."""
    found: list[str] = []

    def look() -> bool:
        # Listed anew: one that another test's drain has restarted may have come just now.
        for worker in cluster.workers():
            if worker["role"] != role or worker["state"] != "ready":
                continue
            status = get_status(worker["address"])
            if status.running or status.transferring:
                found.append(worker["id"])
        return bool(found)

    wait_for(look, f"a {role} worker at work", within_s=PATIENCE_S)
    return found[0]


def _wait_until_gone(cluster: Cluster, worker: str) -> None:
    wait_for(
        lambda: worker not in [w["id"] for w in cluster.workers()], "its end", within_s=PATIENCE_S
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_drained_worker_finishes_what_it_took(cluster: Cluster, role: str) -> None:
    undisturbed = _generate(cluster, LONG, 100)[0]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_generate, cluster, LONG, 100)
        victim = _busy(cluster, role)
        _order(cluster, victim)
        ids, replays, *served = running.result()
    assert victim in served
    assert (ids, replays) == (undisturbed, 0)
    _wait_until_gone(cluster, victim)


def test_the_command_returns_when_the_worker_has_left(cluster: Cluster) -> None:
    victim = cluster.worker("decode")["id"]
    done = _drain(cluster, victim[:-2])
    assert done.returncode == 0, done.stderr
    assert f"{victim} has left" in done.stderr
    assert victim not in [w["id"] for w in cluster.workers() if w["state"] == "ready"]


def test_what_a_drained_worker_has_no_time_for_goes_on_elsewhere(cluster: Cluster) -> None:
    undisturbed = _generate(cluster, PROMPT, 600)[0]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_generate, cluster, PROMPT, 600)
        victim = _busy(cluster, "decode")
        _order(cluster, victim, timeout_s=0.0)
        ids, replays, _, decode = running.result()
    assert ids == undisturbed
    assert replays == 1
    assert decode != victim


def test_a_draining_worker_gets_no_new_request(cluster: Cluster) -> None:
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(_generate, cluster, PROMPT, 800)
        victim = _busy(cluster, "decode")
        _order(cluster, victim)
        others = [pool.submit(_generate, cluster, PROMPT, 4) for _ in range(3)]
        assert all(victim not in other.result() for other in others)
        draining = [w["id"] for w in cluster.workers() if w["state"] == "draining"]
        assert running.done() or draining == [victim]
        assert running.result()[1] == 0, cluster.log.read_text()[-3000:]


def test_a_drain_is_exact_though_the_router_stands_still(cluster: Cluster) -> None:
    """For longer than any single step of the leave has: tokens, goodbye and deregistration wait."""
    undisturbed = _generate(cluster, PROMPT, 200)[0]
    router = next(p for p in cluster.processes() if "router" in p.cmdline())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_generate, cluster, PROMPT, 200)
        victim = _busy(cluster, "decode")
        address = next(w["address"] for w in cluster.workers() if w["id"] == victim)
        _order(cluster, victim)
        router.suspend()
        try:
            wait_for(lambda: not get_status(address).running, "the end of its work")
            time.sleep(STANDS_STILL_S)
        finally:
            router.resume()
        ids, replays, *_ = running.result()
    assert (ids, replays) == (undisturbed, 0)
    _wait_until_gone(cluster, victim)


def test_drain_names_what_there_is_where_the_name_is_wrong(cluster: Cluster) -> None:
    known = cluster.worker("decode")["id"]
    wrong = _drain(cluster, "decode-nobody")
    assert wrong.returncode == 1
    assert known in wrong.stderr

"""A client that goes away frees rows, pages and slots on both workers within a second, wherever
its request is.

The model is slow enough, and chunks, pools and windows are small enough, for each phase to last:
a prompt takes seconds in chunks of a page, and a request that cannot have decode memory waits for
the one that holds it.
"""

import contextlib
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.conftest import SLOW_CONTEXT
from tests.e2e.leaving import WAYS, Visitor, grpc_cancel
from tests.e2e.worker_status import Probe, wait_for, wait_until_free

LIMIT_S = 1.0
"""The promise: this long after the client has gone, nothing of its request is left."""

CONTEXT = SLOW_CONTEXT
LONG = 3000
"""Tokens of a prompt that keeps prefill busy for a while, in chunks of 16."""

NAMES = itertools.count(1)


StartCluster = Callable[[str], tuple[Cluster, Probe]]


@pytest.fixture(scope="module")
def start(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Starts a cluster of that transport, once."""
    flags = (
        "--page-size", "16",
        "--chunked-prefill-size", "16",
        "--max-total-tokens", str(CONTEXT),
        "--landing-slots", "16",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:

        @functools.cache
        def made(transport: str) -> tuple[Cluster, Probe]:
            directory = tmp_path_factory.mktemp(transport)
            cluster = stack.enter_context(
                running_cluster(slow_llama, directory, "--transport", transport, *flags)
            )
            return cluster, stack.enter_context(contextlib.closing(Probe(cluster)))

        yield made


@pytest.fixture
def cluster(start: StartCluster, transport: str) -> Cluster:
    return start(transport)[0]


@pytest.fixture
def probe(start: StartCluster, transport: str) -> Probe:
    return start(transport)[1]


every_way = pytest.mark.parametrize(
    ("transport", "way"),
    [("grpc", way) for way in WAYS] + [("nixl", "http stream"), ("nixl", "grpc cancel")],
)


@contextlib.contextmanager
def _occupied(cluster: Cluster, length: int, max_tokens: int) -> Iterator[None]:
    """Somebody else's request runs meanwhile."""
    other = grpc_cancel(cluster, f"other-{next(NAMES)}", _fresh(length), max_tokens)
    try:
        yield
    finally:
        other.leave()


def _fresh(length: int) -> list[int]:
    """A new prompt, or the prefix cache would shorten its phases."""
    return random_prompt(length, seed=next(NAMES))


def _visit(
    cluster: Cluster, way: str, length: int, max_tokens: int, reached: Callable[[], bool]
) -> Visitor:
    """A visitor whose request is in the phase that `reached` tells."""
    for patience in (1, 2, 4):
        options = {"patience": patience} if way == "grpc deadline" else {}
        name = f"visitor-{next(NAMES)}"
        visitor = WAYS[way](cluster, name, _fresh(length), max_tokens, **options)
        limit = min(time.monotonic() + 10.0, visitor.until - 0.1)
        while time.monotonic() < limit:
            if reached():
                return visitor
            time.sleep(0.005)
        visitor.leave()
    raise AssertionError("the phase was not reached")


def _expect_free_and_serving(cluster: Cluster) -> None:
    wait_until_free(cluster, within_s=LIMIT_S)
    answer = cluster.complete(prompt=_fresh(20), max_tokens=2, temperature=0, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    cluster.wait_until_balanced()


@every_way
def test_while_decode_has_no_memory_for_it(cluster: Cluster, probe: Probe, way: str) -> None:
    """The reservation waits at decode, and the request for its ticket at prefill."""

    def waits() -> bool:
        prefill = probe.prefill()
        return probe.decode().waiting == 1 and (prefill.waiting, prefill.pages.in_use) == (1, 0)

    with _occupied(cluster, 20, CONTEXT - 20):
        wait_for(lambda: probe.decode().running == 1, "the other's decode")
        _visit(cluster, way, 3900, 100, waits).leave()
        wait_for(lambda: probe.decode().waiting == 0, "its end", within_s=LIMIT_S)
        wait_for(lambda: probe.prefill().waiting == 0, "its end", within_s=LIMIT_S)
        assert probe.decode().running == 1
    _expect_free_and_serving(cluster)


@every_way
def test_while_it_queues_at_prefill(cluster: Cluster, probe: Probe, way: str) -> None:
    def queued() -> bool:
        status = probe.prefill()
        return (status.transferring, status.waiting) == (2, 2)

    with _occupied(cluster, LONG, 2):
        wait_for(lambda: probe.prefill().pages.in_use > 0, "a prefill ahead")
        _visit(cluster, way, 500, 50, queued).leave()
        wait_for(lambda: probe.prefill().waiting <= 1, "its end", within_s=LIMIT_S)
        wait_for(lambda: probe.decode().transferring <= 1, "its end", within_s=LIMIT_S)
    _expect_free_and_serving(cluster)


@every_way
def test_between_two_chunks_of_its_prompt(cluster: Cluster, probe: Probe, way: str) -> None:
    def half_done() -> bool:
        status = probe.prefill()
        return status.pages.in_use >= 4 and status.waiting == 1

    visitor = _visit(cluster, way, LONG, 50, half_done)
    visitor.leave()
    _expect_free_and_serving(cluster)


@every_way
def test_while_its_pages_travel(cluster: Cluster, probe: Probe, way: str) -> None:
    """Decode's engine stands still, so that prefill is left with pages and without credit."""
    (engine,) = cluster.worker("decode")["engine_pids"]
    stopped = False

    def without_credit() -> bool:
        nonlocal stopped
        if not stopped and probe.decode().slots_granted > 0:
            os.kill(engine, signal.SIGSTOP)
            stopped = True
        return stopped and probe.prefill().pages.in_use >= 8

    try:
        visitor = _visit(cluster, way, 400, 50, without_credit)
        visitor.leave()
        wait_for(lambda: probe.prefill().pages.in_use == 0, "its end", within_s=LIMIT_S)
        if probe.transport == "grpc":
            # NIXL's writes into a stopped process end when it goes on: until then the pages they
            # read from are held, and given to nobody else.
            wait_for(lambda: probe.prefill().pages.held == 0, "its pages", within_s=LIMIT_S)
    finally:
        os.kill(engine, signal.SIGCONT)
    _expect_free_and_serving(cluster)


@every_way
def test_while_it_decodes(cluster: Cluster, probe: Probe, way: str) -> None:
    visitor = _visit(cluster, way, 40, 2000, lambda: probe.decode().running == 1)
    visitor.leave()
    _expect_free_and_serving(cluster)


@every_way
def test_before_any_worker_has_answered(cluster: Cluster, way: str) -> None:
    """Both engines stand still: what they get is the request and its end, one after the other."""
    engines = [pid for worker in cluster.workers() for pid in worker["engine_pids"]]
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    try:
        WAYS[way](cluster, f"visitor-{next(NAMES)}", _fresh(100), 50).leave()
    finally:
        for pid in engines:
            os.kill(pid, signal.SIGCONT)
    _expect_free_and_serving(cluster)

"""Priorities, deadlines and adapters on a unified worker with one place, through real processes."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import grpc
import pytest

from baton import Client
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.worker_status import get_status, wait_for

LONG = 250
"""Tokens in whose time the other request would have had its four many times over."""

ENDLESS = 1900
"""Tokens that nobody waits for: whoever asks for them leaves before, its place taken till then."""

SANE = worker_pb2.ResolvedSampling(temperature=0, top_p=1, max_tokens=4)


@pytest.fixture(scope="module")
def cluster(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = (
        "--prefill", "0",
        "--decode", "0",
        "--unified", "1",
        "--load-format", "dummy",
        "--page-size", "16",
        "--max-total-tokens", "2048",
        "--max-running-requests", "1",
        "--enable-priority-scheduling",
        "--priority-preemption-threshold", "5",
    )  # fmt: skip
    with running_cluster(slow_llama, tmp_path_factory.mktemp("priorities"), *flags) as running:
        yield running


class Background:
    """A request that nobody waits for, while others come; whoever started it makes it leave."""

    PROMPT: ClassVar = [7, 8, 9]

    def __init__(self, cluster: Cluster, *, priority: int) -> None:
        self.tokens: list[int] = []
        self._cluster, self._priority = cluster, priority
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def leave(self) -> None:
        """Ends the stream with its next token, which frees the place."""
        self._leave.set()

    def _read(self) -> None:
        with (
            Client(self._cluster.grpc) as client,
            client.generate(
                self.PROMPT,
                max_tokens=ENDLESS,
                temperature=0,
                ignore_eos=True,
                priority=self._priority,
            ) as stream,
        ):
            for chunk in stream:
                self.tokens.extend(token.id for token in chunk.tokens)
                if self._leave.is_set():
                    break

    def read(self, count: int) -> None:
        """Waits until that many more tokens have come."""
        wanted = len(self.tokens) + count
        while len(self.tokens) < wanted:
            assert self._thread.is_alive()
            time.sleep(0.005)

    def __enter__(self) -> "Background":
        self._thread.start()
        self.read(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(100.0)
        assert not self._thread.is_alive()


def test_an_important_request_takes_the_only_place_and_the_other_loses_no_token(
    cluster: Cluster,
) -> None:
    with Background(cluster, priority=10) as low:
        body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = cluster.complete(**body, priority=0)
        status = get_status(cluster.worker("unified")["address"])
        assert status.running + status.waiting == 1, "the other one has ended before"
        low.read(20)
        low.leave()
    assert answer.status_code == 200, answer.text
    with Client(cluster.grpc) as client:
        undisturbed = client.complete(
            Background.PROMPT, max_tokens=len(low.tokens), temperature=0, ignore_eos=True
        )
    assert low.tokens == undisturbed.token_ids
    cluster.wait_until_balanced()


def test_one_that_is_not_important_enough_waits(cluster: Cluster) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        Background(cluster, priority=5) as running,
    ):
        body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        asked = pool.submit(cluster.complete, **body, priority=0)
        worker = cluster.worker("unified")["address"]
        wait_for(lambda: get_status(worker).waiting == 1, "a request that waits", within_s=30.0)
        # Two streams to one client tell nothing of who was first, as either may be read late: the
        # one that runs goes on for as long as the other would have taken many times over.
        running.read(LONG)
        assert not asked.done()
        running.leave()
        assert asked.result(60.0).status_code == 200
    cluster.wait_until_balanced()


def test_what_is_late_or_unknown_fails_by_name_and_costs_nothing(cluster: Cluster) -> None:
    with Background(cluster, priority=0) as running:
        failed = asked_directly(
            cluster,
            worker_pb2.GenerateLocally(
                request_id="late", prompt_ids=[5], sampling=SANE, deadline_s=0.2, priority=9
            ),
            worker_pb2.GenerateLocally(
                request_id="adapter", prompt_ids=[5], sampling=SANE, lora_id="poet"
            ),
        )
        assert len(running.tokens) < ENDLESS
        running.leave()
    assert failed["late"].error.code == worker_pb2.ERROR_CODE_DEADLINE_EXCEEDED
    assert not failed["late"].retryable
    assert failed["adapter"].error.code == worker_pb2.ERROR_CODE_NOT_FOUND
    assert "'poet'" in failed["adapter"].error.message
    cluster.wait_until_balanced()


def asked_directly(
    cluster: Cluster, *requests: worker_pb2.GenerateLocally
) -> dict[str, worker_pb2.WorkFailed]:
    """Sends requests as a router would, and waits until all of them have failed."""
    worker = cluster.worker("unified")
    done = threading.Event()

    def said() -> Iterator[worker_pb2.RouterMessage]:
        hello = worker_pb2.SessionHello(
            router_id="test", protocol_version=PROTOCOL_VERSION, instance_id=worker["id"]
        )
        yield worker_pb2.RouterMessage(hello=hello)
        for request in requests:
            yield worker_pb2.RouterMessage(generate=request)
        done.wait(20.0)

    failed: dict[str, worker_pb2.WorkFailed] = {}
    with grpc.insecure_channel(worker["address"]) as channel:
        for message in worker_pb2_grpc.WorkerStub(channel).Session(said(), timeout=20.0):
            if message.WhichOneof("kind") == "failed":
                failed[message.failed.request_id] = message.failed
                if len(failed) == len(requests):
                    break
        done.set()
    return failed

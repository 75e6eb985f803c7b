"""Two routers over the same workers, joined by a real Redis that comes and goes."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from baton import Client
from tests.checkpoints import random_prompt
from tests.e2e.cluster import Cluster
from tests.e2e.parts import Parts, running_parts
from tests.e2e.worker_status import wait_for
from tests.redis_server import RedisServer, running_redis

TOKENS = 150
PROMPTS = [random_prompt(30 + 20 * i, seed=i) for i in range(4)]
WORKER_FLAGS = ("--page-size", "16", "--max-total-tokens", "8192")


def _router_flags(redis: RedisServer) -> tuple[str, ...]:
    shared = ("--registry", "redis", "--redis-url", redis.url, "--redis-ttl-s", "3")
    # A machine that is busy with other things must not look like a dead worker here.
    return (*shared, "--silence-timeout-s", "10")


@dataclass
class Deployment:
    redis: RedisServer
    parts: Parts
    one: Cluster
    other: Cluster

    @property
    def routers(self) -> tuple[Cluster, Cluster]:
        return self.one, self.other

    def router_flags(self) -> tuple[str, ...]:
        return _router_flags(self.redis)


@pytest.fixture(scope="module")
def deployment(slow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("shared")
    with running_redis(directory) as redis, running_parts(slow_llama, directory) as parts:
        flags = _router_flags(redis)
        one, other = parts.router(*flags), parts.router(*flags)
        # Each worker registers with one router only; the other one learns of it from Redis.
        parts.worker("prefill", one, flags=WORKER_FLAGS)
        parts.worker("decode", other, flags=WORKER_FLAGS)
        for router in (one, other):
            router.wait_until_ready()
        yield Deployment(redis, parts, one, other)


def _generate(
    router: Cluster, prompt: list[int], request_id: str = "", *, tokens: int = TOKENS
) -> tuple[list[int], int]:
    """Token ids, and how often the request was replayed."""
    with Client(router.grpc) as client:
        answer = client.complete(
            prompt, max_tokens=tokens, temperature=0, ignore_eos=True, request_id=request_id
        )
    return answer.token_ids, answer.report.replays


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> list[list[int]]:
    ids = [_generate(deployment.one, prompt)[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in ids}) == len(PROMPTS)
    return ids


def _registry_up(router: Cluster) -> bool:
    text = httpx.get(f"{router.http}/metrics", timeout=10.0).text
    return 'baton_registry_up{kind="redis"} 1.0' in text


def _ready(router: Cluster, role: str) -> set[str]:
    return {w["id"] for w in router.workers() if w["role"] == role and w["state"] == "ready"}


def test_both_routers_serve_with_the_same_workers_at_the_same_time(
    deployment: Deployment, undisturbed: list[list[int]]
) -> None:
    one, other = deployment.routers
    assert {w["id"] for w in one.workers()} == {w["id"] for w in other.workers()}
    jobs = [(router, prompt) for prompt in PROMPTS for router in deployment.routers]
    with ThreadPoolExecutor(len(jobs)) as pool:
        # Clients of different routers may choose the same id.
        answers = list(pool.map(lambda job: _generate(*job, request_id="same"), jobs[:2]))
        answers += list(pool.map(lambda job: _generate(*job), jobs[2:]))
    assert answers == [(ids, 0) for ids in undisturbed for _ in deployment.routers]
    with Client(one.grpc) as first, Client(other.grpc) as second:
        infos = first.server_info(), second.server_info()
    assert infos[0].router_id != infos[1].router_id
    assert all(info.registry.kind == "redis" and info.registry.up for info in infos)
    for router in deployment.routers:
        router.wait_until_balanced()


def test_requests_do_not_notice_that_redis_dies_and_a_new_worker_joins_afterwards(
    deployment: Deployment, undisturbed: list[list[int]]
) -> None:
    redis = deployment.redis
    jobs = [(router, prompt) for prompt in PROMPTS for router in deployment.routers]
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(_generate, *job) for job in jobs]
        wait_for(
            lambda: sum(w["running"] for w in deployment.one.workers()) >= 2, "requests at work"
        )
        redis.kill()
        assert [job.result() for job in running] == [
            (ids, 0) for ids in undisturbed for _ in deployment.routers
        ]
    for router in deployment.routers:
        wait_for(lambda router=router: not _registry_up(router), "the loss of Redis to be told")
        health = httpx.get(f"{router.http}/health", timeout=5.0)
        assert health.status_code == 200
        assert "does not answer" in health.json()["registry"]
        assert _generate(router, PROMPTS[0]) == (undisturbed[0], 0)
    # A worker that comes now is known where it registers, and to all once Redis is back.
    deployment.parts.worker("decode", deployment.one, flags=WORKER_FLAGS)
    wait_for(lambda: len(_ready(deployment.one, "decode")) == 2, "a new worker", within_s=40)
    redis.start()
    for router in deployment.routers:
        wait_for(
            lambda router=router: _registry_up(router) and len(_ready(router, "decode")) == 2,
            "the new worker at every router",
        )
    new = (_ready(deployment.one, "decode") & _ready(deployment.other, "decode")).pop()
    used: set[str] = set()
    with Client(deployment.other.grpc) as client:
        for _ in range(6):
            answer = client.complete(PROMPTS[1], max_tokens=8, temperature=0, ignore_eos=True)
            used.add(answer.report.decode_worker)
    assert new in used
    for router in deployment.routers:
        router.wait_until_balanced()


def test_the_death_of_a_router_ends_its_own_requests_alone(
    deployment: Deployment, undisturbed: list[list[int]]
) -> None:
    one, other = deployment.routers
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        doomed = [pool.submit(_generate, one, prompt, tokens=900) for prompt in PROMPTS]
        others = [pool.submit(_generate, other, prompt) for prompt in PROMPTS]
        wait_for(lambda: sum(w["running"] for w in other.workers()) >= 3, "requests at work")
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait(timeout=10)
        assert all(job.exception() is not None for job in doomed)
        assert [job.result() for job in others] == [(ids, 0) for ids in undisturbed]
    other.wait_until_balanced()
    # The prefill worker registered with the dead one: it is heard through its session with the
    # living one, longer than the shared registry's limit, and the successor finds it there.
    threading.Event().wait(4.0)
    assert len(_ready(other, "prefill")) == 1
    deployment.one = deployment.parts.router(*deployment.router_flags(), like=one)
    deployment.one.wait_until_ready()
    assert _generate(deployment.one, PROMPTS[2]) == (undisturbed[2], 0)
    for router in deployment.routers:
        router.wait_until_balanced()

"""The registry that routers share, over a real Redis: each test speaks as two routers."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.version import PROTOCOL_VERSION
from router.registry import Listeners, WorkerRecord
from router.registry_redis import RedisRegistry, RedisSettings
from tests.redis_server import RedisServer, running_redis
from tests.router.fakes import until

TTL_S = 1.0
SYNC_S = 0.05
NAMES = itertools.count(1)

Make = Callable[..., Awaitable[RedisRegistry]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis"), password="a secret") as server:
        yield server


@pytest.fixture
async def redis(server: RedisServer) -> RedisServer:
    """Up and empty at the beginning of each test."""
    server.kill()
    server.start()
    return server


@pytest.fixture
async def make(redis: RedisServer) -> AsyncIterator[Make]:
    """Registries of so many routers."""
    registries: list[RedisRegistry] = []

    async def make(**changes: object) -> RedisRegistry:
        settings = RedisSettings(
            url=redis.url, prefix="test", ttl_s=TTL_S, sync_interval_s=SYNC_S, heard_for_s=0.4
        )
        registry = RedisRegistry(replace(settings, **changes))  # type: ignore[arg-type]
        await registry.start()
        registries.append(registry)
        return registry

    yield make
    for registry in registries:
        await registry.close()


def worker(address: str = "", *, epoch: int = 0, **changes: object) -> worker_pb2.RegisterRequest:
    number = next(NAMES)
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "instance_id": f"decode-{number}",
        "role": inference_pb2.WORKER_ROLE_DECODE,
        "address": address or f"10.0.0.1:{number}",
        "fingerprint": "f00d",
        "epoch": epoch,
    }
    return worker_pb2.RegisterRequest(**fields | changes)  # type: ignore[arg-type]


def ids(registry: RedisRegistry) -> list[str]:
    return [record.id for record in registry.workers()]


async def beat(registry: RedisRegistry, *instance_ids: str) -> None:
    for instance_id in instance_ids:
        await registry.heartbeat(instance_id, worker_pb2.WorkerStatus())


async def keep_beating(registry: RedisRegistry, *instance_ids: str, for_s: float) -> None:
    """As living workers do."""
    end = asyncio.get_running_loop().time() + for_s
    while asyncio.get_running_loop().time() < end:
        await beat(registry, *instance_ids)
        await asyncio.sleep(SYNC_S)


async def test_a_worker_that_registers_with_one_router_is_known_to_all(make: Make) -> None:
    one, other = await make(), await make()
    added: list[str] = []
    other.subscribe(
        Listeners(
            added=lambda record: added.append(record.id),
            removed=lambda _: None,
            beat=lambda _: None,
            changed=lambda _: None,
        )
    )
    registration = worker()
    assert await one.register(registration) == ""
    await until(lambda: ids(other) == [registration.instance_id])
    assert added == [registration.instance_id]
    assert other.workers()[0].registration == registration


async def test_a_router_that_starts_later_knows_the_workers_at_once(make: Make) -> None:
    one = await make()
    registration = worker()
    await one.register(registration)
    assert ids(await make()) == [registration.instance_id]


async def test_deployments_in_one_redis_do_not_see_each_other(make: Make) -> None:
    one = await make()
    await one.register(worker())
    assert ids(await make(prefix="another")) == []


async def test_a_worker_that_says_goodbye_leaves_every_list_and_never_returns(make: Make) -> None:
    one, other = await make(), await make()
    registration = worker()
    await one.register(registration)
    await until(lambda: ids(other))
    record = other.workers()[0]
    record.connected = True  # this router still believes in it, and says so
    await one.remove(registration.instance_id, reason="it said so")
    await until(lambda: not ids(other))
    await asyncio.sleep(4 * SYNC_S)
    assert ids(one) == ids(other) == []


async def test_a_silent_worker_leaves_the_shared_list_after_its_time(make: Make) -> None:
    one, other = await make(), await make()
    silent, alive = worker(), worker()
    await one.register(silent)
    await one.register(alive)
    await until(lambda: len(ids(other)) == 2)
    await keep_beating(one, alive.instance_id, for_s=TTL_S + 0.8)
    await until(lambda: ids(other) == ids(one) == [alive.instance_id])


async def test_a_worker_stays_while_any_router_hears_it(make: Make) -> None:
    """The router it registered with dies; another one has a session with it."""
    one, other = await make(), await make()
    registration = worker()
    await one.register(registration)
    await until(lambda: ids(other))
    other.workers()[0].connected = True
    await one.close()
    await asyncio.sleep(TTL_S + 0.5)
    assert ids(other) == [registration.instance_id]
    assert ids(await make()) == [registration.instance_id]


async def test_two_routers_do_not_keep_a_dead_worker_alive_between_them(make: Make) -> None:
    one, other = await make(), await make()
    await one.register(worker())
    await until(lambda: ids(other))
    await until(lambda: not ids(one) and not ids(other), timeout_s=2 * TTL_S + 1.5)


# ---- fencing ----------------------------------------------------------------------------------


async def test_of_two_instances_at_one_address_the_later_one_counts_in_any_order(
    make: Make,
) -> None:
    one, other = await make(), await make()
    older, newer = worker("10.0.0.9:1", epoch=100), worker("10.0.0.9:1", epoch=200)
    assert await one.register(newer) == ""
    assert newer.instance_id in await other.register(older)  # before it could learn of the newer
    await until(lambda: ids(one) == ids(other) == [newer.instance_id])
    assert newer.instance_id in await one.register(older)


async def test_a_restarted_worker_replaces_what_was_at_its_address_everywhere(make: Make) -> None:
    one, other = await make(), await make()
    older, newer = worker("10.0.0.9:1", epoch=100), worker("10.0.0.9:1", epoch=200)
    await one.register(older)
    await until(lambda: ids(other))
    one.workers()[0].connected = True  # its end was not noticed yet
    assert await other.register(newer) == ""
    await until(lambda: ids(one) == ids(other) == [newer.instance_id])
    assert not await one.heartbeat(older.instance_id, worker_pb2.WorkerStatus())
    assert await one.register(older)
    await asyncio.sleep(4 * SYNC_S)
    assert ids(one) == ids(other) == [newer.instance_id]


async def test_without_epochs_the_last_word_counts_once(make: Make) -> None:
    one, other = await make(), await make()
    first, second = worker("10.0.0.9:1"), worker("10.0.0.9:1")
    await one.register(first)
    await other.register(second)
    await until(lambda: ids(one) == ids(other) == [second.instance_id])
    # The one that was replaced is over: routers that believe in it cannot bring it back.
    assert await one.register(first)
    await asyncio.sleep(4 * SYNC_S)
    assert ids(one) == ids(other) == [second.instance_id]


async def test_workers_that_contradict_are_listed_and_every_router_prefers_the_oldest(
    make: Make,
) -> None:
    one = await make()
    late = worker(epoch=900, fingerprint="beef")
    early = worker(epoch=100)
    foreign = worker(epoch=50, protocol_version=PROTOCOL_VERSION + 1)
    assert await one.register(early) == ""
    assert "fingerprint" in await one.register(late)
    assert "protocol version" in await one.register(foreign)
    for registry in (one, await make()):
        unpaired = {r.id: r.incompatible for r in registry.workers() if r.incompatible}
        assert unpaired.keys() == {late.instance_id, foreign.instance_id}
        assert len(ids(registry)) == 3


# ---- Redis goes, and comes back ----------------------------------------------------------------


async def test_without_redis_routers_go_on_with_what_they_know(
    make: Make, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await make(), await make()
    known = worker()
    await one.register(known)
    await until(lambda: ids(other))
    redis.kill()
    await until(lambda: not one.health().up and not other.health().up)
    assert f"127.0.0.1:{redis.port}" in one.health().problem
    newcomer = worker()
    assert await one.register(newcomer) == ""
    await keep_beating(one, known.instance_id, newcomer.instance_id, for_s=TTL_S + 0.5)
    assert ids(one) == [known.instance_id, newcomer.instance_id]
    assert ids(other) == [known.instance_id]
    assert one.sync_age_s() > TTL_S
    assert one.info().up is False
    assert "a secret" not in caplog.text + one.health().problem


async def test_a_redis_that_comes_back_empty_is_filled_again(
    make: Make, redis: RedisServer
) -> None:
    one, other = await make(), await make()
    known, newcomer, gone = worker(), worker(), worker()
    await one.register(known)
    await one.register(gone)
    await until(lambda: len(ids(other)) == 2)
    redis.kill()
    await until(lambda: not one.health().up and not other.health().up)
    await one.register(newcomer)
    await one.remove(gone.instance_id, reason="it said so")
    redis.start()
    beating = asyncio.create_task(
        keep_beating(one, known.instance_id, newcomer.instance_id, for_s=3)
    )
    both = {known.instance_id, newcomer.instance_id}
    await until(lambda: one.health().up and other.health().up)
    await until(lambda: set(ids(one)) == set(ids(other)) == both)
    assert set(ids(await make())) == both
    beating.cancel()


async def test_a_goodbye_while_redis_is_away_is_passed_on_when_it_is_back(
    make: Make, redis: RedisServer
) -> None:
    one, other = await make(), await make()
    registration = worker()
    await one.register(registration)
    await until(lambda: ids(other))
    other.workers()[0].connected = True
    redis.pause()
    await until(lambda: not one.health().up)
    await one.remove(registration.instance_id, reason="it said so")
    redis.resume()
    await until(lambda: not ids(other))
    assert ids(one) == []


async def test_a_redis_that_hangs_delays_a_registration_by_a_second_at_most(
    make: Make, redis: RedisServer
) -> None:
    one = await make()
    redis.pause()
    try:
        async with asyncio.timeout(1.9):  # a worker waits 2 s for its answer
            assert await one.register(worker()) == ""
        assert not one.health().up
        async with asyncio.timeout(1.9):
            assert await one.register(worker()) == ""
        await beat(one, *ids(one))
        assert len(ids(one)) == 2
    finally:
        redis.resume()
    await until(lambda: one.health().up)


async def test_a_router_starts_without_redis(make: Make, redis: RedisServer) -> None:
    redis.kill()
    one = await make()
    assert not one.health().up
    registration = worker()
    assert await one.register(registration) == ""
    redis.start()
    await beat(one, registration.instance_id)
    await until(lambda: one.health().up)
    assert ids(await make()) == [registration.instance_id]


async def test_a_wrong_password_is_told_and_is_no_end(make: Make, redis: RedisServer) -> None:
    one = await make(url=redis.url.replace("a secret", "guessed"))
    assert "password" in one.health().problem
    assert "guessed" not in one.health().problem
    assert await one.register(worker()) == ""


async def test_nothing_stays_in_redis_for_ever(make: Make, redis: RedisServer) -> None:
    one = await make()
    await one.register(worker())
    await one.register(gone := worker())
    await one.remove(gone.instance_id, reason="it said so")
    await until(lambda: one.health().up)
    async with Redis.from_url(redis.url) as client:
        keys = await client.keys("*")
        assert len(keys) == 7
        for key in keys:
            assert 0 < await client.pttl(key) <= 120_000 * TTL_S


async def test_a_list_that_did_not_change_is_not_sent_again(make: Make) -> None:
    one, other = await make(), await make()
    registration = worker()
    await one.register(registration)
    await until(lambda: ids(other))
    await asyncio.sleep(3 * SYNC_S)
    seen: list[WorkerRecord] = other.workers()
    taken: list[object] = []
    other._add = taken.append  # type: ignore[method-assign, assignment]
    await asyncio.sleep(4 * SYNC_S)
    assert taken == []
    assert other.workers() == seen
    await one.register(worker())
    await until(lambda: taken)

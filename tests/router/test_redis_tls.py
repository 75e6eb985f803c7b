"""A registry in a Redis that speaks mutual TLS and nothing else."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from router.registry_redis import RedisRegistry, RedisSettings
from tests.baton.certificates import Authority
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "redis-ca")


@pytest.fixture(scope="module")
def server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    pair = authority.sign("redis", addresses=("127.0.0.1",))
    tls = (pair, authority.certificate)
    with running_redis(tmp_path_factory.mktemp("redis"), password="secret", tls=tls) as server:
        yield server


async def problem_with(url: str) -> str:
    """What a router's registry says of itself with that URL; empty: all is well."""
    registry = RedisRegistry(
        RedisSettings(url=url, prefix="test", ttl_s=1.0, sync_interval_s=0.05, heard_for_s=0.4)
    )
    await registry.start()
    try:
        return registry.health().problem
    finally:
        await registry.close()


async def test_the_url_names_authority_certificate_and_key(
    server: RedisServer, authority: Authority
) -> None:
    router = authority.sign("router")
    files = {
        "ssl_ca_certs": authority.certificate,
        "ssl_certfile": router.certificate,
        "ssl_keyfile": router.key,
    }
    assert await problem_with(f"{server.url}?{urlencode(files)}") == ""


async def test_without_them_the_connection_is_refused_and_no_secret_is_told(
    server: RedisServer, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    for files in (
        {},
        {"ssl_ca_certs": authority.certificate},
        {"ssl_ca_certs": stranger.certificate},
    ):
        problem = await problem_with(f"{server.url}?{urlencode(files)}")
        assert problem, files
        assert "secret" not in problem
    assert await problem_with(server.url.replace("rediss://", "redis://"))

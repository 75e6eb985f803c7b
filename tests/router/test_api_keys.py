"""API keys at both doors: who is let in, whose requests and prefixes are whose, and how many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.baton.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from router import callers
from router.api_keys import ApiKey, KeyFileError, digest_of, draw_key, read_keys, write_keys
from router.callers import Bucket, Caller, CallerLimitError
from tests.router.conftest import Cluster, MakeCluster, request
from tests.router.fakes import Script, expected, until


class KeyRing:
    """A file of keys, and the keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, ApiKey] = {}
        write_keys(path, [])

    def add(self, tenant: str, **fields: Any) -> str:
        key, key_id = draw_key()
        self._known[key] = ApiKey(id=key_id, tenant=tenant, sha256=digest_of(key), **fields)
        write_keys(self.path, self._known.values())
        return key

    def revoke(self, key: str) -> None:
        known = self._known[key]
        self._known[key] = ApiKey(
            id=known.id, tenant=known.tenant, sha256=known.sha256, revoked=True
        )
        write_keys(self.path, self._known.values())


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.yaml")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(cluster: Cluster, key: str | None, **fields: Any) -> list[int]:
    """Token ids of one request at the gRPC door."""
    metadata = (("authorization", f"Bearer {key}"),) if key is not None else None
    ids: list[int] = []
    async for answer in cluster.stub.Generate(request(**fields), metadata=metadata):
        ids += [token.id for token in answer.tokens]
    return ids


def metric(cluster: Cluster, name: str) -> float:
    """The value of one sample of the router's metrics, 0 where it was never counted."""
    for line in cluster.router.metrics.render().decode().splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0


async def test_both_doors_serve_a_key_and_tell_others_how_to_give_one(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    key = ring.add("acme")
    cluster = await make_cluster(api_keys_file=str(ring.path))
    await cluster.pair()
    assert await ask(cluster, key, max_tokens=4) == expected([1, 2, 3], 4)
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True, "seed": 0}
    served = await cluster.http.post("/v1/completions", json=body, headers=bearer(key))
    assert served.json()["choices"][0]["token_ids"] == expected([1, 2, 3], 4)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(cluster, None)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    answer = await cluster.http.post("/v1/completions", json=body)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "Authorization" in error["message"]
    for door in ("grpc", "http"):
        sample = f'baton_auth_failures_total{{door="{door}",reason="missing"}}'
        assert metric(cluster, sample) == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda key: key[:-1] + ("A" if key[-1] != "A" else "B"), "unknown"),
        (lambda key: draw_key()[0], "unknown"),
        (lambda key: "sk-something-else", "malformed"),
        (lambda key: key + "A" * 100_000, "malformed"),
    ],
    ids=["last letter", "another key", "no key of ours", "very long"],
)
async def test_a_wrong_key_is_refused_and_counted(
    make_cluster: MakeCluster, ring: KeyRing, spoil: Callable[[str], str], reason: str
) -> None:
    key = ring.add("acme")
    cluster = await make_cluster(api_keys_file=str(ring.path), max_header_bytes=256 << 10)
    answer = await cluster.http.get("/v1/models", headers=bearer(spoil(key)))
    assert answer.status_code == 401
    assert key not in answer.text
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(cluster, spoil(key))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    for door in ("grpc", "http"):
        sample = f'baton_auth_failures_total{{door="{door}",reason="{reason}"}}'
        assert metric(cluster, sample) == 1


async def test_every_call_but_health_and_metrics_needs_a_key(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    cluster = await make_cluster(api_keys_file=str(ring.path))
    for path in ("/v1/models", "/v1/models/x", "/workers", "/openapi.json", "/nowhere"):
        assert (await cluster.http.get(path)).status_code == 401, path
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert (await cluster.http.post(path, json={})).status_code == 401, path
    assert (await cluster.http.get("/health")).status_code == 503  # there are no workers
    assert (await cluster.http.get("/metrics")).status_code == 200
    asked = [
        cluster.stub.Abort(inference_pb2.AbortRequest()),
        cluster.stub.ListModels(inference_pb2.ListModelsRequest()),
        cluster.stub.GetServerInfo(inference_pb2.GetServerInfoRequest()),
    ]
    for call in asked:
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_workers_are_shown_to_operators_alone(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    user, operator = ring.add("acme"), ring.add("ops", operator=True)
    cluster = await make_cluster(api_keys_file=str(ring.path))
    assert (await cluster.http.get("/workers", headers=bearer(operator))).status_code == 200
    assert (await cluster.http.get("/workers", headers=bearer(user))).status_code == 403
    call = cluster.stub.GetServerInfo(
        inference_pb2.GetServerInfoRequest(), metadata=(("authorization", f"Bearer {user}"),)
    )
    assert await call.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_clients_key_registers_no_worker(make_cluster: MakeCluster, ring: KeyRing) -> None:
    key = ring.add("acme", operator=True)
    cluster = await make_cluster(api_keys_file=str(ring.path))
    assert cluster.ports.workers != cluster.ports.grpc
    call = worker_pb2_grpc.RegistryStub(cluster.channel).Register(
        worker_pb2.RegisterRequest(instance_id="mine"),
        metadata=(("authorization", f"Bearer {key}"),),
    )
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not list(cluster.router.fleet.registry.workers())


async def test_a_revoked_key_is_refused_without_a_restart(
    make_cluster: MakeCluster, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "LOOK_INTERVAL_S", 0.0)
    key = ring.add("acme")
    cluster = await make_cluster(api_keys_file=str(ring.path))
    assert (await cluster.http.get("/v1/models", headers=bearer(key))).status_code == 200
    ring.revoke(key)
    assert (await cluster.http.get("/v1/models", headers=bearer(key))).status_code == 401
    assert metric(cluster, 'baton_auth_failures_total{door="http",reason="revoked"}') == 1
    later = ring.add("acme")
    assert (await cluster.http.get("/v1/models", headers=bearer(later))).status_code == 200
    ring.path.write_text("keys: [")  # a slip of the pen locks nobody out
    assert (await cluster.http.get("/v1/models", headers=bearer(later))).status_code == 200


def salts(worker: Any) -> list[str]:
    return [message.cache_salt for message in worker.kinds("prefill")]


async def test_tenants_have_name_spaces_of_their_own_for_cached_prefixes(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    one, two, other = ring.add("acme"), ring.add("acme"), ring.add("other")
    shared = [ring.add(tenant, prefix_group="open") for tenant in ("a", "b")]
    cluster = await make_cluster(api_keys_file=str(ring.path))
    prefill, decode = await cluster.pair()
    for key in (one, two, other, *shared):
        await ask(cluster, key, max_tokens=2)
    first, second, third, *group = salts(prefill)
    assert first == second, "two keys of a tenant share"
    assert first != third, "two tenants do not"
    assert group[0] == group[1], "unless they say so"
    assert len({first, third, group[0]}) == 3
    assert salts(prefill) == [message.cache_salt for message in decode.kinds("reserve")]


async def test_no_request_names_its_way_into_anothers_prefixes(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    victim, thief = ring.add("acme"), ring.add("other")
    cluster = await make_cluster(api_keys_file=str(ring.path))
    prefill, _ = await cluster.pair()
    await ask(cluster, victim, max_tokens=2)
    (wanted,) = salts(prefill)
    for salt in (wanted, "tenant:acme\n", "\ntenant:acme", ""):
        body = {"prompt": [1, 2, 3], "max_tokens": 2, "cache_salt": salt}
        await cluster.http.post("/v1/completions", json=body, headers=bearer(thief))
    assert len(salts(prefill)) >= 4
    assert wanted not in salts(prefill)[1:]


async def test_a_request_of_another_tenant_cannot_be_ended_or_blocked(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    mine, theirs = ring.add("acme"), ring.add("other")
    cluster = await make_cluster(api_keys_file=str(ring.path))
    await cluster.pair(decode=Script(token_delay_s=0.02))
    metadata = (("authorization", f"Bearer {mine}"),)
    running = cluster.stub.Generate(request(request_id="one", max_tokens=20), metadata=metadata)
    answers = aiter(running)
    ids = [token.id for token in (await anext(answers)).tokens]
    abort = inference_pb2.AbortRequest(request_id="one")
    found = await cluster.stub.Abort(abort, metadata=(("authorization", f"Bearer {theirs}"),))
    assert not found.found
    fields = request(request_id="one", max_tokens=2)
    async for _ in cluster.stub.Generate(fields, metadata=(("authorization", f"Bearer {theirs}"),)):
        pass
    ids += [token.id async for answer in answers for token in answer.tokens]
    assert ids == expected([1, 2, 3], 20)


async def test_a_keys_concurrent_requests_are_bounded_and_come_back(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    key, other = ring.add("acme", max_concurrent_requests=1), ring.add("other")
    cluster = await make_cluster(api_keys_file=str(ring.path))
    await cluster.pair(decode=Script(token_delay_s=0.02))
    metadata = (("authorization", f"Bearer {key}"),)
    running = cluster.stub.Generate(request(max_tokens=30), metadata=metadata)
    await running.read()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(cluster, key)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_concurrent_requests 1" in (refused.value.details() or "")
    assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "1"
    assert await ask(cluster, other, max_tokens=2) == expected([1, 2, 3], 2)
    running.cancel()
    await until(lambda: cluster.router.live == 0)
    assert await ask(cluster, key, max_tokens=2) == expected([1, 2, 3], 2)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(cluster, key, prompt=[100_000])  # a request that fails gives its place back
    assert await ask(cluster, key, max_tokens=2) == expected([1, 2, 3], 2)
    assert metric(cluster, 'baton_rate_limited_total{limit="max_concurrent_requests"}') == 1


async def test_requests_and_tokens_in_a_minute_are_bounded_with_a_hint(
    make_cluster: MakeCluster, ring: KeyRing
) -> None:
    few, little = ring.add("a", requests_per_minute=2), ring.add("b", tokens_per_minute=8)
    cluster = await make_cluster(api_keys_file=str(ring.path))
    await cluster.pair()
    body = {"prompt": [1, 2, 3], "max_tokens": 5}
    for key, served in ((few, 2), (little, 1)):
        for _ in range(served):
            answer = await cluster.http.post("/v1/completions", json=body, headers=bearer(key))
            assert answer.status_code == 200
        answer = await cluster.http.post("/v1/completions", json=body, headers=bearer(key))
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
    for limit in ("requests_per_minute", "tokens_per_minute"):
        assert metric(cluster, f'baton_rate_limited_total{{limit="{limit}"}}') == 1
    answer = await cluster.http.post("/tokenize", json={"prompt": "a"}, headers=bearer(few))
    assert answer.status_code == 429


def test_a_bucket_fills_with_time_and_lends_no_more_than_a_minutes_worth() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    assert bucket.wait_s(60) == 0
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1.0)
    now = 1.0
    assert bucket.wait_s(1) == 0
    bucket.take(101)  # more than there is: the next one waits for it
    assert bucket.wait_s(1) == pytest.approx(101.0)
    now = 10_000.0
    assert bucket.wait_s(61) == pytest.approx(1.0)


def test_a_limit_that_is_changed_in_the_file_counts_from_then_on() -> None:
    key, key_id = draw_key()
    made = ApiKey(id=key_id, tenant="a", sha256=digest_of(key), max_concurrent_requests=1)
    caller = Caller(made)
    caller.enter()
    with pytest.raises(CallerLimitError):
        caller.enter()
    caller.follow(ApiKey(id=key_id, tenant="a", sha256=digest_of(key)))
    caller.enter()


def test_a_file_of_keys_holds_no_key_and_is_for_its_owner(ring: KeyRing) -> None:
    key = ring.add("acme", note="ci")
    assert key not in ring.path.read_text()
    assert key.rpartition("_")[2] not in ring.path.read_text()
    assert ring.path.stat().st_mode & 0o077 == 0
    (kept,) = read_keys(ring.path).values()
    assert kept.opens_with(key)
    assert not kept.opens_with(draw_key()[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [", "not valid YAML"),
        ("- a", "one entry, `keys`"),
        ("keys: [{id: '00000000', tenant: a}]", "sha256 is missing"),
        ("keys: [{id: '00000000', tenant: a, sha256: baton_secret}]", "64 hex digits"),
        ("keys: [{id: 12345678, tenant: a, sha256: x}]", "id must be str"),
        ("keys: [{id: '00000000', tenant: 'a b', sha256: x}]", "tenant must be a name"),
        ("keys: [{id: '00000000', tenat: a, sha256: x}]", "unknown field 'tenat'"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_shows_no_secret(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=message) as refused:
        read_keys(path)
    assert "secret" not in str(refused.value)

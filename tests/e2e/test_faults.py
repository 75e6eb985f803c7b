"""A worker may die, hang or be restarted: the client gets exact tokens or a typed error in 5 s."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from baton import Client
from baton.errors import RequestError, Unavailable
from tests.e2e.cluster import Cluster, running_cluster
from tests.e2e.deaths import kill, ready, replayed, run

LIMIT_S = 5.0
LONG = 800
"""Tokens enough for a request to be alive while something is done to its workers."""


@pytest.fixture(params=["nixl", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(llama: Path, tmp_path: Path, transport: str) -> Iterator[Cluster]:
    with running_cluster(llama, tmp_path, "--transport", transport) as running:
        yield running


@pytest.fixture
def twins(llama: Path, tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(llama, tmp_path, "--prefill", "2", "--decode", "2") as running:
        yield running


def _kill(worker: dict[str, object], number: signal.Signals = signal.SIGKILL) -> None:
    pids = [worker["pid"], *worker["engine_pids"]]  # type: ignore[misc]
    for pid in pids:
        os.kill(int(pid), number)  # type: ignore[call-overload]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killing_the_only_decode_or_prefill_worker_is_a_typed_error(
    cluster: Cluster, role: str
) -> None:
    victim = cluster.worker(role)
    with Client(cluster.grpc) as client:
        stream = client.generate(
            list(range(5, 150)), max_tokens=LONG, ignore_eos=True, temperature=0
        )
        got = len(next(stream).tokens)
        if role == "prefill":
            got += len(next(stream).tokens)  # the second is decode's: its KV has landed
        started = time.monotonic()
        _kill(victim)
        if role == "decode":
            with pytest.raises(Unavailable):
                for _ in stream:
                    pass
            assert time.monotonic() - started < LIMIT_S
        else:
            # The KV has left prefill: nothing of the running request needs it any more.
            assert got + sum(len(chunk.tokens) for chunk in stream) == LONG
        started = time.monotonic()
        with pytest.raises(Unavailable):
            client.complete([5, 6, 7], max_tokens=4, temperature=0)
        assert time.monotonic() - started < LIMIT_S
    cluster.wait_until_balanced()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_hung_worker_is_a_typed_error_within_five_seconds(cluster: Cluster, role: str) -> None:
    victim = cluster.worker(role)
    _kill(victim, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with Client(cluster.grpc) as client, pytest.raises(RequestError):
            client.complete(list(range(5, 100)), max_tokens=8, temperature=0, timeout=20.0)
        assert time.monotonic() - started < LIMIT_S
    finally:
        _kill(victim, signal.SIGCONT)
    cluster.wait_until_ready()
    with Client(cluster.grpc) as client:
        assert (
            len(client.complete([5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True).token_ids)
            == 4
        )
    cluster.wait_until_balanced()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_with_a_spare_worker_a_death_is_not_noticed(twins: Cluster, role: str) -> None:
    prompt, greedy = list(range(5, 140)), {"temperature": 0.0}
    undisturbed = run(twins, prompt, greedy, length=LONG)
    if role == "decode":
        ask = partial(run, twins, prompt, greedy, length=LONG, role=role, after=1)
        replayed(ask, undisturbed)
    else:
        with Client(twins.grpc) as client:
            stream = client.generate(prompt, max_tokens=LONG, ignore_eos=True, **greedy)
            ids = [token.id for token in next(stream).tokens]
            kill(ready(twins, role)[0])
            ids += [token.id for chunk in stream for token in chunk.tokens]
        assert ids == undisturbed.ids
    twins.wait_until_balanced()

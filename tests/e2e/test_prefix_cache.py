"""Cached pages carry the seal of whoever computed them, whatever became of that request."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import Client
from tests.e2e.cluster import Cluster, running_cluster

PAGE = 16


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ("--page-size", str(PAGE), "--chunked-prefill-size", "32")
    with running_cluster(llama, tmp_path_factory.mktemp("prefix"), *flags) as running:
        yield running


def prompt(seed: int) -> list[int]:
    return [5 + (seed * 37 + i * 11) % 300 for i in range(5 * PAGE + 3)]


def check_hit(client: Client, ids: list[int]) -> None:
    answer = client.complete(ids, max_tokens=6, temperature=0, ignore_eos=True)
    assert len(answer.token_ids) == 6
    assert answer.usage.cached_tokens >= 4 * PAGE
    assert answer.report.replays == 0


def test_after_a_request_that_needed_no_decode(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        first = client.complete(prompt(1), max_tokens=1, temperature=0)
        assert first.report.transport == "none"
        check_hit(client, prompt(1))
    cluster.wait_until_balanced()


def test_after_a_request_that_its_first_token_ended(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        token = client.complete(prompt(2)[:-1], max_tokens=1, temperature=0).token_ids[0]
        ended = client.complete(prompt(2)[:-1], max_tokens=6, temperature=0, stop_token_ids=[token])
        assert ended.token_ids == [token]
        assert ended.finish_reason == "stop"
        check_hit(client, prompt(2))
    cluster.wait_until_balanced()


def test_a_second_turn_moves_only_what_decode_does_not_hold(cluster: Cluster) -> None:
    with Client(cluster.grpc) as client:
        first = client.complete(prompt(3), max_tokens=40, temperature=0, ignore_eos=True)
        turn = prompt(3) + first.token_ids + [9, 8, 7]
        second = client.complete(turn, max_tokens=6, temperature=0, ignore_eos=True)
        pages = -(-len(turn) // PAGE)
        page_bytes = first.report.kv_bytes // -(-len(prompt(3)) // PAGE)
        assert second.report.kv_bytes <= (pages - 7) * page_bytes
        assert second.report.replays == 0
        alone = client.complete(turn, max_tokens=6, temperature=0, ignore_eos=True)
        assert alone.token_ids == second.token_ids
    cluster.wait_until_balanced()

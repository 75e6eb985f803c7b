"""Seeded sampling does not depend on the batch, the cache or the chunks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton import Client
from tests.e2e.cluster import running_cluster

PROMPT = list(range(7, 107))
SAMPLING = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "ignore_eos": True}


def test_seeded_sampling_is_the_same_alone_in_a_batch_cached_and_in_other_chunks(
    llama: Path, tmp_path: Path
) -> None:
    draws: list[list[int]] = []
    for chunk in ("32", "4096"):
        directory = tmp_path / chunk
        directory.mkdir()
        flags = ("--page-size", "16", "--chunked-prefill-size", chunk, "--max-total-tokens", "8192")
        with running_cluster(llama, directory, *flags) as cluster, Client(cluster.grpc) as client:
            alone = client.complete(PROMPT, seed=11, **SAMPLING)
            cached = client.complete(PROMPT, seed=11, **SAMPLING)
            assert alone.usage is not None
            assert cached.usage is not None
            assert alone.usage.cached_tokens == 0
            assert cached.usage.cached_tokens >= 80
            with ThreadPoolExecutor(12) as pool:
                batch = list(pool.map(
                    lambda seed: client.complete(PROMPT, seed=seed, **SAMPLING).token_ids,
                    [11, 1, 2, 11, 3, 4, 5, 11, 6, 7, 8, 11],
                ))  # fmt: skip
            draws += [alone.token_ids, cached.token_ids, *(batch[i] for i in (0, 3, 7, 11))]
            assert len({tuple(tokens) for tokens in batch}) > 5, "other seeds draw otherwise"
            cluster.wait_until_balanced()
    assert all(tokens == draws[0] for tokens in draws)


def test_the_router_draws_a_seed_and_tells_it(llama: Path, tmp_path: Path) -> None:
    with running_cluster(llama, tmp_path) as cluster, Client(cluster.grpc) as client:
        first = client.complete(PROMPT, **SAMPLING)
        second = client.complete(PROMPT, **SAMPLING)
        assert first.report is not None
        assert second.report is not None
        assert first.report.seed != second.report.seed
        again = client.complete(PROMPT, seed=first.report.seed, **SAMPLING)
        assert again.token_ids == first.token_ids

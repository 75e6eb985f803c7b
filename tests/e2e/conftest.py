"""Checkpoints and clusters that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint, write_config
from tests.e2e.cluster import Cluster, running_cluster
from tests.forked import forking
from tests.left_out import leave_out

SLOW_CONTEXT = 4096
"""Longest prompt + output of `slow_llama`. Tokens."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, marker="soak", reason="takes up to an hour: make test-soak")


@pytest.fixture(scope="session", autouse=True)
def _forked_processes() -> Iterator[None]:
    """Clusters start in a second; tests/forked.py says how, and what is executed nevertheless."""
    with forking():
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped-query attention and a context of 1,024."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa", seed=1)


@pytest.fixture(scope="session")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose steps take milliseconds, for what must happen in the middle of one."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("slow")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SLOW_CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    write_config(directory, config)
    return directory


@pytest.fixture(scope="module")
def small_memory(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers hold fewer tokens than the model's context."""
    flags = ("--page-size", "16", "--max-total-tokens", "512")
    with running_cluster(llama, tmp_path_factory.mktemp("small"), *flags) as cluster:
        yield cluster

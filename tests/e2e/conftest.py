"""Checkpoints and clusters that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.e2e.cluster import Cluster, running_cluster


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped-query attention and a context of 1,024."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa", seed=1)


@pytest.fixture(scope="module")
def small_memory(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose workers hold fewer tokens than the model's context."""
    flags = ("--page-size", "16", "--max-total-tokens", "512")
    with running_cluster(llama, tmp_path_factory.mktemp("small"), *flags) as cluster:
        yield cluster

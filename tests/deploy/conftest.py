"""The containers of all tests of this folder: set up once, and nothing left behind."""

from collections.abc import Iterator

import pytest

from tests.debian import cache_folder
from tests.deploy.container_engine import Engine, container_engine
from tests.deploy.stack import Stack, build_images, running_stack
from tests.left_out import leave_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(
        config,
        items,
        marker="containers",
        reason="starts containers, for minutes: make test-compose",
    )


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with container_engine(cache_folder("containers")) as running:
        build_images(running)
        yield running


@pytest.fixture(scope="session")
def stack(engine: Engine) -> Iterator[Stack]:
    with running_stack(engine) as running:
        yield running

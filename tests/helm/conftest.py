"""Both Helms, found once."""

import pytest

from tests.debian import cache_folder
from tests.helm.helms import Helm, Helm3, Helm4, find_helm3
from tests.left_out import leave_out

KUBERNETES = ("1.31", "1.34", "1.37")
"""Versions whose schemas every manifest must fit; the newest is the newest that is known."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, marker="helm", reason="downloads and runs Helm: make test-helm")


@pytest.fixture(scope="session")
def helm3() -> Helm3:
    return Helm3(find_helm3(cache_folder()), kube_version=f"{KUBERNETES[0]}.0")


@pytest.fixture(scope="session", params=["helm3", "helm4"])
def helm(request: pytest.FixtureRequest) -> Helm:
    if request.param == "helm4":
        return Helm4()
    found: Helm = request.getfixturevalue("helm3")
    return found

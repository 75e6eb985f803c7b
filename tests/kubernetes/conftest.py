"""A cluster for all tests of this folder: its network, control plane and nodes; nothing stays."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.debian import cache_folder
from tests.helm.helms import find_helm3
from tests.kubernetes.api import Api
from tests.kubernetes.build import programs
from tests.kubernetes.control_plane import ControlPlane, control_plane
from tests.kubernetes.kubelet import Kubelet
from tests.kubernetes.network import private_network
from tests.left_out import leave_out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(
        config,
        items,
        marker="kubernetes",
        reason="builds and runs a Kubernetes API server, for minutes: make test-k8s",
    )


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the Helm that a user has."""

    plane: ControlPlane
    api: Api
    kubelet: Kubelet
    helm: Path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # All that needs the machine's own network comes first.
    built, helm = programs(cache_folder("kubernetes")), find_helm3(cache_folder())
    directory = tmp_path_factory.mktemp("cluster")
    with private_network(), control_plane(built, directory) as plane:
        api = plane.api()
        nodes = directory / "nodes"
        nodes.mkdir()
        kubelet = Kubelet(api.again(), nodes)
        kubelet.start()
        try:
            yield Cluster(plane, api, kubelet, helm)
        finally:
            kubelet.stop()
            api.close()

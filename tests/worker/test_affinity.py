"""What `baton doctor` reads of a machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from worker.affinity import affinity, describe, network_devices

GPU = "0000:1b:00.0"


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], None]:
    """Writes a file of a made-up /sys."""

    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    return write


def test_network_devices_that_are_up_are_listed_with_their_rates(
    tmp_path: Path, put: Callable[[str, str], None]
) -> None:
    put("class/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)")
    put("class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE")
    put("class/infiniband/mlx5_0/device/numa_node", "1")
    put("class/infiniband/mlx5_1/ports/1/rate", "400 Gb/sec (4X NDR)")
    put("class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    put("class/net/eth0/speed", "25000")
    put("class/net/eth0/operstate", "up")
    put("class/net/lo/speed", "-1")
    put("class/net/lo/operstate", "unknown")
    assert network_devices(sysfs=tmp_path) == {"mlx5_0": 50.0, "eth0": 3.125}
    lines = affinity(torch.device("cpu"), sysfs=tmp_path)
    assert "mlx5_0: 50 GB/s, NUMA node 1" in lines
    assert "eth0: 3.125 GB/s" in lines


def test_cores_and_network_devices_of_the_other_socket_are_told(
    tmp_path: Path, put: Callable[[str, str], None]
) -> None:
    put(f"bus/pci/devices/{GPU}/numa_node", "1")
    put("devices/system/node/node1/cpulist", "8-15,24")
    put("class/infiniband/mlx5_0/ports/1/rate", "400 Gb/sec (4X NDR)")
    put("class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE")
    put("class/infiniband/mlx5_0/device/numa_node", "0")
    lines = describe("H200", GPU, range(8), sysfs=tmp_path)
    assert f"H200 at {GPU}, NUMA node 1" in lines
    assert "none of the engine's cores is near its GPU, whose cores are 8-15,24" in lines
    assert "none of the network devices is near its GPU, NUMA node 1" in lines
    put("class/infiniband/mlx5_0/device/numa_node", "1")
    near = describe("H200", GPU, (3, 24), sysfs=tmp_path)
    assert not [line for line in near if line.startswith("none of")]


def test_what_the_system_does_not_tell_is_no_finding(
    tmp_path: Path, put: Callable[[str, str], None]
) -> None:
    put("class/net/eth0/speed", "25000")
    put("class/net/eth0/operstate", "up")
    lines = describe("H200", GPU, range(8), sysfs=tmp_path)
    assert lines == ["8 cores for this engine", f"H200 at {GPU}", "eth0: 3.125 GB/s"]

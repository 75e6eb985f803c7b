"""Where an engine's accelerator, cores and network devices sit: what `baton doctor` says of them.

KV that goes through a network device of the other socket, or is posted by cores of it, is slower
than the link, and nothing else tells.
"""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from kvtransfer.cuda_memory import device_name


def affinity(device: torch.device, *, sysfs: Path = Path("/sys")) -> list[str]:
    """Lines about this process and its accelerator, as `describe` puts them."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if device.type != "cuda":
        return describe("", "", cores, sysfs=sysfs)
    return describe(torch.cuda.get_device_name(device), device_name(device), cores, sysfs=sysfs)


def describe(
    accelerator: str, address: str, cores: Collection[int], *, sysfs: Path = Path("/sys")
) -> list[str]:
    """The cores, the accelerator at its PCI address (both empty: there is none), each network
    device with its rate and NUMA node; lines that begin with "none of" deserve a look."""
    lines = [f"{len(cores)} cores for this engine"] if cores else []
    node = _number(sysfs / "bus/pci/devices" / address / "numa_node") if address else None
    if address:
        lines.append(f"{accelerator} at {address}{_at(node)}")
        near = _read(sysfs / f"devices/system/node/node{node}/cpulist")
        if cores and near and not set(cores) & set(_cpu_list(near)):
            lines.append(f"none of the engine's cores is near its GPU, whose cores are {near}")
    nodes = {name: _node_of(name, sysfs) for name in network_devices(sysfs=sysfs)}
    for name, rate in network_devices(sysfs=sysfs).items():
        lines.append(f"{name}: {rate:g} GB/s{_at(nodes[name])}")
    known = {place for place in nodes.values() if place is not None and place >= 0}
    if node is not None and node >= 0 and known and node not in known:
        lines.append(f"none of the network devices is near its GPU{_at(node)}")
    return lines


def _node_of(network_device: str, sysfs: Path) -> int | None:
    place = sysfs / "class/infiniband" / network_device / "device/numa_node"
    if not place.exists():
        place = sysfs / "class/net" / network_device / "device/numa_node"
    return _number(place)


def network_devices(*, sysfs: Path = Path("/sys")) -> dict[str, float]:
    """Network devices that are up and tell their rate, RDMA's included: nominal GB/s."""
    rates: dict[str, float] = {}
    for port in sorted(sysfs.glob("class/infiniband/*/ports/*")):
        words = _read(port / "rate").split()
        if words and "ACTIVE" in _read(port / "state"):
            rates[port.parent.parent.name] = float(words[0]) / 8
    for net in sorted(sysfs.glob("class/net/*")):
        megabits = _number(net / "speed")
        if megabits is not None and megabits > 0 and _read(net / "operstate") == "up":
            rates[net.name] = megabits / 8e3
    return rates


def _at(node: int | None) -> str:
    return f", NUMA node {node}" if node is not None and node >= 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _cpu_list(text: str) -> list[int]:
    """`0-3,8` as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

"""What `baton doctor` makes of a measurement."""

from baton.doctor import findings
from protos.baton.v1 import worker_pb2


def report(**changes: object) -> worker_pb2.ProbeReport:
    given: dict[str, object] = {
        "prefill_instance": "p",
        "decode_instance": "d",
        "transport": "nixl",
        "bytes": 256 << 20,
        "gigabytes_per_s": 380.0,
        "copy_gigabytes_per_s": 390.0,
        "same_host": True,
        "prefill_device": "0000:1b:00.0",
        "decode_device": "0000:1c:00.0",
        **changes,
    }
    return worker_pb2.ProbeReport(**given)  # type: ignore[arg-type]


def test_a_link_that_is_used_is_well() -> None:
    assert findings(report()) == []


def test_a_fall_back_to_tcp_is_told_with_what_to_do() -> None:
    (here,) = findings(report(gigabytes_per_s=2.5))
    assert "nixl moves 2.50 GB/s, 1 % of a plain copy (390.00)" in here
    assert "cuda_ipc needs one PID namespace" in here
    away = report(
        gigabytes_per_s=2.5, copy_gigabytes_per_s=0.0, network_gigabytes_per_s=50.0, same_host=False
    )
    (between_hosts,) = findings(away)
    assert "5 % of the fastest network device (50.00)" in between_hosts
    assert "fallen back to TCP" in between_hosts


def test_a_small_probe_and_an_unknown_link_are_not_judged() -> None:
    assert findings(report(bytes=1 << 20, gigabytes_per_s=0.1)) == []
    assert findings(report(gigabytes_per_s=0.1, copy_gigabytes_per_s=0.0)) == []


def test_what_was_not_measured_is_said() -> None:
    (line,) = findings(report(error="its landing window is busy; try again"))
    assert line == "p → d: not measured: its landing window is busy; try again"


def test_devices_that_sit_apart_are_told_of_either_side() -> None:
    cores, network = "none of the engine's cores is near its GPU", "none of the network devices is"
    lines = findings(report(facts=["4 cores", cores], decode_facts=[cores, network]))
    assert lines == [f"p: {cores}", f"d: {cores}"]


def test_a_network_device_matters_between_hosts_alone() -> None:
    network = "none of the network devices is near its GPU, NUMA node 1"
    apart = report(decode_facts=[network], same_host=False, copy_gigabytes_per_s=0.0)
    assert findings(apart) == [f"d: {network}"]

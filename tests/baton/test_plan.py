"""What `baton up` decides before it starts anything."""

import socket
from pathlib import Path

import pytest

from baton.config import Scalar, SettingsError
from baton.plan import Plan, count_gpus, make_plan
from baton.processes import child_command, child_secrets
from router.config import RouterConfig


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "my-model"
    path.mkdir()
    return str(path)


def plan(model: str, *, gpus: int = 0, cores: int = 8, **given: Scalar) -> Plan:
    ports: dict[str, Scalar] = {"http_port": 0, "grpc_port": 0}
    return make_plan({"model": model, **ports, **given}, gpus=gpus, cores=cores)


def test_workers_find_the_router_and_the_model(model: str) -> None:
    made = plan(model, prefill=2, decode=1, page_size=16)
    assert [worker.name for worker in made.workers] == ["prefill-0", "prefill-1", "decode-0"]
    assert [worker.role for worker in made.workers] == ["prefill", "prefill", "decode"]
    assert {worker.config.router for worker in made.workers} == {made.grpc_address}
    assert {worker.config.model for worker in made.workers} == {model}
    assert {worker.config.page_size for worker in made.workers} == {16}
    assert {worker.config.port for worker in made.workers} == {0}
    assert made.router.tokenizer == model


def test_one_unified_worker_is_enough_and_has_the_whole_machine(model: str) -> None:
    made = plan(model, prefill=0, decode=0, unified=1, gpus=1)
    (worker,) = made.workers
    assert (worker.name, worker.role) == ("unified-0", "unified")
    assert (worker.config.device_index, worker.config.mem_fraction) == (0, 0.85)
    assert worker.config.threads == 8


def test_unified_workers_may_stand_beside_pairs(model: str) -> None:
    made = plan(model, unified=2, gpus=4)
    assert [worker.role for worker in made.workers] == ["prefill", "decode", "unified", "unified"]
    assert [worker.config.device_index for worker in made.workers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prefill": 0}, "give both, or neither and --unified 1"),
        ({"decode": 0, "unified": 1}, "give both, or neither and --unified 1"),
        ({"prefill": 0, "decode": 0}, "there must be some worker"),
        ({"unified": -1}, "unified must not be negative"),
    ],
)
def test_workers_that_cannot_serve_are_refused(
    model: str, given: dict[str, Scalar], why: str
) -> None:
    with pytest.raises(SettingsError, match=why):
        plan(model, **given)


def test_the_directory_names_the_model_unless_told_otherwise(model: str) -> None:
    assert plan(model).router.served_model_name == "my-model"
    made = plan(model, served_model_name="other")
    assert made.router.served_model_name == "other"
    assert {worker.config.served_model_name for worker in made.workers} == {"other"}


def test_a_shared_setting_reaches_router_and_workers(model: str) -> None:
    made = plan(model, max_queued_requests=7, log_level="debug")
    assert made.router.max_queued_requests == 7
    assert {worker.config.max_queued_requests for worker in made.workers} == {7}
    assert {worker.config.log_level for worker in made.workers} == {"debug"}


def test_free_ports_differ(model: str) -> None:
    made = plan(model)
    assert made.router.grpc_port > 0
    assert made.router.http_port > 0
    assert made.router.grpc_port != made.router.http_port


def test_a_taken_port_is_named_with_its_flag(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SettingsError, match="--http-port"):
            plan(model, http_port=port)


def test_one_port_for_two_doors_is_refused(model: str) -> None:
    port = plan(model).router.grpc_port
    with pytest.raises(SettingsError, match="other door"):
        plan(model, grpc_port=port, http_port=port)


def test_workers_on_all_interfaces_call_the_router_by_loopback(model: str) -> None:
    made = plan(model, grpc_host="0.0.0.0")
    assert made.grpc_address.startswith("127.0.0.1:")
    assert made.workers[0].config.router == made.grpc_address


def test_cores_are_shared(model: str) -> None:
    assert {w.config.threads for w in plan(model, decode=3, cores=8).workers} == {2}
    assert {w.config.threads for w in plan(model, decode=3, cores=1).workers} == {1}
    assert {w.config.threads for w in plan(model, threads=5).workers} == {5}


def test_a_worker_of_several_ranks_takes_neighbouring_gpus(model: str) -> None:
    made = plan(model, prefill=1, decode=2, gpus=5, tensor_parallel_size=2)
    assert [worker.config.device_index for worker in made.workers] == [0, 2, 0]
    assert [worker.config.mem_fraction for worker in made.workers] == [0.425, 0.85, 0.425]
    with pytest.raises(SettingsError, match="tensor_parallel_size: 4 of 2 CUDA devices"):
        plan(model, gpus=2, tensor_parallel_size=4)


def test_gpus_go_round_and_their_memory_is_shared(model: str) -> None:
    made = plan(model, prefill=1, decode=2, gpus=2)
    assert [worker.config.device_index for worker in made.workers] == [0, 1, 0]
    assert [worker.config.mem_fraction for worker in made.workers] == [0.425, 0.85, 0.425]
    assert plan(model, gpus=1, mem_fraction=0.4).workers[0].config.mem_fraction == 0.4


def test_cuda_without_a_device_is_refused_by_name(model: str) -> None:
    with pytest.raises(SettingsError, match="shows no CUDA device"):
        plan(model, device="cuda")


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1), ("0,3", 2), ("-1", 0)])
def test_visible_devices_are_counted(visible: str, count: int) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


@pytest.mark.parametrize(
    "given",
    [{"prefill": 0}, {"decode": -1}, {"stop_timeout_s": 0.0}, {"http_port": 70000}],
)
def test_what_makes_no_sense_is_refused(model: str, given: dict[str, Scalar]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        plan(model, **given)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no directory"):
        plan(str(tmp_path / "nowhere"))


def test_a_password_is_in_no_childs_command_line() -> None:
    config = RouterConfig(redis_url="redis://user:a-password@127.0.0.1:6379/0")
    assert "a-password" not in " ".join(child_command("router", config))
    assert child_secrets(config) == {"BATON_REDIS_URL": config.redis_url}

"""What an engine offers and refuses by name."""

import os
import socket
from collections.abc import Iterator

import pytest
import torch

from kvtransfer.errors import TransportUnavailableError
from kvtransfer.layout import PageLayout
from kvtransfer.shared_memory import anonymous_file
from worker.channel import EngineChannel
from worker.config import WorkerConfig
from worker.rank_memory import make_rank_transports
from worker.transports import TransferMemory, make_transports

LAYOUT = PageLayout(layers=2, page_size=4, kv_heads=2, head_dim=4, itemsize=2)


@pytest.fixture
def memory() -> Iterator[TransferMemory]:
    fds = [anonymous_file(), anonymous_file()]
    yield TransferMemory(
        layout=LAYOUT,
        kv_heads=LAYOUT.kv_heads,
        device=torch.device("cpu"),
        source=None,
        window_slots=4,
        outbox_slots=0,
        window_fd=os.dup(fds[0]),
        outbox_fd=os.dup(fds[1]),
    )
    for fd in fds:
        os.close(fd)


@pytest.fixture
def channel() -> Iterator[EngineChannel]:
    mine, other = socket.socketpair()
    yield EngineChannel(mine, on_closed=lambda: None)
    mine.close()
    other.close()


def test_cuda_ipc_by_name_is_refused_where_there_is_no_gpu(
    memory: TransferMemory, channel: EngineChannel
) -> None:
    with pytest.raises(TransportUnavailableError, match=r"cuda_ipc is not available.*on cpu"):
        make_transports("cuda_ipc", instance_id="d", memory=memory, channel=channel)


def test_cuda_ipc_by_name_is_refused_where_the_ranks_have_no_gpus(
    memory: TransferMemory, channel: EngineChannel
) -> None:
    config = WorkerConfig(model="m", transport="cuda_ipc", tensor_parallel_size=2)
    with pytest.raises(TransportUnavailableError, match=r"cuda_ipc is not available.*on cpu"):
        make_rank_transports(config, instance_id="d", memory=memory, channel=channel, links=[])


def test_on_a_cpu_auto_offers_what_works_there(
    memory: TransferMemory, channel: EngineChannel
) -> None:
    offered = make_transports("auto", instance_id="d", memory=memory, channel=channel)
    assert "cuda_ipc" not in offered.by_name
    assert list(offered.by_name)[-1] == "grpc"
    assert offered.window is not None
    assert offered.window.slots == 4

"""Proof of death: only when every process of a peer has exited may what it wrote be given away."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from protos.baton.v1 import channel_pb2, worker_pb2
from worker.kv_front import DeathWatch


class Link:
    """A front that keeps what it is told."""

    def __init__(self) -> None:
        self.to_engine_: list[channel_pb2.FrontToEngine] = []
        self.peers: list[worker_pb2.PeerState] = []

    def to_engine(self, message: channel_pb2.FrontToEngine) -> None:
        self.to_engine_.append(message)

    def report_peer(self, state: worker_pb2.PeerState, *, remember: bool = False) -> None:
        self.peers.append(state)


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that live until they are killed."""
    wait = "import sys; sys.stdin.read()"
    processes = [
        subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE) for _ in range(2)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


async def looked_around() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)


async def test_a_peer_is_dead_when_the_last_of_its_ranks_has_exited(
    ranks: list[subprocess.Popen[bytes]],
) -> None:
    link, deaths = Link(), DeathWatch()
    deaths.watch("d", [process.pid for process in ranks], link)
    ranks[0].kill()
    ranks[0].wait()
    await looked_around()
    assert not link.to_engine_, "the other rank may still write"
    ranks[1].kill()
    ranks[1].wait()
    async with asyncio.timeout(5):
        while not link.to_engine_:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (message,) = link.to_engine_
    assert message.peer_gone.instance_id == "d"
    assert message.peer_gone.proven_dead
    assert [(state.instance_id, state.connected) for state in link.peers] == [("d", False)]
    deaths.close()


async def test_a_peer_whose_processes_are_gone_already_is_dead_at_once(
    ranks: list[subprocess.Popen[bytes]],
) -> None:
    for process in ranks:
        process.kill()
        process.wait()
    link, deaths = Link(), DeathWatch()
    deaths.watch("d", [process.pid for process in ranks], link)
    assert [message.peer_gone.proven_dead for message in link.to_engine_] == [True]


async def test_a_peer_that_is_forgotten_is_reported_no_more(
    ranks: list[subprocess.Popen[bytes]],
) -> None:
    link, deaths = Link(), DeathWatch()
    deaths.watch("d", [process.pid for process in ranks], link)
    deaths.forget("d")
    for process in ranks:
        process.kill()
        process.wait()
    await looked_around()
    assert not link.to_engine_

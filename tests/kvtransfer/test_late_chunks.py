"""A gRPC writer that is stopped in the middle of a page for longer than its session may be silent,
and then goes on: nothing of it may land, since its slots belong to others by then.

The writer is a real process, stopped by SIGSTOP between two chunks. The guard is that a session
which was reported lost has ended; with a session that goes on reading, the same events do harm.
"""

import asyncio
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from kvtransfer import grpc_session
from kvtransfer.grpc_session import KvSessionClient
from kvtransfer.grpc_stream import CHUNK_BYTES, KvSession, SessionTiming, SlotMemory
from tests.kvtransfer.fronts import Front, Server, info, order, until

TIMING = SessionTiming(heartbeat_s=0.2, silence_s=3.0, handshake_s=20.0, redial_s=0.2)
CHUNKS = 8
SLOT_BYTES = CHUNKS * CHUNK_BYTES
OTHERS = b"\xaa"
"""What the next owner of the slot has put there."""


class StoppingMemory(SlotMemory):
    """Stops its process when the chunk in the middle is read."""

    def read(self, slot: int, offset: int, size: int) -> memoryview:
        if offset == CHUNKS // 2 * CHUNK_BYTES:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().read(slot, offset, size)


def writer_main(pipe: Connection, address: str) -> None:
    """Sends one page, and says when the order was answered."""

    async def run() -> None:
        front = Front()
        outbox = StoppingMemory(memoryview(bytes(SLOT_BYTES)), SLOT_BYTES)
        client = KvSessionClient(
            address=address, info=info("p"), handler=front, outbox=outbox, timing=TIMING
        )
        task = asyncio.create_task(client.run())
        await until(lambda: bool(front.connected), within_s=60)
        client.submit(order(1, (0, 0)))
        await until(lambda: bool(front.written), within_s=60)
        pipe.send(front.written[0])
        client.close()
        await task

    asyncio.run(run())


class DeafSession(KvSession):
    """The guard taken out: tells of the peer's loss, and goes on reading."""

    async def _watch(self) -> str:
        self._handler.peer_lost(self.peer, await super()._watch())
        return await self._wait_closed()


async def write_late() -> bytearray:
    """The window after a stopped writer has gone on, and ended."""
    window = bytearray(SLOT_BYTES)
    front = Front()
    server = Server(front, window=SlotMemory(memoryview(window), SLOT_BYTES), timing=TIMING)
    await server.server.start()
    pipe, there = multiprocessing.Pipe()
    writer = multiprocessing.get_context("spawn").Process(
        target=writer_main, args=(there, server.address)
    )
    writer.start()
    try:
        process = psutil.Process(writer.pid)
        await until(lambda: process.status() == psutil.STATUS_STOPPED, within_s=90)
        await until(lambda: bool(front.lost), within_s=20)
        window[:] = OTHERS * SLOT_BYTES
        process.send_signal(signal.SIGCONT)
        end = time.monotonic() + 30
        while not pipe.poll() and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert pipe.poll(), "the writer's order was not answered"
    finally:
        writer.kill()
        writer.join()
        await server.stop()
    return window


async def test_a_late_chunk_reaches_no_slot_of_another_request() -> None:
    assert await write_late() == OTHERS * SLOT_BYTES


async def test_with_a_session_that_outlives_its_loss_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_session, "KvSession", DeafSession)
    assert await write_late() != OTHERS * SLOT_BYTES

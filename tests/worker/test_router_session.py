"""A router's session ends with its router, however that one goes: its requests must not stay."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from protos.baton.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from worker import service
from worker.service import RouterSession, WorkerService

SILENCE_S = 0.4


class FakeFront:
    """Notes what the service tells it."""

    instance_id = "decode-1"

    def __init__(self) -> None:
        self.sessions: list[RouterSession] = []
        self.closed: list[RouterSession] = []
        self.messages: list[worker_pb2.RouterMessage] = []

    def on_session_opened(self, session: RouterSession) -> worker_pb2.WorkerHello:
        self.sessions.append(session)
        return worker_pb2.WorkerHello(instance_id=self.instance_id)

    def on_router_message(self, session: RouterSession, message: worker_pb2.RouterMessage) -> None:
        self.messages.append(message)

    def on_session_closed(self, session: RouterSession) -> None:
        self.closed.append(session)

    async def status(self) -> worker_pb2.WorkerStatus:
        return worker_pb2.WorkerStatus()

    def drain(self) -> None: ...


@pytest.fixture
def front() -> FakeFront:
    return FakeFront()


@pytest.fixture
async def stub(front: FakeFront) -> AsyncIterator[worker_pb2_grpc.WorkerStub]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(front, silence_s=SILENCE_S), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.WorkerStub(channel)
    await server.stop(0)


async def _until_closed(front: FakeFront) -> None:
    async with asyncio.timeout(5.0):
        while not front.closed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert front.closed == front.sessions


def _hello() -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(
        hello=worker_pb2.SessionHello(
            router_id="r", protocol_version=PROTOCOL_VERSION, instance_id=FakeFront.instance_id
        )
    )


def _ping() -> worker_pb2.RouterMessage:
    return worker_pb2.RouterMessage(ping=worker_pb2.Ping(nonce=1))


async def test_a_router_that_says_nothing_is_gone(
    front: FakeFront, stub: worker_pb2_grpc.WorkerStub
) -> None:
    call = stub.Session()
    await call.write(_hello())
    assert (await call.read()).HasField("hello")
    await _until_closed(front)
    assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]


async def test_a_router_that_pings_stays(
    front: FakeFront, stub: worker_pb2_grpc.WorkerStub
) -> None:
    call = stub.Session()
    await call.write(_hello())
    for _ in range(8):
        await call.write(_ping())
        await asyncio.sleep(SILENCE_S / 4)
    assert not front.closed
    call.cancel()
    await _until_closed(front)


async def test_a_router_that_does_not_read_is_cut_off_though_a_write_is_stuck(
    front: FakeFront, stub: worker_pb2_grpc.WorkerStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_SESSION_BACKLOG", 50)
    call = stub.Session()
    await call.write(_hello())
    assert (await call.read()).HasField("hello")
    tokens = [inference_pb2.Token(index=i, id=i) for i in range(10_000)]
    outputs = [worker_pb2.RequestOutput(request_id="x", tokens=tokens)]
    step = worker_pb2.WorkerMessage(step=worker_pb2.StepOutput(step=1, outputs=outputs))
    for _ in range(400):
        front.sessions[0].send(step)
        await call.write(_ping())  # it lives, it just does not read
        await asyncio.sleep(0)
        if front.closed:
            break
    await _until_closed(front)
    call.cancel()


async def test_what_was_queued_before_a_close_is_still_said(
    front: FakeFront, stub: worker_pb2_grpc.WorkerStub
) -> None:
    call = stub.Session()
    await call.write(_hello())
    await call.read()
    session = front.sessions[0]
    for nonce in range(5):
        session.send(worker_pb2.WorkerMessage(pong=worker_pb2.Pong(nonce=nonce)))
    session.close()
    session.send(worker_pb2.WorkerMessage(pong=worker_pb2.Pong(nonce=99)))
    said = []
    while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        said.append(message.pong.nonce)
    assert said == [0, 1, 2, 3, 4]
    await _until_closed(front)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"instance_id": "decode-0"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"protocol_version": 99}, grpc.StatusCode.FAILED_PRECONDITION),
        (None, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_session_that_begins_wrong_never_opens(
    front: FakeFront,
    stub: worker_pb2_grpc.WorkerStub,
    change: dict[str, object] | None,
    status: grpc.StatusCode,
) -> None:
    first = _ping()
    if change is not None:
        first = _hello()
        for name, value in change.items():
            setattr(first.hello, name, value)
    call = stub.Session()
    await call.write(first)
    assert await call.code() == status
    assert not front.sessions

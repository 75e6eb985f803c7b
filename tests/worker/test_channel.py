"""The engine's end of the channel: messages arrive whole and in order, however slow the reader."""

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from protos.baton.v1 import channel_pb2
from worker.channel import EngineChannel

Ends = tuple[EngineChannel, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    mine, theirs = socket.socketpair()
    channel = EngineChannel(mine, on_closed=lambda: None)
    channel.start()
    yield channel, theirs
    theirs.close()


def told(theirs: socket.socket) -> str:
    stream = theirs.makefile("rb", buffering=0)
    (size,) = struct.unpack("<I", _exactly(stream.read, 4))
    return channel_pb2.EngineToFront.FromString(_exactly(stream.read, size)).progress


def _exactly(read: object, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += read(size - len(data))  # type: ignore[operator]
    return data


def test_what_the_socket_takes_is_written_by_who_says_it(ends: Ends) -> None:
    channel, theirs = ends
    with channel._out_ready:  # nobody else may write
        channel.send(channel_pb2.EngineToFront(progress="at once"))
        theirs.settimeout(5.0)
        assert told(theirs) == "at once"


def test_messages_of_several_threads_arrive_whole_and_each_threads_in_order(ends: Ends) -> None:
    channel, theirs = ends
    count, padding = 400, "x" * 3000  # more than a socket holds

    def say(name: str) -> None:
        for index in range(count):
            channel.send(channel_pb2.EngineToFront(progress=f"{name} {index} {padding}"))

    threads = [threading.Thread(target=say, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive(), "nobody waits for the reader"
    heard: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(2 * count):
        name, index, rest = told(theirs).split(" ")
        assert rest == padding
        heard[name].append(int(index))
    assert heard == {"a": list(range(count)), "b": list(range(count))}


def test_closing_writes_what_was_said(ends: Ends) -> None:
    channel, theirs = ends
    for index in range(300):
        channel.send(channel_pb2.EngineToFront(progress=f"{index} " + "x" * 3000))
    closing = threading.Thread(target=channel.close)
    closing.start()
    assert [int(told(theirs).split(" ")[0]) for _ in range(300)] == list(range(300))
    closing.join(5.0)
    assert not closing.is_alive()

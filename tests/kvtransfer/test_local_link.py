"""Message sockets between the engines of one host."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kvtransfer.errors import TransportError
from kvtransfer.local_link import LinkAddress, LocalLinks


class End:
    """Links whose arrivals are kept."""

    def __init__(self) -> None:
        self.links = LocalLinks()
        self.woken = threading.Event()
        self.links.bind(self.woken.set)
        self.seen: list[tuple[str, bytes | None]] = []

    def wait_for(self, count: int, within_s: float = 10.0) -> list[tuple[str, bytes | None]]:
        end = time.monotonic() + within_s
        while len(self.seen) < count and time.monotonic() < end:
            self.woken.wait(0.2)
            self.woken.clear()
            self.seen += self.links.receive()
        return self.seen


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    dialler, listener = End(), End()
    yield dialler, listener
    dialler.links.close()
    listener.links.close()


def test_messages_go_both_ways_in_order_and_whole(ends: tuple[End, End]) -> None:
    dialler, listener = ends
    listener.links.expect("p", dialler.links.address)
    dialler.links.dial("d", listener.links.address)
    sent = [b"x" * size for size in (1, 70_000, 3)]
    for message in sent:
        dialler.links.send("d", message)
    assert listener.wait_for(3) == [("p", message) for message in sent]
    listener.links.send("p", b"back")
    assert dialler.wait_for(1) == [("d", b"back")]


def test_who_dials_before_being_expected_is_joined_when_it_is(ends: tuple[End, End]) -> None:
    dialler, listener = ends
    dialler.links.dial("d", listener.links.address)
    time.sleep(0.05)
    listener.links.expect("p", dialler.links.address)
    dialler.links.send("d", b"late")
    assert listener.wait_for(1) == [("p", b"late")]


def test_a_stranger_without_the_token_is_turned_away(ends: tuple[End, End]) -> None:
    dialler, listener = ends
    mine, theirs = dialler.links.address, listener.links.address
    listener.links.expect("p", mine)
    dialler.links.dial("d", LinkAddress(theirs.name, "guess", theirs.pid))
    assert dialler.wait_for(1) == [("d", None)]
    assert not listener.links.receive()
    with pytest.raises(TransportError):
        listener.links.send("p", b"to nobody")


def test_an_offer_cannot_speak_for_another_process(ends: tuple[End, End]) -> None:
    dialler, listener = ends
    theirs = listener.links.address
    with pytest.raises(TransportError, match="listens where 1 should"):
        dialler.links.dial("d", LinkAddress(theirs.name, theirs.token, 1))
    listener.links.expect("p", LinkAddress("", dialler.links.address.token, 1))
    dialler.links.dial("d", theirs)
    dialler.links.send("d", b"not from process 1")
    time.sleep(0.1)
    with pytest.raises(TransportError):
        listener.links.send("p", b"unknown")


PEER = """
import sys, time
from kvtransfer.local_link import LinkAddress, LocalLinks
links = LocalLinks()
links.dial("d", LinkAddress(sys.argv[1], sys.argv[2], int(sys.argv[3])))
mine = links.address
print(mine.token, flush=True)
time.sleep(60)
"""


def test_a_killed_peer_is_noticed_and_one_that_stands_still_blocks_nobody() -> None:
    end = End()
    address = end.links.address
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, address.name, address.token, str(address.pid)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        token = process.stdout.readline().strip()
        end.links.expect("p", LinkAddress("", token, process.pid))
        deadline = time.monotonic() + 10
        while True:  # its hello may still be on the way
            try:
                end.links.send("p", b"hello")
                break
            except TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(TransportError):
            _fill(end.links, "p", deadline)
        process.kill()
        assert end.wait_for(1) == [("p", None)]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        end.links.close()


def _fill(links: LocalLinks, peer: str, deadline: float) -> None:
    while time.monotonic() < deadline:
        links.send(peer, b"x" * 10_000)

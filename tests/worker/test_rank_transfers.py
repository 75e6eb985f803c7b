"""Pages between workers of several ranks, each rank's writes and windows behind a link of its own:
NIXL and host memory, everything but the models and their processes."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from kvtransfer.errors import TransportError
from kvtransfer.geometry import KvGeometry, RankPlace, rank_heads
from kvtransfer.group_transport import GroupTransport
from kvtransfer.layout import PageLayout
from kvtransfer.nixl_transport import NixlTransport, unavailable_reason
from kvtransfer.transport import MessageArrived, PeerLost, TransportEvent, WriteDone, WriteFailed
from worker.rank_kv import RankKv
from worker.rank_link import Kind, RankLink
from worker.rank_transfers import LinkedRank, RankTransfers
from worker.rank_windows import RankWindows

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())

HEADS = 4
PAGES, SLOTS = 6, 8
WITHIN_S = 10.0


def layout_of(tp_size: int) -> PageLayout:
    return PageLayout(layers=2, page_size=4, kv_heads=HEADS // tp_size, head_dim=8, itemsize=4)


class Side:
    """A worker's transports: the leading rank's here, the others' on threads of their own."""

    def __init__(self, name: str, tp_size: int, *, sends: bool) -> None:
        self.tp_size, self.layout = tp_size, layout_of(tp_size)
        generator = torch.Generator().manual_seed(tp_size)
        shape = (PAGES, self.layout.page_bytes)
        self.pools = [
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            for _ in range(tp_size)
        ]
        self.windows = [
            RankWindows(0 if sends else SLOTS, lambda _: self._window()) for _ in range(tp_size)
        ]
        transports = [
            NixlTransport(
                instance_id=f"{name}/{rank}",
                pool=self.pools[rank] if sends else None,
                landing=None if sends else self.windows[rank].open(0),
            )
            for rank in range(tp_size)
        ]
        self._stack = ExitStack()
        for transport in transports:
            self._stack.callback(transport.close)
        self.transports = transports
        self._stop = threading.Event()
        followers = [self._follow(rank, transports[rank]) for rank in range(1, tp_size)]
        self.ranks = [LinkedRank(link) for link in followers]
        self.transport = GroupTransport(
            transports[0],
            [rank.writer("nixl") for rank in self.ranks],
            kv_heads=HEADS,
            piece_bytes=self.layout.page_bytes,
        )
        self.events: list[TransportEvent] = []

    def _window(self) -> torch.Tensor:
        return torch.zeros((SLOTS, self.layout.page_bytes), dtype=torch.uint8)

    def _follow(self, rank: int, transport: NixlTransport) -> RankLink:
        mine, theirs = (RankLink(end, on_closed=lambda: None) for end in socket.socketpair())
        place = RankPlace(layout=self.layout, kv_heads=HEADS, rank=rank, tp_size=self.tp_size)
        transfers = RankTransfers(
            theirs,
            RankKv(self.pools[rank], place),
            transports={"nixl": transport},
            windows=self.windows[rank],
            outbox=None,
            outbox_offset=None,
        )

        def obey() -> None:
            while not self._stop.is_set():
                transfers.step()

        def stop() -> None:
            mine.send(Kind.DISCONNECT, json.dumps({"peers": []}).encode())  # so that it looks
            thread.join()
            mine.close()
            theirs.close()

        thread = threading.Thread(target=obey)
        thread.start()
        self._stack.callback(stop)
        return mine

    def close(self) -> None:
        self._stop.set()
        self._stack.close()

    def poll(self) -> None:
        self.events += self.transport.poll()

    def replace(self, first_slot: int) -> bytes:
        """All ranks' further window, and how it is written."""
        return self.transport.open_landing(first_slot, self.windows[0].open(first_slot))


class Joined:
    """A writer that is connected to a reader."""

    def __init__(self, writer: Side, reader: Side) -> None:
        self.writer, self.reader = writer, reader
        writer.transport.connect("d", reader.transport.local_offer())
        reader.transport.connect("p", writer.transport.local_offer())
        theirs = KvGeometry(page_size=writer.layout.page_size, tp_size=writer.tp_size)
        self.pages = [
            RankPlace(
                layout=reader.layout, kv_heads=HEADS, rank=rank, tp_size=reader.tp_size
            ).writer_pages(theirs, slot_bytes=reader.layout.page_bytes)
            for rank in range(reader.tp_size)
        ]
        self.run = self.pages[0].slots
        """Slots that a page takes."""

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            assert time.monotonic() < deadline, (self.writer.events, self.reader.events)
            self.writer.poll()
            self.reader.poll()
            time.sleep(0.001)

    def hand_over(self, copies: list[tuple[int, int]], message: bytes) -> None:
        self.writer.events.clear()
        write = self.writer.transport.write("d", copies, message)
        self.until(lambda: self.writer.events)
        assert self.writer.events == [WriteDone(write)]
        self.until(lambda: MessageArrived("p", message) in self.reader.events)

    def holds(self, first_slot: int, page: int, slot: int) -> bool:
        """Whether each rank of the reader has, in that slot, every piece with heads of its own."""
        size = self.writer.layout.page_bytes
        found = []
        for rank, pages in enumerate(self.pages):
            heads = rank_heads(HEADS, rank=rank, tp_size=self.reader.tp_size)
            memory = self.reader.windows[rank].open(first_slot).view(-1)
            begin = (slot - first_slot) * self.reader.layout.page_bytes
            for piece in pages.pieces:
                if set(piece.heads) & set(heads):
                    landed = memory[begin + piece.offset :][:size]
                    found.append(torch.equal(landed, self.writer.pools[piece.rank][page]))
        return bool(found) and all(found)


@pytest.fixture(params=[(1, 2), (2, 1), (2, 2), (4, 2)], ids="{0[0]}to{0[1]}".format)
def joined(request: pytest.FixtureRequest) -> Iterator[Joined]:
    theirs, mine = request.param
    sides = Side("p", theirs, sends=True), Side("d", mine, sends=False)
    yield Joined(*sides)
    for side in sides:
        side.close()


def test_every_rank_gets_the_pieces_with_its_heads_before_the_message(joined: Joined) -> None:
    joined.hand_over([(3, 0), (1, joined.run)], b"pages")
    assert joined.holds(0, 3, 0)
    assert joined.holds(0, 1, joined.run)


def test_the_windows_of_all_ranks_are_replaced_together(joined: Joined) -> None:
    copies = [(2, SLOTS)]
    with pytest.raises(TransportError, match="outside the windows"):
        joined.writer.transport.write("d", copies, b"too early")
    offer = joined.reader.replace(SLOTS)
    joined.writer.transport.connect_landing("d", SLOTS, offer)
    joined.writer.transport.connect_landing("d", SLOTS, offer)
    joined.hand_over([(2, SLOTS), (5, SLOTS + joined.run)], b"new")
    assert joined.holds(SLOTS, 2, SLOTS)
    assert joined.holds(SLOTS, 5, SLOTS + joined.run)
    assert not any(windows.open(0).any() for windows in joined.reader.windows)
    # what was granted in the old window may still be written there
    joined.hand_over([(4, 0)], b"old")
    assert joined.holds(0, 4, 0)


def test_handles_are_counted(joined: Joined) -> None:
    before = joined.writer.transport.handles()
    assert before > 0, "a prepared list of the peer's window"
    joined.hand_over([(0, 0)], b"pages")
    assert joined.writer.transport.handles() == before


def test_a_rank_that_cannot_write_fails_the_write_when_all_have_ended() -> None:
    writer, reader = Side("p", 2, sends=True), Side("d", 2, sends=False)
    try:
        joined = Joined(writer, reader)
        writer.ranks[0].writer("nixl").disconnect(["d/1"])
        write = writer.transport.write("d", [(0, 0)], b"pages")
        joined.until(lambda: writer.events)
        assert [type(event) for event in writer.events] == [WriteFailed]
        assert writer.events[0] == WriteFailed(write, "NIXL has no landing window of peer d/1")
        assert not any(isinstance(event, MessageArrived) for event in reader.events)
    finally:
        writer.close()
        reader.close()


def test_a_rank_without_room_for_a_window_says_so() -> None:
    reader = Side("d", 2, sends=False)
    try:
        with pytest.raises(TransportError, match="no landing window of slots 3"):
            reader.ranks[0].writer("nixl").open_landing(3)
    finally:
        reader.close()


def test_the_transports_of_a_rank_are_told_by_name() -> None:
    reader = Side("d", 2, sends=False)
    try:
        assert reader.ranks[0].transports() == ["nixl"]
    finally:
        reader.close()


@pytest.mark.parametrize("joined", [(2, 2)], ids=["2to2"], indirect=True)
def test_a_rank_that_cannot_reach_its_peer_any_more_says_so(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each later request would be computed, and then fail at that rank's write."""
    follower = joined.writer.transports[1]
    events: list[TransportEvent] = [PeerLost("d/1", "the link is down")]

    def poll() -> list[TransportEvent]:
        found, events[:] = events[:], []
        return found

    monkeypatch.setattr(follower, "poll", poll)
    joined.writer.ranks[0].tell(Kind.DISCONNECT, transport="nixl", peers=[])  # so that it looks
    joined.until(lambda: joined.writer.events)
    assert joined.writer.events == [PeerLost("d", "the link is down")]

"""cuda_ipc between real processes on real GPUs: bytes, and a kill on either side while copies are
under way."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from kvtransfer.cuda_memory import allocate_window, export_window, open_window
from kvtransfer.errors import TransportError
from tests.kvtransfer.ipc_peers import LAYOUT, PAGES, reader_main, writer_main

pytestmark = pytest.mark.gpu


class Process:
    """One side, as its test sees it."""

    def __init__(self, main: Callable[[Connection, int], None], device: int) -> None:
        self._pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=main, args=(there, device)
        )
        self.process.start()
        there.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))

    def expect(self, name: str, within_s: float = 60.0) -> Any:
        assert self._pipe.poll(within_s), f"no {name} within {within_s} s"
        kind, value = self._pipe.recv()
        assert kind == name, (kind, value)
        return value

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def pairs() -> list[tuple[int, int]]:
    """(writer's GPU, reader's): two GPUs, and one that both share."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [(0, 1), (0, 0)] if count > 1 else [(0, 0)]


@pytest.fixture(scope="module", params=pairs(), ids="{0[0]}to{0[1]}".format)
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Process, Process, Process, Process]]:
    """Two writers and two readers, since tests at the end kill one of each."""
    first, second = request.param
    started = (
        Process(writer_main, first),
        Process(reader_main, second),
        Process(writer_main, first),
        Process(reader_main, second),
    )
    offers = [process.expect("offer", 120) for process in started]
    writer, reader, other_writer, other_reader = started
    for end in (reader, other_reader):
        for name, offer in (("w", offers[0]), ("v", offers[2])):
            end.ask("connect", name, offer)
            end.expect("connected")
    for end in (writer, other_writer):
        for name, offer in (("r", offers[1]), ("s", offers[3])):
            end.ask("connect", name, offer)
            end.expect("connected")
    yield started
    for process in started:
        process.end()


def hand_over(writer: Process, reader: Process, peer: str, pages: list[int]) -> None:
    writer.ask("write", peer, pages)
    assert writer.expect("ended") == ("done", "")
    sums = writer.expect("sums")
    reader.ask("messages", 1)
    assert reader.expect("messages") == [b"pages"]
    reader.ask("landed", len(pages))
    assert reader.expect("landed") == (sums, 0)


def test_exactly_the_pages_land_and_the_message_comes_after_them(sides: Any) -> None:
    writer, reader, _, _ = sides
    hand_over(writer, reader, "r", [3])
    hand_over(writer, reader, "r", [5, 1, 0, 6, 7, 8])
    hand_over(writer, reader, "r", list(range(PAGES)))


def test_layers_that_left_early_and_the_rest_make_whole_pages(sides: Any) -> None:
    writer, reader, _, _ = sides
    writer.ask("write_parts", "r", [2, 4])
    assert writer.expect("ended") == (("done", ""), ("done", ""))
    sums = writer.expect("sums")
    reader.ask("messages", 2)
    assert reader.expect("messages") == [b"early", b"rest"]
    reader.ask("landed", 2)
    assert reader.expect("landed") == (sums, 0)


def test_pages_leave_behind_the_kernels_that_fill_them(sides: Any) -> None:
    writer, reader, _, _ = sides
    writer.ask("write_behind", "r", [2, 4, 5])
    busy, ends = writer.expect("ended")
    assert not busy, "what waits for the device is not looked for"
    assert ends == [("done", ""), ("done", "")]
    sums = writer.expect("sums")
    reader.ask("landed", 3)
    assert reader.expect("landed") == (sums, 0)


def test_a_writer_survives_the_death_of_the_reader_under_its_copies(sides: Any) -> None:
    writer, reader, _, other_reader = sides
    writer.ask("storm", "r", 1.5)
    writer.expect("storming")
    time.sleep(0.4)
    reader.process.kill()
    reader.process.join()
    done, failed, lost = writer.expect("stormed")
    assert done > 0, "nothing was written before the kill"
    assert failed > 0, "nothing was under way after the kill"
    assert lost
    hand_over(writer, other_reader, "s", [9, 10])


def test_a_reader_survives_the_death_of_the_writer_in_its_copies(sides: Any) -> None:
    writer, _, other_writer, reader = sides
    other_writer.ask("die", "s")
    other_writer.process.join(20)
    assert other_writer.process.exitcode == -9
    reader.ask("gone", "v")
    assert reader.expect("lost") == ["v"]
    reader.ask("messages", 0)
    reader.expect("messages")
    hand_over(writer, reader, "s", [11, 12])


def test_a_window_that_shares_its_allocation_is_not_handed_out() -> None:
    big = torch.zeros((4, 1 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(TransportError, match="allocation of its own"):
        export_window(big[1:])


def test_a_window_of_this_very_process_is_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    handle = export_window(allocate_window(1, LAYOUT.page_bytes, device))
    with pytest.raises(TransportError):
        open_window(handle, device)

"""NIXL between real processes: bytes, and what happens when one of them is killed."""

import time
from collections.abc import Iterator

import pytest
import torch

from kvtransfer.errors import TransportError
from kvtransfer.nixl_transport import NixlTransport, unavailable_reason
from tests.kvtransfer.nixl_peers import LAYOUT, SLOTS, decode_main, prefill_main
from tests.kvtransfer.nixl_processes import Process, begin, join, slots_of

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason())


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Process, Process, Process]]:
    """One prefill and two decode processes; each test uses up one."""
    started = (
        Process(prefill_main, "p"),
        Process(decode_main, "d1"),
        Process(decode_main, "d2"),
    )
    yield started
    for process in started:
        process.end()


def test_bytes_arrive_and_the_sender_survives_the_death_of_the_receiver(
    processes: tuple[Process, Process, Process],
) -> None:
    prefill, decode, _ = processes
    join(prefill, decode)
    for request, pages in (("a", 3), ("b", 40)):
        sent = begin(prefill, decode, request, pages * LAYOUT.page_size)
        first_token, total_bytes, received = decode.expect("completed")
        assert received == sent
        assert first_token == 42
        assert total_bytes == pages * LAYOUT.page_bytes
        assert prefill.expect("released") == request
    assert slots_of(decode) == (SLOTS, 0, 0)

    decode.tell("die_after_pages", 9)
    begin(prefill, decode, "c", 40 * LAYOUT.page_size)
    decode.process.join(10)
    assert decode.process.exitcode == -9
    started = time.monotonic()
    # between writes NIXL says nothing of a dead target: the session's end does
    prefill.tell("gone", ("d1", True))
    failure, quiesced = prefill.expect("failed", 5)
    while not quiesced:
        failure, quiesced = prefill.expect("failed", 5)
    assert failure == "TRANSPORT"
    assert time.monotonic() - started < 5


def test_the_receiver_survives_the_death_of_the_writer_and_gets_its_slots_back(
    processes: tuple[Process, Process, Process],
) -> None:
    # this prefill has seen its first decode die; it serves the next one all the same
    prefill, _, decode = processes
    join(prefill, decode)
    sent = begin(prefill, decode, "d", 5 * LAYOUT.page_size)
    assert decode.expect("completed")[2] == sent
    prefill.tell("die_after_more_bytes", 8 * LAYOUT.page_bytes)
    begin(prefill, decode, "e", 60 * LAYOUT.page_size)
    prefill.process.join(10)
    assert prefill.process.exitcode == -9
    started = time.monotonic()
    decode.tell("gone", ("p", False))
    assert decode.expect("failed", 5)[0] == "TRANSPORT"
    assert time.monotonic() - started < 5
    _, granted, quarantined = slots_of(decode)
    assert granted == 0
    assert quarantined > 0
    decode.tell("gone", ("p", True))
    end = time.monotonic() + 5
    while slots_of(decode) != (SLOTS, 0, 0):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert decode.stop() == 0


# ---- within one process: what a peer's offer may claim ------------------------------------------


@pytest.fixture
def sides() -> Iterator[tuple[NixlTransport, NixlTransport]]:
    pool = torch.zeros((4, LAYOUT.page_bytes), dtype=torch.uint8)
    window = torch.zeros((2, LAYOUT.page_bytes), dtype=torch.uint8)
    prefill = NixlTransport(instance_id="p", pool=pool, landing=None)
    decode = NixlTransport(instance_id="d", pool=None, landing=window)
    yield prefill, decode
    prefill.close()
    decode.close()


def test_prefills_offer_exposes_no_memory(sides: tuple[NixlTransport, NixlTransport]) -> None:
    prefill, decode = sides
    assert b"window" not in prefill.local_offer()
    assert b"DRAM" not in prefill.local_offer().partition(b"\0")[0]
    decode.connect("p", prefill.local_offer())
    with pytest.raises(TransportError):
        decode.write("p", [(0, 0)], b"")


@pytest.mark.parametrize("offer", [b"", b"{}", b"[]\0x", b'{"agent": "d"}\0junk'])
def test_an_offer_that_makes_no_sense_is_refused(
    sides: tuple[NixlTransport, NixlTransport], offer: bytes
) -> None:
    with pytest.raises(TransportError):
        sides[0].connect("d", offer)


def test_a_window_of_other_pages_or_beyond_the_registered_memory_is_refused(
    sides: tuple[NixlTransport, NixlTransport],
) -> None:
    prefill, decode = sides
    offer = decode.local_offer()
    smaller = offer.replace(f", {LAYOUT.page_bytes}, ".encode(), b", 4096, ", 1)
    beyond = offer.replace(b", 2]}", b", 9]}", 1)
    for claim in (smaller, beyond):
        assert claim != offer
        with pytest.raises(TransportError):
            prefill.connect("d", claim)


def test_a_slot_outside_the_window_is_never_posted(
    sides: tuple[NixlTransport, NixlTransport],
) -> None:
    prefill, decode = sides
    decode.connect("p", prefill.local_offer())
    prefill.connect("d", decode.local_offer())
    for copies in ([(0, 2)], [(4, 0)], [(-1, 0)], []):
        with pytest.raises(TransportError):
            prefill.write("d", copies, b"")
    assert not prefill.busy()


def test_a_part_of_each_page_lands_at_its_place_and_touches_nothing_else() -> None:
    pool = torch.randint(1, 256, (4, LAYOUT.page_bytes), dtype=torch.uint8)
    window = torch.zeros((3, LAYOUT.page_bytes), dtype=torch.uint8)
    prefill = NixlTransport(instance_id="p", pool=pool, landing=None)
    decode = NixlTransport(instance_id="d", pool=None, landing=window)
    decode.connect("p", prefill.local_offer())
    prefill.connect("d", decode.local_offer())
    expected = window.clone()
    cut = 2 * LAYOUT.row_bytes
    for part in ((0, cut), (cut, LAYOUT.page_bytes)):
        prefill.write("d", [(3, 0), (1, 2)], b"note", part=part)
        end = time.monotonic() + 10
        while prefill.busy():
            assert time.monotonic() < end
            prefill.poll()
            decode.poll()
        for page, slot in ((3, 0), (1, 2)):
            expected[slot, part[0] : part[1]] = pool[page, part[0] : part[1]]
        assert torch.equal(window, expected)
    with pytest.raises(TransportError):
        prefill.write("d", [(0, 0)], b"", part=(0, LAYOUT.page_bytes + 1))
    prefill.close()
    decode.close()


def test_a_further_window_is_written_beside_the_first(
    sides: tuple[NixlTransport, NixlTransport],
) -> None:
    """Under a registration of its own; what was granted in the first may still be written."""
    prefill, decode = sides
    decode.connect("p", prefill.local_offer())
    prefill.connect("d", decode.local_offer())
    assert prefill._pool is not None
    assert decode.landing is not None
    prefill._pool.random_(1, 256)
    further = torch.zeros((3, LAYOUT.page_bytes), dtype=torch.uint8)
    offer = decode.open_landing(2, further)
    with pytest.raises(TransportError, match="outside"):
        prefill.write("d", [(0, 2)], b"")
    prefill.connect_landing("d", 2, offer)
    prefill.connect_landing("d", 2, offer)
    for copies in ([(3, 4), (1, 2)], [(0, 1)]):
        prefill.write("d", copies, b"note")
        end = time.monotonic() + 10
        while prefill.busy():
            assert time.monotonic() < end
            prefill.poll()
            decode.poll()
    assert torch.equal(further[[2, 0]], prefill._pool[[3, 1]])
    assert torch.equal(decode.landing[1], prefill._pool[0])
    assert not further[1].any()
    assert not decode.landing[0].any()
    with pytest.raises(TransportError, match="outside"):
        prefill.write("d", [(0, 1), (1, 2)], b"")  # of two windows
    with pytest.raises(TransportError):
        prefill.connect_landing("d", 5, prefill.local_offer())

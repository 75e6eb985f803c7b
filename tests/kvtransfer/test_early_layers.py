"""Layers that leave before their page is whole: nothing is lost, mixed up or held back by it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.fake_transport import Fault, FaultKind
from kvtransfer.states import TransferFailure
from kvtransfer.transfer_thread import MIN_POLL_S
from tests.kvtransfer.pair import LAYOUT, PREFILL, Pair

FIRST_LAYER = range(1)
LAST_LAYER = range(1, 2)
LAYER_BYTES = 2 * LAYOUT.row_bytes


class Mark:
    """An event of a device that passes it when the test says so."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


def make(**settings: object) -> Pair:
    pair = Pair(**settings)  # type: ignore[arg-type]
    pair.step()
    return pair


def compute_last_layer(pair: Pair, pages: list[int], seed: int = 5) -> None:
    """What the step writes after the first layer has left."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(pages), LAYOUT.page_bytes - LAYER_BYTES)
    pair.source[pages, LAYER_BYTES:] = torch.randint(
        0, 256, size, dtype=torch.uint8, generator=generator
    )


def finish(pair: Pair, tokens: int, pages: list[int]) -> None:
    compute_last_layer(pair, pages)
    pair.prefill.push("r", pair.sealed(pages, tokens))
    pair.prefill.complete("r", 7)


def begin(pair: Pair, tokens: int, pages: list[int]) -> None:
    pair.prefill.open(pair.grant("r", tokens))
    pair.prefill.push_layers("r", list(enumerate(pages)), FIRST_LAYER)


def nothing_is_left(pair: Pair) -> bool:
    return (
        pair.prefill.held_pages() == {}
        and not pair.prefill.stats().sending
        and not pair.decode.stats().receiving
        and pair.window.counts().free == pair.window.slots
    )


def test_the_first_layer_is_there_before_the_page_is_announced() -> None:
    pair = make(slots=16)
    pages = [3, 9, 4]
    begin(pair, 11, pages)
    pair.run(5)
    assert pair.prefill.thread.sender.early.sent == 3
    landed = {bytes(slot[:LAYER_BYTES].tolist()) for slot in pair.window.memory}
    assert {bytes(pair.source[page, :LAYER_BYTES].tolist()) for page in pages} <= landed
    assert "r" not in pair.positions, "nothing is announced yet"
    finish(pair, 11, pages)
    pair.run(20)
    assert pair.completed("r")
    assert pair.identical("r", 11, pages)
    assert nothing_is_left(pair)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 60),
    slots=st.integers(1, 8),
    early=st.integers(0, 15),
    rounds=st.integers(0, 6),
)
def test_any_part_may_leave_early_through_any_window(
    tokens: int, slots: int, early: int, rounds: int
) -> None:
    pair = make(slots=slots)
    pages = list(range(2, 2 + LAYOUT.pages_of(tokens)))
    pair.prefill.open(pair.grant("r", tokens))
    # Later pages first: they may take the slots that the ones before them need.
    pair.prefill.push_layers("r", list(enumerate(pages))[-early:] if early else [], FIRST_LAYER)
    pair.run(rounds)
    finish(pair, tokens, pages)
    pair.run(200)
    assert pair.completed("r")
    assert pair.identical("r", tokens, pages)
    assert nothing_is_left(pair)


def test_a_page_that_was_computed_anew_elsewhere_leaves_whole() -> None:
    pair = make(slots=4)
    begin(pair, 8, [3, 4])
    pair.run(3)
    finish(pair, 8, [3, 12])
    pair.run(20)
    assert pair.completed("r")
    assert pair.identical("r", 8, [3, 12])
    assert nothing_is_left(pair)


def test_early_pages_are_held_until_an_abort_has_ended_their_writes() -> None:
    pair = make(slots=4, faults=(Fault(FaultKind.DELAY, PREFILL, nth=1, polls=8),))
    begin(pair, 8, [3, 4])
    pair.step()
    pair.prefill.abort("r", TransferFailure.ABORTED, "the client left")
    pair.step()
    assert sorted(pair.prefill.held_pages()["r"]) == [3, 4]
    pair.expire()
    assert not pair.completed("r")
    assert nothing_is_left(pair)


def assert_whole_or_failed(pair: Pair, tokens: int, pages: list[int]) -> None:
    """Every byte is there, or both sides know that it is not; no slot is granted any more."""
    if pair.completed("r"):
        assert pair.identical("r", tokens, pages)
    else:
        assert pair.failures("prefill")
        assert pair.failures("decode") or pair.decode.stats().failures
    assert not pair.decode.stats().receiving
    counts = pair.window.counts()
    assert counts.granted == 0
    assert counts.free + counts.quarantined == counts.total


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("kind", list(FaultKind))
def test_a_fault_costs_the_transfer_or_nothing(kind: FaultKind, nth: int) -> None:
    pair = make(slots=4, faults=(Fault(kind, PREFILL, nth=nth),))
    pages = [3, 9, 4, 8, 7]
    begin(pair, 18, pages)
    pair.run(2)
    finish(pair, 18, pages)
    pair.run(40)
    pair.expire()
    assert_whole_or_failed(pair, 18, pages)


# ---- queued behind the step that computes them ---------------------------------------------------


def launch(pair: Pair, tokens: int, pages: list[int]) -> tuple[Mark, Mark]:
    """A step is on its way: each layer is to leave when the device has passed its mark."""
    marks = Mark(), Mark()
    pair.prefill.open(pair.grant("r", tokens))
    for layers, mark in zip((FIRST_LAYER, LAST_LAYER), marks, strict=True):
        event: Any = mark
        pair.prefill.push_behind("r", list(enumerate(pages)), layers, event)
    return marks


def end_step(pair: Pair, tokens: int, pages: list[int], marks: tuple[Mark, Mark]) -> None:
    marks[0].passed = True
    pair.run(2)
    compute_last_layer(pair, pages)
    marks[1].passed = True


def announce(pair: Pair, tokens: int, pages: list[int]) -> None:
    pair.prefill.push("r", pair.sealed(pages, tokens))
    pair.prefill.complete("r", 7)


def test_pages_leave_when_the_device_has_computed_them_and_count_when_they_are_announced() -> None:
    pair = make(slots=16)
    pages = [3, 9, 4]
    marks = launch(pair, 11, pages)
    pair.run(5)
    assert not pair.window.memory.any(), "the device has not come to them yet"
    end_step(pair, 11, pages, marks)
    pair.run(3)
    landed = {bytes(slot.tolist()) for slot in pair.window.memory}
    assert {bytes(pair.source[page].tolist()) for page in pages} <= landed
    assert "r" not in pair.positions, "nothing is announced yet"
    started = pair.network.started[PREFILL]
    announce(pair, 11, pages)
    pair.run(20)
    assert pair.network.started[PREFILL] == started + 2, "one announcement, and the end"
    assert pair.completed("r")
    assert pair.identical("r", 11, pages)
    assert nothing_is_left(pair)


def test_a_step_that_takes_longer_than_the_lease_is_no_silence() -> None:
    pair = make(slots=16, lease_s=2.0)
    marks = launch(pair, 11, [3, 9, 4])
    pair.run(40, seconds=0.2)
    assert not pair.failures("prefill")
    end_step(pair, 11, [3, 9, 4], marks)
    announce(pair, 11, [3, 9, 4])
    pair.run(20)
    assert pair.completed("r")
    assert nothing_is_left(pair)


def test_pages_that_a_step_still_fills_are_held_until_their_writes_have_ended() -> None:
    pair = make(slots=4)
    marks = launch(pair, 8, [3, 4])
    pair.step()
    pair.prefill.abort("r", TransferFailure.ABORTED, "the client left")
    pair.run(5)
    assert sorted(pair.prefill.held_pages()["r"]) == [3, 4]
    assert pair.window.counts().free < pair.window.slots
    end_step(pair, 8, [3, 4], marks)
    pair.run(5)
    assert not pair.completed("r")
    assert nothing_is_left(pair)


def test_a_page_that_changed_after_it_was_sealed_where_it_left_is_refused() -> None:
    pair = make(slots=4)
    marks = launch(pair, 8, [3, 4])
    end_step(pair, 8, [3, 4], marks)
    sealed = pair.sealed([3, 4], 8)
    pair.source[4, LAYER_BYTES] ^= 1
    pair.run(3)
    pair.prefill.push("r", sealed)
    pair.prefill.complete("r", 7)
    pair.run(20)
    assert not pair.completed("r")
    assert [event.failure for event in pair.failures("prefill")][-1] is TransferFailure.MISMATCH
    assert nothing_is_left(pair)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 60), slots=st.integers(1, 8), rounds=st.integers(0, 6))
def test_what_finds_no_credit_behind_its_step_leaves_later(
    tokens: int, slots: int, rounds: int
) -> None:
    pair = make(slots=slots)
    pages = list(range(2, 2 + LAYOUT.pages_of(tokens)))
    marks = launch(pair, tokens, pages)
    pair.run(rounds)
    end_step(pair, tokens, pages, marks)
    announce(pair, tokens, pages)
    pair.run(200)
    assert pair.completed("r")
    assert pair.identical("r", tokens, pages)
    assert nothing_is_left(pair)


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("kind", list(FaultKind))
def test_a_fault_behind_a_step_costs_the_transfer_or_nothing(kind: FaultKind, nth: int) -> None:
    pair = make(slots=4, faults=(Fault(kind, PREFILL, nth=nth),))
    pages = [3, 9, 4, 8, 7]
    marks = launch(pair, 18, pages)
    pair.run(2)
    end_step(pair, 18, pages, marks)
    announce(pair, 18, pages)
    pair.run(40)
    pair.expire()
    assert_whole_or_failed(pair, 18, pages)


# ---- behind the step that computes them, where only the host can start a write -------------------


def test_the_host_sends_layers_on_when_it_sees_that_the_device_has_them() -> None:
    pair = make(slots=16, writes_behind=False)
    pages = [3, 9, 4]
    marks = launch(pair, 11, pages)
    pair.run(5)
    assert not pair.window.memory.any(), "the device has not come to them yet"
    assert pair.prefill.thread.sender.early.awaiting
    marks[0].passed = True
    pair.run(3)
    landed = {bytes(slot[:LAYER_BYTES].tolist()) for slot in pair.window.memory}
    assert {bytes(pair.source[page, :LAYER_BYTES].tolist()) for page in pages} <= landed
    assert not pair.window.memory[:, LAYER_BYTES:].any(), "the last layers leave with the page"
    end_step(pair, 11, pages, marks)
    announce(pair, 11, pages)
    pair.run(20)
    assert pair.prefill.stats().early_layers_sent == 3
    assert pair.completed("r")
    assert pair.identical("r", 11, pages)
    assert nothing_is_left(pair)


def test_pages_that_are_whole_before_the_host_has_looked_leave_once() -> None:
    """With credit to spare, which the look would spend on them again."""
    pair = make(slots=16, writes_behind=False)
    pages, mark = [3, 9, 4, 8], Mark()
    event: Any = mark
    pair.prefill.open(pair.grant("r", 16))
    pair.prefill.push_behind("r", list(enumerate(pages[:2])), FIRST_LAYER, event)
    pair.step()
    mark.passed = True
    sealed = pair.sealed(pages, 16)
    pair.prefill.push("r", sealed[:2])
    pair.run(5)
    assert pair.prefill.stats().early_layers_sent == 0
    assert not pair.prefill.thread.sender.early.awaiting
    pair.prefill.push("r", sealed[2:])
    pair.prefill.complete("r", 7)
    pair.run(20)
    assert pair.completed("r")
    assert pair.identical("r", 16, pages)
    assert nothing_is_left(pair)


def test_the_transfer_thread_looks_often_while_layers_are_awaited_and_not_otherwise() -> None:
    pair = make(slots=16, writes_behind=False)
    pair.network.members[PREFILL].polled = False  # as gRPC: nothing else asks it to look
    pair.prefill.open(pair.grant("r", 8))
    pair.step()
    thread = pair.prefill.thread
    assert thread._pause(MIN_POLL_S) > MIN_POLL_S
    event: Any = Mark()
    pair.prefill.push_behind("r", [(0, 3), (1, 4)], FIRST_LAYER, event)
    pair.step()
    assert thread._pause(MIN_POLL_S) == MIN_POLL_S


def test_the_next_chunks_layers_are_awaited_while_the_chunk_before_leaves() -> None:
    pair = make(slots=16, writes_behind=False)
    pages, event = [3, 9, 4], Mark()
    pair.prefill.open(pair.grant("r", 12))
    sealed = pair.sealed(pages, 12)
    later: Any = event
    pair.prefill.push_behind("r", [(2, pages[2])], FIRST_LAYER, later)
    pair.prefill.push("r", sealed[:2])
    pair.run(5)
    assert pair.prefill.thread.sender.early.awaiting
    event.passed = True
    pair.run(3)
    assert pair.prefill.stats().early_layers_sent == 1
    pair.prefill.push("r", sealed[2:])
    pair.prefill.complete("r", 7)
    pair.run(20)
    assert pair.completed("r")
    assert pair.identical("r", 12, pages)
    assert nothing_is_left(pair)


def test_a_page_that_changes_after_the_host_has_sent_its_first_layers_is_refused() -> None:
    pair = make(slots=4, writes_behind=False)
    marks = launch(pair, 8, [3, 4])
    end_step(pair, 8, [3, 4], marks)
    sealed = pair.sealed([3, 4], 8)
    pair.source[4, 0] ^= 1
    pair.prefill.push("r", sealed)
    pair.prefill.complete("r", 7)
    pair.run(20)
    assert not pair.completed("r")
    assert [event.failure for event in pair.failures("prefill")][-1] is TransferFailure.MISMATCH
    assert nothing_is_left(pair)


def test_layers_of_a_transfer_that_has_ended_are_not_sent_on() -> None:
    pair = make(slots=4, writes_behind=False)
    marks = launch(pair, 8, [3, 4])
    pair.step()
    pair.prefill.abort("r", TransferFailure.ABORTED, "the client left")
    pair.run(5)
    for mark in marks:
        mark.passed = True
    pair.run(5)
    assert not pair.window.memory.any()
    assert not pair.prefill.thread.sender.early.awaiting
    assert nothing_is_left(pair)

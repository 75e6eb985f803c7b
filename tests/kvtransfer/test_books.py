"""The landing window's books, the table of transitions, tickets and shared memory."""

import gc
import os
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import NoSlotsError
from kvtransfer.shared_memory import SharedMemory, recv_fds, send_fds
from kvtransfer.states import TRANSITIONS, TransferFailure, TransferState, Trigger, advance
from kvtransfer.ticket import Ticket
from kvtransfer.window import LandingWindow
from protos.baton.v1 import kv_pb2
from protos.errors import ErrorCode


@given(st.lists(st.tuples(st.sampled_from("grqt"), st.integers(0, 5)), max_size=40))
def test_every_slot_is_always_in_exactly_one_state(steps: list[tuple[str, int]]) -> None:
    window = LandingWindow(torch.zeros((6, 8), dtype=torch.uint8))
    owners: dict[int, set[int]] = {}
    for owner, (action, number) in enumerate(steps):
        if action == "g":
            try:
                slots, epoch = window.grant(number, owner)
            except NoSlotsError:
                assert window.counts().free == 0
                continue
            assert epoch == window.epoch
            assert not any(set(slots) & other for other in owners.values())
            owners[owner] = set(slots)
        elif owners:
            chosen = list(owners)[number % len(owners)]
            if action == "r":
                window.release(owners.pop(chosen), chosen)
            elif action == "q":
                window.quarantine(owners[chosen], chosen)
            else:
                owners[chosen] |= set(window.top_up(1, chosen))
        counts = window.counts()
        assert counts.free + counts.granted + counts.quarantined == counts.total == 6
        assert counts.free == 6 - sum(len(slots) for slots in owners.values())


@given(st.lists(st.tuples(st.sampled_from("grqt"), st.integers(0, 5)), max_size=40))
def test_runs_of_slots_stay_together_and_never_overlap(steps: list[tuple[str, int]]) -> None:
    window = LandingWindow(torch.zeros((13, 8), dtype=torch.uint8))
    owners: dict[int, set[int]] = {}

    def every(owner: int) -> set[int]:
        run = 1 + owner % 4
        return {slot for first in owners[owner] for slot in range(first, first + run)}

    for owner, (action, number) in enumerate(steps):
        if action == "g":
            try:
                owners[owner] = set(window.grant(number, owner, run=1 + owner % 4)[0])
            except NoSlotsError:
                continue
        elif owners:
            chosen = list(owners)[number % len(owners)]
            if action == "r":
                window.release(owners.pop(chosen), chosen)
            elif action == "q":
                window.quarantine(owners[chosen], chosen)
            else:
                owners[chosen] |= set(window.top_up(1, chosen, run=1 + chosen % 4))
        held = [every(owner) for owner in owners]
        taken = set().union(*held)
        assert sum(len(slots) for slots in held) == len(taken)
        assert taken <= set(range(13))
        assert window.counts().free == 13 - len(taken)


def test_a_slot_cannot_be_given_back_by_another_ticket_or_twice() -> None:
    window = LandingWindow(torch.zeros((2, 8), dtype=torch.uint8))
    slots, _ = window.grant(1, 7)
    with pytest.raises(ValueError):
        window.release(set(slots), 8)
    window.release(set(slots), 7)
    with pytest.raises(ValueError):
        window.release(set(slots), 7)


def test_states_only_move_up_and_failed_absorbs() -> None:
    for (state, _), following in TRANSITIONS.items():
        assert following >= state
    for trigger in Trigger:
        assert advance(TransferState.FAILED, trigger) is None
        assert advance(TransferState.COMPLETE, trigger) is None


@pytest.mark.parametrize("state", [TransferState.RESERVED, TransferState.RECEIVING])
def test_a_transfer_advances_and_never_goes_back(state: TransferState) -> None:
    assert advance(state, Trigger.PAGES) is TransferState.RECEIVING
    assert advance(state, Trigger.ALL_ACCEPTED) is TransferState.COMPLETE
    assert advance(state, Trigger.FAILURE) is TransferState.FAILED


def test_every_failure_on_the_wire_has_a_name_and_a_code() -> None:
    for name, value in kv_pb2.TransferFailure.items():
        if value:
            failure = TransferFailure.from_wire(value)
            assert failure.to_wire() == name
            assert isinstance(failure.code, ErrorCode)
    assert TransferFailure.from_wire(999) is TransferFailure.TRANSPORT
    assert TransferFailure.MISMATCH.code is ErrorCode.DATA_LOSS


def test_a_ticket_survives_the_wire() -> None:
    ticket = Ticket(
        ticket_id=2**63,
        instance_id="d",
        epoch=3,
        request_id="r",
        writer_instance="p",
        slots=(4, 1),
        lease_s=2.5,
        decode_prefix_len=64,
        total_tokens=100,
        token_hash=b"h",
        transport="nixl",
    )
    data = ticket.to_proto().SerializeToString()
    assert Ticket.from_proto(kv_pb2.Ticket.FromString(data)) == ticket


def test_memory_passed_over_a_socket_is_the_same_memory() -> None:
    here, there = socket.socketpair()
    with here, there, SharedMemory.create(4096) as memory:
        tensor = memory.tensor(4, 1024)
        send_fds(here, [memory.fd], b"4096")
        payload, (fd,) = recv_fds(there, 1, 16)
        assert fd != memory.fd
        with SharedMemory.attach(fd, int(payload)) as other:
            other.view[5] = 99
        assert tensor[0, 5] == 99
        del tensor


def test_shared_memory_is_mapped_as_long_as_something_reads_it() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:baton-kv")

    before = mapped()
    memory = SharedMemory.create(4 << 20)
    view, tensor = memory.view, memory.tensor(2, 1 << 20)
    memory.close()
    view[1 << 20] = 7
    del view
    gc.collect()
    assert tensor[1, 0] == 7
    assert mapped() == before + 1
    del tensor
    gc.collect()
    assert mapped() == before


def test_shared_memory_that_is_too_small_is_refused() -> None:
    with SharedMemory.create(100) as memory:
        fd = os.dup(memory.fd)
        with pytest.raises(ValueError):
            SharedMemory.attach(fd, 101)
        os.close(fd)


def test_a_closed_channel_gives_no_descriptors() -> None:
    one, two = socket.socketpair()
    with one, two:
        one.close()
        with pytest.raises(ConnectionError):
            recv_fds(two, 1)

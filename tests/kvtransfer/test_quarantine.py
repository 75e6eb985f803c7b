"""What a silent writer may keep, and what becomes of the landing window then."""

import pytest
import torch

from kvtransfer.errors import (
    NoSlotsError,
    SilentWriterError,
    TransportError,
    TransportUnavailableError,
)
from kvtransfer.events import PagesLanded
from kvtransfer.fake_transport import Fault, FaultKind
from kvtransfer.states import TransferFailure
from kvtransfer.windows import QuarantinePolicy
from tests.kvtransfer.pair import DECODE, PREFILL, Pair

POLICY = QuarantinePolicy()
PATIENCE_S = POLICY.refuse_after_s + 0.5
SLOTS = 8
"""Of which a ticket gets a quarter."""


def make(**settings: object) -> Pair:
    pair = Pair(slots=SLOTS, **settings)  # type: ignore[arg-type]
    pair.step()
    return pair


def fall_silent(pair: Pair, *, tickets: int) -> None:
    """Prefill stops, as with SIGSTOP, while it holds so many tickets; decode withdraws them all."""
    for number in range(tickets):
        pair.prefill.open(pair.grant(f"silent-{number}", 16))
    pair.run(3)
    for number in range(tickets):
        pair.decode.release(f"silent-{number}")
    decode_alone(pair, PATIENCE_S)


def decode_alone(pair: Pair, seconds: float) -> None:
    for _ in range(int(seconds / 0.1)):
        pair.clock.now += 0.1
        pair.decode.thread.step()


def test_a_writer_that_does_not_answer_gets_no_further_ticket_until_it_does() -> None:
    pair = make()
    fall_silent(pair, tickets=1)
    assert pair.decode.stats().slots.quarantined == 2
    with pytest.raises(SilentWriterError, match=PREFILL):
        pair.grant("next", 4)
    pair.run(5, seconds=0.5)
    assert pair.decode.stats().slots.quarantined == 0
    pair.hand_over("next", 4, [1])
    pair.run(10)
    assert pair.completed("next")


def test_a_writer_that_answers_at_once_is_not_refused_for_an_abort() -> None:
    pair = make()
    for number in range(20):
        pair.prefill.open(pair.grant(f"r{number}", 16))
        pair.run(2)
        pair.decode.release(f"r{number}")
        pair.run(2)
    assert pair.decode.stats().slots.free == SLOTS
    assert pair.decode.stats().window_replacements == 0


def test_a_window_that_silent_writers_keep_is_replaced_and_what_runs_ends_in_the_old_one() -> None:
    pair = make()
    running = pair.grant("running", 24)
    pair.prefill.open(running)
    pages = [1, 2, 3, 4, 5, 6]
    pair.prefill.push("running", pair.sealed(pages[:1], 24))
    pair.run(3)
    fall_silent(pair, tickets=3)
    stats = pair.decode.stats()
    assert stats.window_replacements == 1
    assert stats.slots.quarantined == 6, "counted, though the window they lie in was replaced"
    assert stats.slots.free == SLOTS
    assert stats.slots.total == SLOTS + stats.slots.quarantined + stats.slots.granted
    # prefill continues: what began in the old window ends there
    pair.prefill.push("running", pair.sealed(pages, 24)[1:])
    pair.prefill.complete("running", 7)
    pair.run(60)
    assert pair.completed("running")
    assert pair.identical("running", 24, pages)
    assert pair.decode.stats().slots.quarantined == 0
    assert pair.decode.stats().slots.total == SLOTS


def test_new_tickets_are_for_the_new_window_once_their_writer_can_write_there() -> None:
    pair = make()
    fall_silent(pair, tickets=3)
    pair.decode.peer_gone(PREFILL, "stopped", proven_dead=True)
    decode_alone(pair, 0.5)
    pair.decode.peer_connected(PREFILL, "fake", PREFILL.encode())
    pair.decode.thread.step()
    with pytest.raises(NoSlotsError, match="not yet connected"):
        pair.grant("early", 16)
    pair.run(5)
    ticket = pair.grant("r", 16)
    assert min(ticket.slots) >= SLOTS
    pair.prefill.open(ticket)
    pair.prefill.push("r", pair.sealed([4, 5, 6, 7], 16))
    pair.prefill.complete("r", 3)
    pair.run(30)
    assert pair.completed("r")
    assert pair.identical("r", 16, [4, 5, 6, 7])
    landed = [e for e in pair.decode_events if isinstance(e, PagesLanded)]
    assert all(event.window is not pair.window.memory for event in landed)


def test_a_late_write_reaches_the_old_window_and_no_slot_of_another_request() -> None:
    """The write is under way when decode gives the ticket up, and lands long after."""
    pair = make(faults=(Fault(FaultKind.DELAY, PREFILL, 3, polls=200),))
    for number in range(3):
        pair.prefill.open(pair.grant(f"late-{number}", 16))
    pair.prefill.push("late-0", pair.sealed([0, 1], 16)[:2])
    pair.prefill.thread.step()
    for number in range(3):
        pair.decode.release(f"late-{number}")
    decode_alone(pair, PATIENCE_S)
    assert pair.decode.stats().window_replacements == 1
    kept = pair.decode.stats().slots.quarantined
    decode_alone(pair, 20)
    assert pair.window.memory.any(), "the write has landed, where it was granted"
    assert pair.decode.stats().slots.quarantined == kept
    pair.run(20)
    assert pair.decode.stats().slots.quarantined == 0


def test_windows_are_bounded_and_a_clean_one_is_used_again() -> None:
    pair = make()
    for _ in range(5):
        fall_silent(pair, tickets=3)
        pair.run(20, seconds=0.1)
        assert pair.decode.stats().slots.total == SLOTS
    assert pair.decode.stats().window_replacements == 5
    assert len(pair.network.members[DECODE]._opened) == 1


def test_where_every_window_is_kept_requests_wait_or_are_refused() -> None:
    pair = make(more_windows=False)
    fall_silent(pair, tickets=4)
    assert pair.decode.stats().window_replacements == 0
    assert pair.decode.stats().slots.free == 0
    pair.decode.peer_connected("prefill-2", "fake", b"prefill-2")
    with pytest.raises((SilentWriterError, NoSlotsError)):
        pair.grant("next", 4)


def test_a_window_that_cannot_be_opened_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without room, say: another try would take the other ranks' memory once more."""
    pair = make()
    tried: list[int] = []

    def open_landing(first_slot: int, memory: torch.Tensor) -> bytes:
        tried.append(first_slot)
        raise TransportError("rank 1 has no room")

    monkeypatch.setattr(pair.network.members[DECODE], "open_landing", open_landing)
    fall_silent(pair, tickets=3)
    decode_alone(pair, 5)
    assert tried == [SLOTS]
    assert pair.decode.stats().window_replacements == 0
    pair.run(20)
    pair.hand_over("next", 4, [1])
    pair.run(10)
    assert pair.completed("next")


def test_a_decode_whose_device_has_no_room_for_another_window_goes_on() -> None:
    tried: list[int] = []

    def make_memory(number: int) -> torch.Tensor:
        tried.append(number)
        raise TransportUnavailableError("the driver has no memory left")

    pair = make()
    assert pair.decode._windows is not None
    pair.decode._windows._make_memory = make_memory
    fall_silent(pair, tickets=3)
    decode_alone(pair, 5)
    assert tried == [1]
    pair.run(20)
    pair.hand_over("next", 4, [1])
    pair.run(10)
    assert pair.completed("next")


# ---- heartbeats ------------------------------------------------------------------------------


def test_a_decode_that_is_heard_may_take_longer_than_the_lease() -> None:
    """Its scheduler is in a long step, and credits nothing; its heartbeats go on."""
    pair = make()
    pair.prefill.open(pair.grant("r", 32))
    pair.prefill.push("r", pair.sealed([0, 1, 2, 3, 4, 5, 6, 7], 32))
    pair.prefill.complete("r", 1)
    landed = []
    for _ in range(200):
        pair.clock.now += 0.1
        pair.prefill.thread.step()
        pair.decode.thread.step()
        pair.prefill_events += pair.prefill.poll_events()
        landed += pair.decode.poll_events()
    assert not pair.failures("prefill")
    for event in landed:
        assert isinstance(event, PagesLanded)
        pair._verify(event)
    pair.run(60)
    assert pair.completed("r")


def test_a_decode_that_is_not_heard_strands_no_source_page() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 16))
    pair.run(2)
    pair.prefill.push("r", pair.sealed([0, 1, 2, 3], 16)[2:])
    for _ in range(100):
        pair.clock.now += 0.1
        pair.prefill.thread.step()
    pair.prefill_events += pair.prefill.poll_events()
    assert pair.failures("prefill")[0].failure is TransferFailure.EXPIRED


@pytest.mark.parametrize("nth", range(1, 4))
def test_a_lost_credit_is_noticed_long_before_the_lease_ends(nth: int) -> None:
    pair = make(lease_s=60.0, faults=(Fault(FaultKind.DROP, DECODE, nth),))
    pair.hand_over("r", 40, list(range(10)))
    pair.run(50, seconds=0.1)
    assert [e.failure for e in pair.failures("prefill")] == [TransferFailure.TRANSPORT]
    assert "lost" in pair.failures("decode")[0].detail


def test_a_lost_announcement_is_noticed_long_before_the_lease_ends() -> None:
    pair = make(lease_s=60.0, faults=(Fault(FaultKind.DROP, PREFILL, 1),))
    pair.hand_over("r", 8, [0, 1])
    pair.run(50, seconds=0.1)
    assert pair.failures("decode")[0].failure is TransferFailure.TRANSPORT
    assert pair.failures("prefill")[0].failure is TransferFailure.TRANSPORT


def test_a_credit_that_comes_twice_never_lets_a_slot_be_written_twice() -> None:
    pair = make(faults=(Fault(FaultKind.DUPLICATE, DECODE, 0),))
    pair.hand_over("r", 80, list(range(20)))
    pair.run(200)
    assert pair.completed("r")
    assert pair.identical("r", 80, list(range(20)))
    assert pair.prefill.stats().dropped["duplicate_credit"] == 1


def test_a_lost_end_is_told_again_to_who_still_waits() -> None:
    """Prefill gives up, and the message about it gets lost: decode's heartbeat meets the answer."""
    pair = make(lease_s=60.0, faults=(Fault(FaultKind.DROP, PREFILL, 1),))
    pair.prefill.open(pair.grant("r", 16))
    pair.run(2)
    pair.prefill.abort("r", TransferFailure.NOT_NEEDED, "its first token ended it")
    pair.run(30, seconds=0.1)
    assert pair.failures("decode")[0].failure is TransferFailure.NOT_NEEDED
    assert pair.decode.stats().slots.free == SLOTS

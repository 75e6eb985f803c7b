"""Digests of source pages that become known after their write has ended, as on a GPU."""

from collections.abc import Sequence

import pytest
import torch

from kvtransfer.events import PagesLanded, SourceReleased, TransferFailedEvent, WriterFinished
from kvtransfer.pool_sealer import PendingSeals, PoolSealer
from kvtransfer.states import TransferFailure
from tests.kvtransfer.pair import LAYOUT, Pair


class LateSeals:
    """Computed when they are asked for, known when the test says so."""

    def __init__(self, found: list[bytes]) -> None:
        self._found = found
        self.known = False

    def ended(self) -> bool:
        return self.known

    def seals(self) -> list[bytes]:
        assert self.known, "nobody may wait for them"
        return self._found


class LateSealer(PoolSealer):
    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__(pool, LAYOUT)
        self.asked: list[LateSeals] = []

    @property
    def queues(self) -> bool:
        return True

    def start(self, pages: Sequence[int], valid_tokens: Sequence[int]) -> PendingSeals:
        self.asked.append(LateSeals(self.seals(pages, valid_tokens)))
        return self.asked[-1]

    def tell(self) -> None:
        for seals in self.asked:
            seals.known = True


def with_late_digests(*, verify: bool = True) -> tuple[Pair, LateSealer]:
    made: list[LateSealer] = []

    def make(pool: torch.Tensor) -> LateSealer:
        made.append(LateSealer(pool))
        return made[0]

    pair = Pair(slots=8, verify=verify, make_sealer=make)
    pair.run(2)
    return pair, made[0]


@pytest.fixture
def late() -> tuple[Pair, LateSealer]:
    return with_late_digests()


def failures(events: Sequence[object]) -> list[TransferFailedEvent]:
    return [event for event in events if isinstance(event, TransferFailedEvent)]


def test_decode_has_the_pages_before_and_hears_of_the_end_after(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, sealer = late
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    assert any(isinstance(event, PagesLanded) for event in pair.decode_events)
    assert not any(isinstance(event, WriterFinished) for event in pair.decode_events)
    assert pair.prefill.held_pages() == {"r": [3, 5, 6]}
    sealer.tell()
    pair.run()
    assert any(isinstance(event, WriterFinished) for event in pair.decode_events)
    assert any(isinstance(event, SourceReleased) for event in pair.prefill_events)
    assert pair.window.counts().free == 8


def test_a_page_that_changed_before_it_left_is_data_loss_on_both_sides(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, sealer = late
    ticket = pair.grant("r", 8)
    pair.prefill.open(ticket)
    sealed = pair.sealed([3, 5], 8)
    pair.source[5] = torch.zeros_like(pair.source[5])
    pair.prefill.push("r", sealed)
    pair.prefill.complete("r", 7)
    sealer.tell()
    pair.run()
    sealer.tell()
    pair.run()
    (failed,) = failures(pair.prefill_events)[-1:]
    assert failed.failure is TransferFailure.MISMATCH
    assert failed.quiesced
    assert not any(isinstance(event, WriterFinished) for event in pair.decode_events)
    assert pair.window.counts().free == 8


def test_a_transfer_that_failed_keeps_its_pages_while_they_are_digested(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, sealer = late
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    pair.prefill.abort("r", TransferFailure.ABORTED, "enough")
    pair.run()
    assert [event.quiesced for event in failures(pair.prefill_events)] == [False]
    assert pair.prefill.held_pages() == {"r": [3, 5, 6]}
    sealer.tell()
    pair.run()
    assert [event.quiesced for event in failures(pair.prefill_events)] == [False, True]
    assert pair.prefill.held_pages() == {}
    assert pair.window.counts().free == 8


def test_a_peer_that_died_settles_the_transfer_whatever_its_digests_say(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, _ = late
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    pair.prefill.peer_gone("decode-1", "its process has exited", proven_dead=True)
    pair.run()
    assert failures(pair.prefill_events)[-1].quiesced
    assert pair.prefill.held_pages() == {}


def test_without_verification_nothing_is_digested() -> None:
    pair, sealer = with_late_digests(verify=False)
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    assert not sealer.asked
    assert any(isinstance(event, SourceReleased) for event in pair.prefill_events)


def test_writes_that_begin_together_are_digested_by_one_launch_and_compared_each(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, sealer = late
    pair.decode._receiver._max_slots = 5
    pair.prefill.thread.sender._write_pages = 2
    pages = [3, 5, 6, 7, 9]
    pair.hand_over("r", 19, pages)
    pair.step()
    assert len(sealer.asked) == 1
    sealer.tell()
    pair.run()
    assert pair.completed("r")
    assert pair.identical("r", 19, pages)


def test_a_page_that_changed_in_the_last_of_several_writes_is_caught(
    late: tuple[Pair, LateSealer],
) -> None:
    pair, sealer = late
    pair.prefill.thread.sender._write_pages = 2
    pair.prefill.open(pair.grant("r", 19))
    sealed = pair.sealed([3, 5, 6, 7, 9], 19)
    pair.source[9, 0] ^= 1
    pair.prefill.push("r", sealed, first_token=7)
    pair.run(2)
    sealer.tell()
    pair.run()
    assert not pair.completed("r")
    assert failures(pair.prefill_events)[-1].failure is TransferFailure.MISMATCH

"""A transport that compares seals as it writes: what the sender leaves to it, and makes of it."""

from collections.abc import Sequence

import pytest
import torch

from kvtransfer.digest import digest_pages, seals_of
from kvtransfer.events import SourceReleased, TransferFailedEvent
from kvtransfer.fake_transport import FakeTransport
from kvtransfer.states import TransferFailure
from kvtransfer.transport import SealCheck, WriteFailed, WriteId
from tests.kvtransfer.pair import LAYOUT, Pair


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[SealCheck]:
    """Makes the fake transport such a one; what it was asked to check."""
    asked: list[SealCheck] = []

    def write_checked(
        self: FakeTransport,
        peer: str,
        copies: Sequence[tuple[int, int]],
        message: bytes,
        check: SealCheck,
        *,
        part: tuple[int, int] | None = None,
    ) -> WriteId:
        asked.append(check)
        assert self._pool is not None
        pages = [page for page, _ in copies]
        seals = seals_of(digest_pages(self._pool, pages, check.valid_tokens, LAYOUT))
        if check.first_wrong(seals) is None:
            return self.write(peer, copies, message, part=part)
        write = WriteId(1_000 + len(asked))
        self._events.append(WriteFailed(write, "not what was sealed", mismatch=True))
        return write

    monkeypatch.setattr(FakeTransport, "checks_seals", True)
    monkeypatch.setattr(FakeTransport, "write_checked", write_checked)
    return asked


def test_the_seals_travel_with_the_write_and_the_bytes_arrive(checked: list[SealCheck]) -> None:
    pair = Pair()
    pair.run(2)
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    assert [check.valid_tokens for check in checked] == [(4,), (4,), (2,)]
    assert any(isinstance(event, SourceReleased) for event in pair.prefill_events)


def test_a_page_that_changed_is_data_loss_on_both_sides(checked: list[SealCheck]) -> None:
    pair = Pair(slots=8)
    pair.run(2)
    ticket = pair.grant("r", 8)
    pair.prefill.open(ticket)
    sealed = pair.sealed([3, 5], 8)
    pair.source[5] = torch.zeros_like(pair.source[5])
    pair.prefill.push("r", sealed)
    pair.prefill.complete("r", 7)
    pair.run()
    for events in (pair.prefill_events, pair.decode_events):
        failed = [event for event in events if isinstance(event, TransferFailedEvent)]
        assert failed[-1].failure is TransferFailure.MISMATCH
        assert failed[-1].quiesced
    assert pair.positions == {}, "nothing of the write was announced"
    assert pair.window.counts().free == 8
    assert checked


def test_without_verification_nothing_is_compared(checked: list[SealCheck]) -> None:
    pair = Pair(verify=False)
    pair.run(2)
    pair.hand_over("r", 10, [3, 5, 6])
    pair.run()
    assert not checked
    assert any(isinstance(event, SourceReleased) for event in pair.prefill_events)

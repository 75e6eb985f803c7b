"""Sender and receiver over a transport with scripted faults."""

import pytest

from kvtransfer.errors import DuplicateTransferError, NoSlotsError, UnknownPeerError
from kvtransfer.fake_transport import Fault, FaultKind
from kvtransfer.states import TransferFailure
from protos.baton.v1 import kv_pb2
from tests.kvtransfer.pair import DECODE, LAYOUT, PREFILL, Pair


def make(**kwargs: object) -> Pair:
    pair = Pair(**kwargs)  # type: ignore[arg-type]
    pair.step()
    return pair


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 47])
def test_every_valid_byte_of_a_request_arrives_and_both_sides_let_go(tokens: int) -> None:
    pair = make()
    pages = list(range(5, 5 + LAYOUT.pages_of(tokens)))
    pair.hand_over("r", tokens, pages)
    pair.run(120)
    assert pair.completed("r")
    assert pair.released("r")
    assert pair.identical("r", tokens, pages)
    assert pair.prefill.held_pages() == {}
    assert pair.window.counts().free == pair.window.slots
    assert pair.prefill.stats().bytes_sent == len(pages) * LAYOUT.page_bytes
    assert pair.decode.stats().bytes_received == len(pages) * LAYOUT.page_bytes
    assert not pair.prefill.stats().sending
    assert not pair.decode.stats().receiving


def test_pages_pushed_chunk_by_chunk_leave_as_they_come() -> None:
    pair = make(slots=8)
    tokens, pages = 18, [3, 9, 4, 20, 21]
    pair.prefill.open(pair.grant("r", tokens))
    sealed = pair.sealed(pages, tokens)
    pair.prefill.push("r", sealed[:2])
    pair.run(5)
    assert set(pair.positions["r"]) == {0, 1}
    pair.prefill.push("r", sealed[2:])
    pair.prefill.complete("r", 11)
    pair.run(20)
    assert pair.completed("r")
    assert pair.identical("r", tokens, pages)


def test_a_prefix_that_decode_holds_does_not_travel() -> None:
    pair = make()
    tokens, pages = 14, [1, 2]
    pair.prefill.open(pair.grant("r", tokens, prefix=8))
    pair.prefill.push("r", pair.sealed(pages, tokens, first=2))
    pair.prefill.complete("r", 5)
    pair.run(20)
    assert pair.completed("r")
    assert pair.decode.stats().bytes_received == 2 * LAYOUT.page_bytes


def test_many_requests_share_a_small_window_and_all_arrive() -> None:
    pair = make(slots=4, pages=64)
    for i in range(4):
        pair.hand_over(f"r{i}", 30, list(range(8 * i, 8 * i + 8)))
    pair.run(200)
    for i in range(4):
        assert pair.identical(f"r{i}", 30, list(range(8 * i, 8 * i + 8)))
    assert pair.window.counts().free == 4


def test_a_full_window_refuses_with_a_hint() -> None:
    pair = make(slots=1)
    pair.grant("a", 4)
    with pytest.raises(NoSlotsError) as caught:
        pair.grant("b", 4)
    assert caught.value.retry_after_s > 0


def test_a_live_request_id_gets_no_second_ticket() -> None:
    pair = make()
    pair.grant("a", 4)
    with pytest.raises(DuplicateTransferError):
        pair.grant("a", 4)


def test_a_writer_that_is_not_connected_gets_no_ticket() -> None:
    pair = make()
    with pytest.raises(UnknownPeerError):
        pair.decode.grant(
            request_id="a",
            writer="nobody",
            total_pages=1,
            total_tokens=4,
            prefix_len=0,
            token_hash=b"",
        )


def test_a_source_page_reused_after_its_seal_never_leaves() -> None:
    pair = make(slots=8)
    ticket = pair.grant("r", 8)
    pair.prefill.open(ticket)
    sealed = pair.sealed([0, 1], 8)
    pair.source[1, 0] ^= 1
    pair.prefill.push("r", sealed)
    pair.run(10)
    (failure,) = pair.failures("prefill")
    assert failure.failure is TransferFailure.MISMATCH
    assert failure.quiesced
    assert pair.failures("decode")[0].failure is TransferFailure.MISMATCH
    assert pair.prefill.stats().bytes_sent == 0
    assert pair.window.counts().free == pair.window.slots


def test_a_source_page_reused_while_it_travels_is_caught_by_decode() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 4))
    pair.prefill.push("r", pair.sealed([0], 4))
    pair.prefill.thread.step()
    pair.source[0, 3] ^= 16
    pair.run(10)
    assert pair.failures("prefill")[0].failure is TransferFailure.MISMATCH
    assert not pair.completed("r")
    assert pair.window.counts().free == pair.window.slots


def test_abort_by_prefill_ends_both_sides_at_once() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 8))
    pair.prefill.push("r", pair.sealed([0], 8))
    pair.prefill.abort("r", TransferFailure.NOT_NEEDED, "first token stopped")
    pair.run(10)
    assert [e.quiesced for e in pair.failures("prefill")][-1]
    assert pair.failures("decode")[0].failure is TransferFailure.NOT_NEEDED
    assert pair.window.counts().free == pair.window.slots
    assert pair.prefill.held_pages() == {}


def test_release_by_decode_returns_slots_once_prefill_has_stopped() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 8))
    pair.run(3)
    pair.decode.release("r")
    pair.decode.thread.step()
    assert pair.window.counts().quarantined == 1
    pair.run(5)
    assert pair.window.counts().free == pair.window.slots
    assert pair.failures("prefill")[0].failure is TransferFailure.ABORTED
    assert pair.failures("decode") == []


def test_a_ticket_released_before_it_was_opened_can_never_be_opened() -> None:
    pair = make()
    ticket = pair.grant("r", 8)
    pair.decode.release("r")
    pair.run(5)
    assert pair.window.counts().free == pair.window.slots
    pair.prefill.open(ticket)
    pair.prefill.push("r", pair.sealed([0, 1], 8))
    pair.run(5)
    (failure,) = pair.failures("prefill")
    assert failure.failure is TransferFailure.ABORTED
    assert pair.prefill.stats().bytes_sent == 0
    assert pair.prefill.held_pages() == {}


def test_a_ticket_that_is_never_opened_expires() -> None:
    pair = make()
    pair.grant("r", 8)
    pair.expire()
    assert pair.failures("decode")[0].failure is TransferFailure.EXPIRED
    assert pair.window.counts().free == pair.window.slots


def test_an_open_ticket_is_renewed_while_the_prompt_queues() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 4))
    pair.expire()
    assert pair.failures("decode") == []
    pair.prefill.push("r", pair.sealed([0], 4))
    pair.prefill.complete("r", 1)
    pair.run(10)
    assert pair.completed("r")


def test_a_silent_writers_slots_stay_in_quarantine_until_it_is_proven_dead() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 16))
    pair.run(3)
    pair.decode.peer_gone(PREFILL, "silent", proven_dead=False)
    for _ in range(50):
        pair.clock.now += 1
        pair.decode.thread.step()
    pair.decode_events += pair.decode.poll_events()
    assert pair.failures("decode")[0].failure is TransferFailure.TRANSPORT
    assert pair.window.counts().quarantined == 1
    pair.decode.peer_gone(PREFILL, "exited", proven_dead=True)
    pair.decode.thread.step()
    assert pair.window.counts().free == pair.window.slots


def test_a_silent_writer_that_comes_back_gives_its_slots_back() -> None:
    pair = make()
    pair.prefill.open(pair.grant("r", 16))
    pair.run(3)
    pair.decode.peer_gone(PREFILL, "silent", proven_dead=False)
    pair.prefill.peer_gone(DECODE, "silent", proven_dead=False)
    pair.run(3)
    assert pair.window.counts().quarantined == 1
    pair.connect()
    pair.expire()
    assert pair.window.counts().free == pair.window.slots


def test_source_pages_stay_held_until_the_stalled_write_ends() -> None:
    pair = make(faults=(Fault(FaultKind.STALL, PREFILL, 1),))
    pair.prefill.open(pair.grant("r", 4))
    pair.prefill.push("r", pair.sealed([9], 4))
    pair.run(3)
    pair.prefill.abort("r", TransferFailure.ABORTED, "client left")
    pair.run(10)
    assert [e.quiesced for e in pair.failures("prefill")] == [False]
    assert pair.prefill.held_pages() == {"r": [9]}
    assert pair.window.counts().quarantined == 1
    pair.prefill.peer_gone(DECODE, "exited", proven_dead=True)
    pair.run(3)
    assert [e.quiesced for e in pair.failures("prefill")] == [False, True]
    assert pair.prefill.held_pages() == {}


KINDS_OF_WRITES = list(FaultKind)
KINDS_OF_MESSAGES = [
    FaultKind.DROP,
    FaultKind.STALL,
    FaultKind.DUPLICATE,
    FaultKind.REORDER,
    FaultKind.DELAY,
    FaultKind.LOSE_PEER,
]
CASES = [(kind, PREFILL, nth) for kind in KINDS_OF_WRITES for nth in range(8)] + [
    (kind, DECODE, nth) for kind in KINDS_OF_MESSAGES for nth in range(6)
]


@pytest.mark.parametrize(("kind", "side", "nth"), CASES)
def test_any_fault_ends_in_identical_bytes_or_a_typed_failure(
    kind: FaultKind, side: str, nth: int
) -> None:
    tokens, pages = 22, [4, 5, 9, 8, 7, 30]
    pair = make(slots=8, faults=(Fault(kind, side, nth, polls=60),), seed=nth)
    pair.hand_over("r", tokens, pages)
    pair.run(80)
    pair.expire()
    pair.expire()
    # only identical bytes ever complete, and every other end has a reason on both sides
    if pair.completed("r"):
        assert pair.identical("r", tokens, pages)
    elif not any(e.request_id == "r" for e in pair.failures("decode")):
        # decode rejected it itself: then it told prefill why
        assert pair.failures("prefill")[0].failure is TransferFailure.MISMATCH
    assert pair.released("r") or pair.failures("prefill")
    counts = pair.window.counts()
    assert counts.granted == 0
    assert counts.free + counts.quarantined == counts.total
    assert not pair.decode.stats().receiving
    # what is still held after that is held for a writer or a reader that never ended
    pair.prefill.peer_gone(DECODE, "exited", proven_dead=True)
    pair.decode.peer_gone(PREFILL, "exited", proven_dead=True)
    pair.run(5)
    assert pair.window.counts().free == pair.window.slots
    assert pair.prefill.held_pages() == {}
    assert [e.quiesced for e in pair.failures("prefill")].count(True) <= 1


def test_faults_other_than_loss_and_silence_are_absorbed() -> None:
    for kind in (FaultKind.REORDER, FaultKind.DELAY, FaultKind.DUPLICATE):
        pair = make(faults=(Fault(kind, DECODE, 0),))
        pair.hand_over("r", 16, [0, 1, 2, 3])
        pair.run(60)
        assert pair.completed("r"), kind


# ---- messages that must not be believed ---------------------------------------------------------


def told(pair: Pair, message: kv_pb2.KvMessage, peer: str = PREFILL) -> None:
    pair.decode.thread.on_message(peer, message.SerializeToString())
    pair.decode_events += pair.decode.poll_events()


def page_message(
    ticket: object, *, slot: int, position: int = 0, valid_tokens: int = 4, chain_hash: bytes = b""
) -> kv_pb2.KvMessage:
    return kv_pb2.KvMessage(
        ticket_id=ticket.ticket_id,  # type: ignore[attr-defined]
        epoch=ticket.epoch,  # type: ignore[attr-defined]
        request_id=ticket.request_id,  # type: ignore[attr-defined]
        written=kv_pb2.PagesWritten(
            slots=[slot],
            positions=[position],
            valid_tokens=[valid_tokens],
            chain_hashes=chain_hash,
        ),
    )


@pytest.mark.parametrize(
    ("changes", "peer"),
    [
        ({"epoch": 99}, PREFILL),
        ({"ticket_id": 99}, PREFILL),
        ({"request_id": "other"}, PREFILL),
        ({}, "somebody-else"),
    ],
)
def test_a_message_for_another_grant_is_dropped_and_counted(
    changes: dict[str, object], peer: str
) -> None:
    pair = make()
    ticket = pair.grant("r", 8)
    message = page_message(ticket, slot=ticket.slots[0])
    for name, value in changes.items():
        setattr(message, name, value)
    told(pair, message, peer)
    assert sum(pair.decode.stats().dropped.values()) == 1
    assert pair.failures("decode") == []
    assert pair.positions == {}


@pytest.mark.parametrize(
    "page",
    [
        {"slot": 3},
        {"slot": 10**6},
        {"slot": 0, "position": 2},
        {"slot": 0, "position": 2**40},
        {"slot": 0, "valid_tokens": 3},
        {"slot": 0, "valid_tokens": 5},
    ],
)
def test_a_page_that_was_not_asked_for_fails_the_transfer(page: dict[str, int]) -> None:
    pair = make()
    ticket = pair.grant("r", 8)
    assert ticket.slots == (0,)
    told(pair, page_message(ticket, **page))
    assert pair.failures("decode")[0].failure is TransferFailure.MISMATCH
    assert pair.window.counts().quarantined == 1


def test_bytes_that_are_no_message_are_dropped_and_counted() -> None:
    pair = make()
    pair.decode.thread.on_message(PREFILL, b"\xff\xff\xff")
    pair.decode.thread.on_message(PREFILL, b"")
    assert pair.decode.stats().dropped["malformed"] == 2


def test_pages_of_other_tokens_are_refused_by_their_chain_hash() -> None:
    pair = make()
    ticket = pair.decode.grant(
        request_id="r",
        writer=PREFILL,
        total_pages=1,
        total_tokens=4,
        prefix_len=0,
        token_hash=b"h",
        chain_hashes=[b"right"],
    )
    told(pair, page_message(ticket, slot=ticket.slots[0], chain_hash=b"wrong"))
    assert pair.failures("decode")[0].failure is TransferFailure.MISMATCH


def test_an_acknowledgement_for_pages_that_were_not_sent_releases_nothing() -> None:
    pair = make()
    ticket = pair.grant("r", 8)
    pair.prefill.open(ticket)
    pair.prefill.push("r", pair.sealed([0], 8))
    pair.prefill.thread.step()
    ack = kv_pb2.KvMessage(
        ticket_id=ticket.ticket_id,
        epoch=ticket.epoch,
        request_id="r",
        ack=kv_pb2.TransferAck(pages=1),
    )
    pair.prefill.thread.on_message(DECODE, ack.SerializeToString())
    pair.prefill_events += pair.prefill.poll_events()
    assert not pair.released("r")
    assert pair.prefill.held_pages() == {"r": [0]}


def test_a_ticket_of_another_writer_is_refused() -> None:
    import dataclasses

    pair = make()
    ticket = dataclasses.replace(pair.grant("r", 8), writer_instance="prefill-0")
    pair.prefill.open(ticket)
    pair.run(3)
    assert pair.failures("prefill")[0].failure is TransferFailure.REFUSED
    assert pair.prefill.held_pages() == {}

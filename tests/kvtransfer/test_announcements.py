"""The message that announces pages: a list an attribute, all of one length."""

import pytest

from kvtransfer import messages
from kvtransfer.ticket import LandedPage, SourcePage, Ticket
from protos.baton.v1 import kv_pb2

TICKET = Ticket(
    ticket_id=7,
    instance_id="d",
    epoch=2,
    request_id="r#0",
    writer_instance="p",
    slots=(4, 5, 6),
    lease_s=4.0,
    decode_prefix_len=0,
    total_tokens=40,
    token_hash=b"",
    transport="fake",
)


@pytest.mark.parametrize("chain", [b"", b"0123456789abcdef"])
def test_what_is_announced_arrives(chain: bytes) -> None:
    pages = [
        SourcePage(
            page=9 + i, position=3 + i, valid_tokens=16 - i, seal=bytes(8 * [i]), chain_hash=chain
        )
        for i in range(3)
    ]
    sent = messages.written(TICKET, pages, [4, 5, 6], so_far=1)
    message = kv_pb2.KvMessage.FromString(sent.SerializeToString())
    assert messages.names(TICKET, message)
    assert message.written.pages_written == 1
    assert messages.landed(message.written) == [
        LandedPage(
            slot=4 + i, position=3 + i, valid_tokens=16 - i, seal=bytes(8 * [i]), chain_hash=chain
        )
        for i in range(3)
    ]


def test_a_heartbeat_announces_nothing() -> None:
    message = messages.written(TICKET, (), (), so_far=5)
    assert message.WhichOneof("kind") == "written"
    assert messages.landed(message.written) == []


@pytest.mark.parametrize("spoilt", ["slots", "positions", "valid_tokens", "seals", "chain_hashes"])
def test_lists_that_do_not_fit_together_are_refused(spoilt: str) -> None:
    pages = [
        SourcePage(page=i, position=i, valid_tokens=16, seal=b"8 bytes!", chain_hash=b"hash")
        for i in range(3)
    ]
    written = messages.written(TICKET, pages, [4, 5, 6], so_far=0).written
    if spoilt in ("seals", "chain_hashes"):
        setattr(written, spoilt, getattr(written, spoilt)[:-1])
    else:
        del getattr(written, spoilt)[-1]
    with pytest.raises(ValueError):
        messages.landed(written)

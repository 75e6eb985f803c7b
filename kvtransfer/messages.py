"""Making and matching the messages between the two sides of a transfer."""

from collections.abc import Iterable, Sequence

from kvtransfer.states import TransferFailure
from kvtransfer.ticket import LandedPage, SourcePage, Ticket
from protos.baton.v1 import kv_pb2


def about(ticket: Ticket) -> kv_pb2.KvMessage:
    """A message that names the ticket and says nothing yet."""
    return kv_pb2.KvMessage(
        ticket_id=ticket.ticket_id, epoch=ticket.epoch, request_id=ticket.request_id
    )


def names(ticket: Ticket, message: kv_pb2.KvMessage) -> bool:
    """Whether the message speaks of this very grant."""
    return (
        message.ticket_id == ticket.ticket_id
        and message.epoch == ticket.epoch
        and message.request_id == ticket.request_id
    )


def written(
    ticket: Ticket, pages: Sequence[SourcePage], slots: Iterable[int], *, so_far: int
) -> kv_pb2.KvMessage:
    """Announces pages and the landing slots that they lie in; without any, a heartbeat. `so_far`:
    pages that were announced by writes that have ended."""
    message = about(ticket)
    told = message.written
    told.pages_written = so_far
    told.SetInParent()
    if pages:
        # Once for every page of every prompt: columns, as a page's fields one by one take longer.
        _, positions, valid_tokens, seals, chain_hashes = zip(*pages, strict=True)
        told.slots.extend(slots)
        told.positions.extend(positions)
        told.valid_tokens.extend(valid_tokens)
        told.seals = b"".join(seals)
        told.chain_hashes = b"".join(chain_hashes)
    return message


def coming(ticket: Ticket, *, so_far: int) -> kv_pb2.KvMessage:
    """A heartbeat that says: the last of the pages are being computed."""
    message = written(ticket, (), (), so_far=so_far)
    message.written.coming = True
    return message


def landed(written: kv_pb2.PagesWritten) -> list[LandedPage]:
    """The pages that a message announces. Raises ValueError where its lists do not fit together."""
    count = len(written.slots)
    columns = (
        written.slots,
        written.positions,
        written.valid_tokens,
        _split(written.seals, count),
        _split(written.chain_hashes, count),
    )
    return list(map(LandedPage._make, zip(*columns, strict=True)))


def _split(joined: bytes, count: int) -> list[bytes]:
    size = len(joined) // max(1, count)
    if size * count != len(joined):
        raise ValueError(f"{len(joined)} bytes are not {count} of one length")
    if not size:
        return [b""] * count
    return [joined[start : start + size] for start in range(0, len(joined), size)]


def complete(ticket: Ticket, said: kv_pb2.TransferComplete) -> kv_pb2.KvMessage:
    """Everything was written; nothing will be any more."""
    message = about(ticket)
    message.complete.CopyFrom(said)
    return message


def credit(ticket: Ticket, slots: Iterable[int], *, total: int) -> kv_pb2.KvMessage:
    """Slots that may be written (again); without any, a heartbeat. `total`: slots credited so far
    beyond the ticket's own, these included."""
    message = about(ticket)
    message.credit.slots.extend(slots)
    message.credit.total = total
    message.credit.SetInParent()
    return message


def acknowledgement(ticket: Ticket, pages: int) -> kv_pb2.KvMessage:
    """So many pages were verified and published: all."""
    message = about(ticket)
    message.ack.pages = pages
    return message


def failed(
    ticket: Ticket,
    failure: TransferFailure,
    detail: str,
    *,
    quiesced: bool,
    from_writer: bool,
) -> kv_pb2.KvMessage:
    """The transfer is over; see kv.proto for what the flags promise."""
    message = about(ticket)
    message.failed.CopyFrom(
        kv_pb2.TransferFailed(
            failure=failure.to_wire(), detail=detail, quiesced=quiesced, from_writer=from_writer
        )
    )
    return message


def answer_failed(
    message: kv_pb2.KvMessage, failure: TransferFailure, detail: str, *, quiesced: bool
) -> kv_pb2.KvMessage:
    """The writer's word on the grant that `message` names: it has failed."""
    answer = kv_pb2.KvMessage(
        ticket_id=message.ticket_id, epoch=message.epoch, request_id=message.request_id
    )
    answer.failed.CopyFrom(
        kv_pb2.TransferFailed(
            failure=failure.to_wire(), detail=detail, quiesced=quiesced, from_writer=True
        )
    )
    return answer


def window_opened(first_slot: int, offer: bytes) -> kv_pb2.KvMessage:
    """Decode has a further landing window."""
    return kv_pb2.KvMessage(window=kv_pb2.WindowOpened(first_slot=first_slot, offer=offer))


def window_ready(first_slot: int) -> kv_pb2.KvMessage:
    """This side can write the window that begins there."""
    return kv_pb2.KvMessage(window_ready=kv_pb2.WindowReady(first_slot=first_slot))

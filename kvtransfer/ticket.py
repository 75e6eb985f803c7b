"""The ticket: decode's promise of pages for a whole request, and of slots to write into now."""

from dataclasses import dataclass
from typing import NamedTuple

from protos.baton.v1 import kv_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Mirror of kv.proto's Ticket; the fields' meanings are written there."""

    ticket_id: int
    instance_id: str
    epoch: int
    request_id: str
    writer_instance: str
    slots: tuple[int, ...]
    lease_s: float
    decode_prefix_len: int
    total_tokens: int
    token_hash: bytes
    transport: str

    def to_proto(self) -> kv_pb2.Ticket:
        return kv_pb2.Ticket(
            ticket_id=self.ticket_id,
            instance_id=self.instance_id,
            epoch=self.epoch,
            request_id=self.request_id,
            writer_instance=self.writer_instance,
            slots=self.slots,
            lease_s=self.lease_s,
            decode_prefix_len=self.decode_prefix_len,
            total_tokens=self.total_tokens,
            token_hash=self.token_hash,
            transport=self.transport,
        )

    @staticmethod
    def from_proto(message: kv_pb2.Ticket) -> "Ticket":
        return Ticket(
            ticket_id=message.ticket_id,
            instance_id=message.instance_id,
            epoch=message.epoch,
            request_id=message.request_id,
            writer_instance=message.writer_instance,
            slots=tuple(message.slots),
            lease_s=message.lease_s,
            decode_prefix_len=message.decode_prefix_len,
            total_tokens=message.total_tokens,
            token_hash=message.token_hash,
            transport=message.transport,
        )


class SourcePage(NamedTuple):
    """A sealed page that prefill hands over. Like `LandedPage` it is made for every page of every
    prompt, on the way of a first token: a tuple costs a fifth of a frozen dataclass."""

    page: int
    """Index in prefill's pool."""

    position: int
    """Index in the request's sequence of pages, counted from its first token."""

    valid_tokens: int
    """Tokens of it that count; fewer than the page size on the last page only."""

    seal: bytes
    """Digest taken when the page was computed (kvtransfer/digest.py)."""

    chain_hash: bytes = b""
    """Hash of the token chain up to the page's last valid token."""


class LandedPage(NamedTuple):
    """A page whose bytes lie in a landing slot, not yet believed."""

    slot: int
    position: int
    valid_tokens: int
    seal: bytes
    chain_hash: bytes

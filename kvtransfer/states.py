"""The life of a transfer: monotone states, one table of transitions, and why transfers fail.

A message that the table does not list for the present state is late or repeated. It is dropped
and counted, never acted upon: that is what keeps a stray message from reviving a finished or
failed transfer.
"""

from enum import Enum, IntEnum, auto
from typing import Final

from protos.baton.v1 import kv_pb2
from protos.errors import ErrorCode


class TransferState(IntEnum):
    """Ordered: a transfer only moves up."""

    RESERVED = 0
    """Ticket granted (decode) or opened (prefill); no page has moved."""
    RECEIVING = 1
    """Pages are on their way."""
    COMPLETE = 2
    """Every page was verified and acknowledged."""
    FAILED = 3
    """Absorbs everything; the reason is kept."""


class Trigger(Enum):
    """What can move a transfer."""

    PAGES = auto()
    """Pages left (prefill) or landed (decode)."""
    ALL_ACCEPTED = auto()
    """Every page was accepted and the first token is known."""
    FAILURE = auto()
    """Either side, the transport or the lease gave up."""


TRANSITIONS: Final[dict[tuple[TransferState, Trigger], TransferState]] = {
    (TransferState.RESERVED, Trigger.PAGES): TransferState.RECEIVING,
    (TransferState.RESERVED, Trigger.ALL_ACCEPTED): TransferState.COMPLETE,
    (TransferState.RESERVED, Trigger.FAILURE): TransferState.FAILED,
    (TransferState.RECEIVING, Trigger.PAGES): TransferState.RECEIVING,
    (TransferState.RECEIVING, Trigger.ALL_ACCEPTED): TransferState.COMPLETE,
    (TransferState.RECEIVING, Trigger.FAILURE): TransferState.FAILED,
}
"""What is not listed is dropped."""


def advance(state: TransferState, trigger: Trigger) -> TransferState | None:
    """The next state, or None where the trigger comes too late and must be dropped."""
    return TRANSITIONS.get((state, trigger))


class TransferFailure(IntEnum):
    """Why a transfer failed; the values are kv.proto's."""

    TRANSPORT = kv_pb2.TRANSFER_FAILURE_TRANSPORT
    """The wire or the peer is gone."""
    EXPIRED = kv_pb2.TRANSFER_FAILURE_EXPIRED
    """No sign of life, or no progress, for the length of the lease."""
    ABORTED = kv_pb2.TRANSFER_FAILURE_ABORTED
    """The request was withdrawn."""
    MISMATCH = kv_pb2.TRANSFER_FAILURE_MISMATCH
    """A page is not what its seal says, or not what was asked for."""
    REFUSED = kv_pb2.TRANSFER_FAILURE_REFUSED
    """The other side does not accept it (instance, ticket, rights)."""
    NOT_NEEDED = kv_pb2.TRANSFER_FAILURE_NOT_NEEDED
    """The request ended before its KV was needed."""

    @property
    def code(self) -> ErrorCode:
        """The error that a client gets."""
        return _CODES[self]

    @staticmethod
    def from_wire(value: int) -> "TransferFailure":
        """The failure of that number; TRANSPORT for one that this version does not know."""
        try:
            return TransferFailure(value)
        except ValueError:
            return TransferFailure.TRANSPORT

    def to_wire(self) -> str:
        """The enum's name in kv.proto, as message constructors take it."""
        return f"TRANSFER_FAILURE_{self.name}"


_CODES: Final[dict[TransferFailure, ErrorCode]] = {
    TransferFailure.TRANSPORT: ErrorCode.UNAVAILABLE,
    TransferFailure.EXPIRED: ErrorCode.DEADLINE_EXCEEDED,
    TransferFailure.ABORTED: ErrorCode.ABORTED,
    TransferFailure.MISMATCH: ErrorCode.DATA_LOSS,
    TransferFailure.REFUSED: ErrorCode.FAILED_PRECONDITION,
    TransferFailure.NOT_NEEDED: ErrorCode.ABORTED,
}

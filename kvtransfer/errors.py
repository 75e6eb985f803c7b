"""What can go wrong in a transfer, each with the one code that the doors translate."""

from protos.errors import BatonError, ErrorCode


class TransferError(BatonError):
    """Base of all errors that the transfer raises on purpose."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(self.error_code, message, retry_after_s=retry_after_s)

    error_code = ErrorCode.INTERNAL


class NoSlotsError(TransferError):
    """The landing window has no free slot: the request waits, or is refused with a hint."""

    error_code = ErrorCode.RESOURCE_EXHAUSTED


class UnknownPeerError(TransferError):
    """No transport joins this worker with that instance (any more)."""

    error_code = ErrorCode.UNAVAILABLE


class SilentWriterError(TransferError):
    """The writer has not answered for slots that it was granted before."""

    error_code = ErrorCode.UNAVAILABLE


class DuplicateTransferError(TransferError):
    """A transfer of this request id is still alive here."""

    error_code = ErrorCode.ALREADY_EXISTS


class TransportError(TransferError):
    """The transport refused or failed an operation; nothing of it is under way."""

    error_code = ErrorCode.UNAVAILABLE


class TransportUnavailableError(TransferError):
    """A transport that was asked for by name cannot work on this machine."""

    error_code = ErrorCode.FAILED_PRECONDITION

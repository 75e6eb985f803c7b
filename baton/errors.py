"""What can go wrong with a request, as the client library raises it.

One class for each of the codes in protos/errors.py, so that a caller can catch what it can handle:
`except ResourceExhausted as error: time.sleep(error.retry_after_s)`.
"""

from typing import Any, ClassVar

import grpc

from protos.errors import BatonError, ErrorCode

RETRY_AFTER_KEY = "retry-after"
"""Trailing metadata with which a router says when another try makes sense. Seconds."""
PARAM_KEY = "baton-param"
"""Trailing metadata with which a router names the field at fault."""


class RequestError(BatonError):
    """Base of everything that the client library raises for a request."""

    status: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        retry_after_s: float = 0.0,
        param: str | None = None,
    ) -> None:
        super().__init__(self.status, message, retry_after_s=retry_after_s, param=param)
        self.request_id = request_id
        """The request at fault; empty where the call was about none."""


class InvalidRequest(RequestError):
    """The request can never be served as it stands: change it."""

    status = ErrorCode.INVALID_ARGUMENT


class NotFound(RequestError):
    """No such model."""

    status = ErrorCode.NOT_FOUND


class Unauthenticated(RequestError):
    """The router asks for an API key, and none that it knows came with the call."""

    status = ErrorCode.UNAUTHENTICATED


class PermissionDenied(RequestError):
    """The API key is known, and this call is not for it."""

    status = ErrorCode.PERMISSION_DENIED


class AlreadyExists(RequestError):
    """A live request has this id."""

    status = ErrorCode.ALREADY_EXISTS


class ResourceExhausted(RequestError):
    """Queues or memory are full; `retry_after_s` says when to come back."""

    status = ErrorCode.RESOURCE_EXHAUSTED


class FailedPrecondition(RequestError):
    """The server is not in the state that this call needs."""

    status = ErrorCode.FAILED_PRECONDITION


class Aborted(RequestError):
    """The server gave the call up. A request that somebody ends by its id is no error: its stream
    ends in order, with the finish reason `abort`."""

    status = ErrorCode.ABORTED


class Unavailable(RequestError):
    """The server or all workers of a role are out of reach; another try may succeed."""

    status = ErrorCode.UNAVAILABLE


class DeadlineExceeded(RequestError):
    """The call took longer than its `timeout`."""

    status = ErrorCode.DEADLINE_EXCEEDED


class DataLoss(RequestError):
    """KV failed its check and could not be computed anew; no token came from it."""

    status = ErrorCode.DATA_LOSS


class InternalError(RequestError):
    """A fault of the server."""

    status = ErrorCode.INTERNAL


class Cancelled(RequestError):
    """This side cancelled the call, from another thread or by closing the client."""

    status = ErrorCode.ABORTED


ERROR_OF_STATUS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def error_from_call(error: grpc.RpcError, *, request_id: str = "") -> RequestError:
    """The typed error for what gRPC raised, of a blocking or an asyncio call."""
    code: grpc.StatusCode = _ask(error, "code") or grpc.StatusCode.UNKNOWN
    message: str = _ask(error, "details") or code.name.lower().replace("_", " ")
    hints = {key: str(value) for key, value in _ask(error, "trailing_metadata") or ()}
    cls = ERROR_OF_STATUS.get(code, InternalError)
    return cls(
        message,
        request_id=request_id,
        retry_after_s=_seconds(hints.get(RETRY_AFTER_KEY, "0")),
        param=hints.get(PARAM_KEY),
    )


def _ask(error: grpc.RpcError, method: str) -> Any:
    # Not every RpcError is a Call: a closed channel raises one without these methods.
    return getattr(error, method)() if hasattr(error, method) else None


def _seconds(value: str) -> float:
    try:
        return max(0.0, float(value))
    except ValueError:
        return 0.0

"""The one mapping from an error to a gRPC status and an HTTP status.

Services raise `BatonError` (or turn an engine's error into one by its `code`), doors translate at
their very edge; nothing in between invents a status.
"""

from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus


class ErrorCode(StrEnum):
    """Names as in worker.proto's ErrorCode and in gRPC's status codes. The last two are said by
    the router's doors alone."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


@dataclass(frozen=True, slots=True)
class HttpError:
    """How an OpenAI-compatible door shows a code."""

    status: HTTPStatus
    type: str


HTTP_ERRORS: dict[ErrorCode, HttpError] = {
    ErrorCode.INVALID_ARGUMENT: HttpError(HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    ErrorCode.NOT_FOUND: HttpError(HTTPStatus.NOT_FOUND, "invalid_request_error"),
    ErrorCode.ALREADY_EXISTS: HttpError(HTTPStatus.CONFLICT, "invalid_request_error"),
    ErrorCode.RESOURCE_EXHAUSTED: HttpError(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error"),
    ErrorCode.FAILED_PRECONDITION: HttpError(HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    ErrorCode.ABORTED: HttpError(HTTPStatus.CONFLICT, "server_error"),
    ErrorCode.UNAVAILABLE: HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "server_error"),
    ErrorCode.DEADLINE_EXCEEDED: HttpError(HTTPStatus.GATEWAY_TIMEOUT, "server_error"),
    ErrorCode.DATA_LOSS: HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
    ErrorCode.INTERNAL: HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error"),
    ErrorCode.UNAUTHENTICATED: HttpError(HTTPStatus.UNAUTHORIZED, "invalid_request_error"),
    ErrorCode.PERMISSION_DENIED: HttpError(HTTPStatus.FORBIDDEN, "invalid_request_error"),
}


class BatonError(Exception):
    """An error with a code that every door can translate.

    The message says what happened, to which request, and what the reader can do about it.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        retry_after_s: float = 0.0,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        """Seconds after which another try makes sense; 0: no hint."""
        self.param = param
        """The request's field at fault, where one is."""


def code_from_name(name: str) -> ErrorCode:
    """The code of that name; INTERNAL for a name that is not one of ours."""
    try:
        return ErrorCode(name)
    except ValueError:
        return ErrorCode.INTERNAL

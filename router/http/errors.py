"""Errors as OpenAI shows them, for everything that can go wrong behind the HTTP door."""

import json
import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from protos.errors import HTTP_ERRORS, BatonError, ErrorCode

logger = logging.getLogger(__name__)


class HttpDoorError(Exception):
    """An error that only HTTP knows, such as a body that is too large."""

    def __init__(self, status: HTTPStatus, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param


def error_object(error: BatonError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}"""
    shown = HTTP_ERRORS[error.code]
    code = error.code.value.lower()
    if error.code is ErrorCode.NOT_FOUND and error.param == "model":
        code = "model_not_found"  # clients tell it from a wrong path by this
    elif error.code is ErrorCode.UNAUTHENTICATED:
        code = "invalid_api_key"
    return _object(error.message, shown.type, error.param, code)


def dump(value: object) -> bytes:
    """JSON; raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def json_response(
    value: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(dump(value), status_code=status, headers=headers, media_type="application/json")


def error_response(error: BatonError) -> Response:
    headers = {}
    if error.retry_after_s > 0:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.code is ErrorCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(
        error_object(error), status=HTTP_ERRORS[error.code].status, headers=headers
    )


def install(app: FastAPI) -> None:
    """Has every error leave the app as an error object."""

    async def on_baton_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, BatonError):
            raise error
        return error_response(error)

    async def on_door_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HttpDoorError):
            raise error
        return plain_error(error.status, error.message, error.param)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        message = f"{error.detail}: {request.method} {request.url.path}"
        response = plain_error(error.status_code, message)
        response.headers.update(error.headers or {})
        return response

    async def on_anything(request: Request, error: Exception) -> Response:
        return plain_error(HTTPStatus.INTERNAL_SERVER_ERROR, "an error inside the router")

    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HttpDoorError, on_door_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_anything)


def plain_error(status: int, message: str, param: str | None = None) -> Response:
    """An error object for what only HTTP knows."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = HTTPStatus(status).name.lower()
    return json_response(_object(message, kind, param, code), status=status)


def _object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

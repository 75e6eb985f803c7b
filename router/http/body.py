"""Reading a JSON body: bounded in size and time, and strict where Python's reader is lenient."""

import asyncio
import json
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from protos.errors import BatonError, ErrorCode
from router.http.errors import HttpDoorError


async def read_json(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        HttpDoorError: 413 (too large) or 408 (too slow).
        BatonError: INVALID_ARGUMENT; it is no JSON object.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise HttpDoorError(
            HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {timeout_s:g} s"
        ) from None
    except ClientDisconnect:
        raise BatonError(ErrorCode.ABORTED, "the client left before its body was sent") from None
    return parse_object(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises BatonError (INVALID_ARGUMENT) for anything but a JSON object; NaN is no JSON."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise _broken("it is nested too deeply") from None
    except ValueError as error:
        # Also UnicodeDecodeError, JSONDecodeError and integers of thousands of digits.
        raise _broken(str(error)) from error
    if not isinstance(value, dict):
        raise _broken(f"it must be an object, not {type(value).__name__}")
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _too_large(max_bytes: int) -> HttpDoorError:
    return HttpDoorError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body exceeds {max_bytes} bytes")


def _broken(why: str) -> BatonError:
    return BatonError(
        ErrorCode.INVALID_ARGUMENT, f"the body of your request could not be parsed as JSON: {why}"
    )

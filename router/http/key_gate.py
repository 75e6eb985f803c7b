"""API keys at the HTTP door: a call without a valid one ends here, before its body is read."""

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.errors import BatonError, ErrorCode
from router.callers import Caller
from router.core import Router
from router.http.errors import error_response
from router.service import NOT_AN_OPERATOR

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""For probes and Prometheus: they say how the router is, and nothing of anybody's requests."""


class KeyGate:
    """ASGI middleware: tells the routes who calls."""

    def __init__(self, app: ASGIApp, *, router: Router) -> None:
        self._app = app
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            request = Request(scope)
            try:
                caller = self._router.authenticate(
                    request.headers.get("authorization"), door="http"
                )
            except BatonError as error:
                await error_response(error)(scope, receive, send)
                return
            request.state.caller = caller
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Who sent this request."""
    caller: Caller = request.state.caller
    return caller


def only_operators(router: Router, request: Request) -> None:
    """Raises BatonError (PERMISSION_DENIED) for the key of a mere user."""
    if not caller_of(request).operator:
        router.metrics.refusals.auth("http", "forbidden")
        raise BatonError(ErrorCode.PERMISSION_DENIED, NOT_AN_OPERATOR)

"""The API server as the tests ask it: plain JSON over HTTPS with one token."""

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

Object = dict[str, Any]
T = TypeVar("T")
MERGE = "application/merge-patch+json"


class ApiError(Exception):
    """The server refused; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """One client; each thread has its own."""

    def __init__(self, url: str, authority: Path, token: str) -> None:
        self.url, self.authority, self.token = url, authority, token
        self._http = httpx.Client(
            base_url=url,
            verify=ssl.create_default_context(cafile=str(authority)),
            headers={"Authorization": f"Bearer {token}"},
            timeout=20.0,
            trust_env=False,
        )

    def again(self) -> "Api":
        """The same for another thread."""
        return Api(self.url, self.authority, self.token)

    def close(self) -> None:
        self._http.close()

    def call(
        self, method: str, path: str, body: object = None, *, kind: str = "application/json",
        headers: dict[str, str] | None = None, **query: str,
    ) -> Object:  # fmt: skip
        """Raises ApiError where it refuses, httpx.TransportError where it is away."""
        answer = self._http.request(
            method,
            path,
            json=body,
            params=query,
            headers={"Content-Type": kind, **(headers or {})},
        )
        said: Object = answer.json() if answer.content.startswith(b"{") else {}
        if answer.is_error:
            raise ApiError(answer.status_code, str(said.get("message", answer.text)))
        return said

    def get(self, path: str) -> Object:
        return self.call("GET", path)

    def find(self, path: str) -> Object | None:
        """None where there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise

    def items(self, path: str, **query: str) -> list[Object]:
        found: list[Object] = self.call("GET", path, **query)["items"]
        return found

    def create(self, path: str, body: Object, **query: str) -> Object:
        return self.call("POST", path, body, **query)

    def patch(self, path: str, body: Object) -> Object:
        return self.call("PATCH", path, body, kind=MERGE)


def wait_for(what: Callable[[], T | None], says: str, *, limit_s: float = 60.0) -> T:
    """Asks again until there is an answer. An API server that is away for a moment is no answer."""
    deadline = time.monotonic() + limit_s
    seen: object = None
    while True:
        try:
            found = what()
        except (httpx.TransportError, AssertionError) as error:
            found, seen = None, error
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s:.0f} s: {says} ({seen})")
        time.sleep(0.1)

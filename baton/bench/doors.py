"""The doors under load: Baton's gRPC, and OpenAI's completions over HTTP, of any server."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from baton.aio import AsyncClient
from baton.bench.plan import PlannedRequest
from baton.bench.sample import Sample
from baton.client_access import ClientAccess
from baton.config import SettingsError
from baton.errors import NotFound, Unavailable

DATA = "data:"
DONE = "[DONE]"
CONNECT_TIMEOUT_S = 10.0

Clock = Callable[[], float]
"""Seconds since the start of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the door serves."""

    name: str
    vocab_size: int
    """0: the server does not say."""


class FailedRequest(Exception):
    """A request that the server answered with an error."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Door(Protocol):
    """Sends one request and notes what comes back."""

    async def model(self, name: str) -> ServedModel:
        """The model of that name, or the first one. Raises RequestError."""
        ...

    async def send(self, request: PlannedRequest, sample: Sample, clock: Clock) -> None:
        """Fills the sample. Raises whatever ends the request early."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def open_door(url: str, *, access: ClientAccess, timeout_s: float) -> Door:
    """The door at an address; its scheme says which.

    Raises:
        SettingsError: the TLS settings cannot be used.
    """
    if url.startswith("grpc"):
        return GrpcDoor(url, access=access, timeout_s=timeout_s)
    return HttpDoor(url, access=access, timeout_s=timeout_s)


class GrpcDoor:
    """baton.v1.Inference."""

    def __init__(self, url: str, *, access: ClientAccess, timeout_s: float) -> None:
        # No waiting for a lost connection: it is an error to be counted, not to be smoothed over.
        config = replace(access.connection(url), reconnect_wait_s=0.0)
        self._client = AsyncClient(url, config=config)
        self._timeout_s = timeout_s
        self._model = ""

    async def model(self, name: str) -> ServedModel:
        models = await self._client.models(timeout=CONNECT_TIMEOUT_S)
        found = _pick([model.id for model in models], name)
        self._model = found
        size = next(model.vocab_size for model in models if model.id == found)
        return ServedModel(name=found, vocab_size=size)

    async def send(self, request: PlannedRequest, sample: Sample, clock: Clock) -> None:
        async with self._client.generate(
            request.prompt,
            model=self._model,
            max_tokens=request.output_length,
            temperature=0.0,
            ignore_eos=True,
            timeout=self._timeout_s,
        ) as stream:
            async for chunk in stream:
                sample.arrivals_s += [clock()] * len(chunk.tokens)
                if chunk.usage is not None:
                    sample.completion_tokens = chunk.usage.completion_tokens
                if chunk.report is not None:
                    sample.phases_ms = chunk.report.phases_ms
                    sample.kv_bytes = chunk.report.kv_bytes
                    sample.transport = chunk.report.transport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.close()


class HttpDoor:
    """POST /v1/completions with server-sent events.

    A server other than Baton does not say how many tokens an event holds: each event then counts
    as one token's arrival, and the number of tokens comes from the usage at the end.
    """

    def __init__(self, url: str, *, access: ClientAccess, timeout_s: float) -> None:
        context = access.ssl_context(url)
        self._base = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            # As many connections as there are requests under way: queueing here would be measured.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            headers=access.http_headers(),
            verify=True if context is None else context,
        )
        self._body: dict[str, Any] = {}

    async def model(self, name: str) -> ServedModel:
        try:
            response = await self._client.get(f"{self._base}/v1/models")
            response.raise_for_status()
            cards = response.json()["data"]
            found = _pick([card["id"] for card in cards], name)
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"{self._base}/v1/models: {error or type(error).__name__}") from error
        card = next(card for card in cards if card["id"] == found)
        self._body = {
            "model": found,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if card.get("owned_by") == "baton":
            self._body["return_token_ids"] = True
        return ServedModel(name=found, vocab_size=int(card.get("vocab_size") or 0))

    async def send(self, request: PlannedRequest, sample: Sample, clock: Clock) -> None:
        body = {**self._body, "prompt": request.prompt, "max_tokens": request.output_length}
        async with self._client.stream(
            "POST", f"{self._base}/v1/completions", json=body
        ) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise FailedRequest(f"HTTP {response.status_code}", response.text[:500])
            async for line in response.aiter_lines():
                if line.startswith(DATA) and not self._note(line, sample, clock()):
                    return
        raise FailedRequest("CutStream", f"the stream ended without {DONE}")

    @staticmethod
    def _note(line: str, sample: Sample, now: float) -> bool:
        data = line[len(DATA) :].strip()
        if data == DONE:
            return False
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            raise FailedRequest(str(error.get("type") or "error"), str(error.get("message")))
        for choice in event.get("choices", ()):
            tokens = choice.get("token_ids")
            empty_end = choice.get("finish_reason") and not choice.get("text")
            count = len(tokens) if tokens is not None else 0 if empty_end else 1
            sample.arrivals_s += [now] * count
        if event.get("usage"):
            sample.completion_tokens = int(event["usage"]["completion_tokens"])
        if "baton" in event:
            sample.phases_ms = event["baton"]["phases_ms"]
            sample.kv_bytes = event["baton"]["kv_bytes"]
            sample.transport = event["baton"]["transport"]
        return True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()


async def ask(
    door: Door, request: PlannedRequest, *, clock: Clock, timeout_s: float, planned_s: float | None
) -> Sample:
    """Sends one request; a failure is part of its sample, never an exception.

    Args:
        planned_s: when it should have been sent; None: now.
    """
    now = clock()
    sample = Sample(
        index=request.index,
        planned_s=now if planned_s is None else planned_s,
        sent_s=now,
        input_length=len(request.prompt),
        output_length=request.output_length,
    )
    try:
        async with asyncio.timeout(timeout_s):
            await door.send(request, sample, clock)
    except Exception as error:  # counted by kind: a load generator does not stop at one
        sample.error = error.kind if isinstance(error, FailedRequest) else type(error).__name__
        sample.detail = str(error)
    sample.ended_s = clock()
    if not sample.completion_tokens:
        sample.completion_tokens = len(sample.arrivals_s)
    if not sample.error and sample.completion_tokens != request.output_length:
        sample.error = "ShortAnswer"
        sample.detail = f"{sample.completion_tokens} tokens came of {request.output_length}"
    if not sample.error and not sample.arrivals_s:
        sample.error, sample.detail = "EmptyStream", "no token was seen to arrive"
    return sample


def start_clock() -> Clock:
    """A clock that begins now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _pick(names: list[str], wanted: str) -> str:
    if not names:
        raise Unavailable("the server serves no model yet")
    if wanted and wanted not in names:
        raise NotFound(f"the server does not serve {wanted} but {', '.join(names)}")
    return wanted or names[0]


def vocabulary(model: ServedModel, *, given: int) -> int:
    """Number of token ids to draw from.

    Raises:
        SettingsError: neither the user nor the server says it.
    """
    if not given and not model.vocab_size:
        raise SettingsError(
            f"vocab_size: the server does not say how many token ids {model.name} knows: "
            "give --vocab-size"
        )
    return given or model.vocab_size

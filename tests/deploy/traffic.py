"""Requests that run while something is done to the containers, from outside, over both doors."""

import itertools
import threading
import time
from dataclasses import dataclass, field

import httpx
import openai

from baton import Client
from baton.errors import RequestError

PROMPT = "def add(a, b):\n"
TOKENS = 300
"""Enough for a request to live through what is done meanwhile."""


@dataclass
class Stream:
    """One request and all that was heard of it."""

    door: str
    text: str = ""
    heard: list[float] = field(default_factory=list)
    """When something arrived, its end last. Seconds, monotonic."""
    error: Exception | None = None
    finished: bool = False
    began: threading.Event = field(default_factory=threading.Event)

    def take(self, text: str) -> None:
        self.text += text
        self.heard.append(time.monotonic())
        if text:
            self.began.set()

    def longest_silence_s(self, since: float) -> float:
        moments = [since, *(moment for moment in self.heard if moment > since)]
        return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)


class Traffic:
    """Streams of both doors at once; started when made."""

    def __init__(self, http: str, grpc: str, *, each: int = 2, timeout_s: float = 60.0) -> None:
        """`timeout_s`: the clients' own patience, for a request and, over HTTP, for a silence."""
        self._http, self._grpc, self._timeout_s = http, grpc, timeout_s
        self.streams = [Stream(door) for door in ("grpc", "openai") for _ in range(each)]
        self._threads = [
            threading.Thread(target=self._run, args=(stream,), daemon=True)
            for stream in self.streams
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_begun(self, limit_s: float = 30.0) -> None:
        for stream in self.streams:
            assert stream.began.wait(limit_s), f"no token within {limit_s} s: {stream}"

    def wait(self, limit_s: float) -> list[Stream]:
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"still running after {limit_s} s: {self.streams}"
        return self.streams

    def _run(self, stream: Stream) -> None:
        try:
            (self._run_grpc if stream.door == "grpc" else self._run_openai)(stream)
            stream.finished = True
        except Exception as error:
            stream.error = error
        stream.heard.append(time.monotonic())
        stream.began.set()

    def _run_grpc(self, stream: Stream) -> None:
        with Client(self._grpc) as client:
            for chunk in client.generate(
                PROMPT,
                max_tokens=TOKENS,
                temperature=0,
                ignore_eos=True,
                timeout=self._timeout_s,
            ):
                stream.take(chunk.text)

    def _run_openai(self, stream: Stream) -> None:
        with openai.OpenAI(
            base_url=f"{self._http}/v1",
            api_key="none",
            max_retries=0,
            timeout=self._timeout_s,
        ) as client:
            for chunk in client.completions.create(
                model="baton-tiny",
                prompt=PROMPT,
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                stream.take("".join(choice.text for choice in chunk.choices))


TYPED = (RequestError, openai.APIError, httpx.TransportError)
"""What a client raises for a request that failed; anything else is a fault of ours."""


def check_exact_or_typed(streams: list[Stream], expected: str) -> None:
    """Each stream gave the undisturbed text, or a true beginning of it and a typed error."""
    for stream in streams:
        if stream.finished:
            assert stream.text == expected, f"{stream.door} ended well with another text"
        else:
            assert isinstance(stream.error, TYPED), f"{stream.door}: {stream.error!r}"
            assert expected.startswith(stream.text), f"{stream.door}: a wrong beginning"

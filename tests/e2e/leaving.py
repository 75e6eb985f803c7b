"""Clients that go away, each in its own manner; over real sockets."""

import json
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc

from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.cluster import Cluster

DEADLINE_S = 0.7
"""Of the client whose deadline passes, at patience 1."""


@dataclass
class Visitor:
    """One request, and how its client leaves it."""

    request_id: str
    leave: Callable[[], None]
    """Returns when the client is gone."""

    call: object = None
    """Kept, since gRPC cancels a call that nobody refers to."""

    until: float = math.inf
    """When it leaves by itself. Seconds, monotonic."""


def http_stream(cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int) -> Visitor:
    """Closes the connection of a stream."""
    return _http(cluster, request_id, prompt, max_tokens, stream=True)


def http_whole(cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int) -> Visitor:
    """Closes the connection before the answer to a request without a stream."""
    return _http(cluster, request_id, prompt, max_tokens, stream=False)


def _http(
    cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int, *, stream: bool
) -> Visitor:
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    sock = post(cluster, json.dumps(body).encode())
    return Visitor(request_id, sock.close)


def post(cluster: Cluster, body: bytes, *, receive_bytes: int | None = None) -> socket.socket:
    """Sends a completion request and returns its socket, unread.

    Args:
        cluster: whom to ask.
        body: JSON.
        receive_bytes: the socket's receive buffer; None: the system's own.
    """
    address = urlsplit(cluster.http)
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.connect((address.hostname, address.port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def grpc_cancel(cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int) -> Visitor:
    """Cancels the call."""
    channel = grpc.insecure_channel(cluster.grpc)
    call = _generate(channel, request_id, prompt, max_tokens)

    def leave() -> None:
        call.cancel()
        channel.close()

    return Visitor(request_id, leave)


def grpc_vanish(cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int) -> Visitor:
    """Closes the whole connection."""
    channel = grpc.insecure_channel(cluster.grpc)
    call = _generate(channel, request_id, prompt, max_tokens)
    return Visitor(request_id, channel.close, call)


def grpc_deadline(
    cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int, *, patience: int = 1
) -> Visitor:
    """Lets its deadline pass: DEADLINE_S times `patience`."""
    channel = grpc.insecure_channel(cluster.grpc)
    end = time.monotonic() + DEADLINE_S * patience
    call = _generate(channel, request_id, prompt, max_tokens, timeout=DEADLINE_S * patience)

    def leave() -> None:
        time.sleep(max(0.0, end - time.monotonic()))
        channel.close()

    return Visitor(request_id, leave, call, end)


def abort_rpc(cluster: Cluster, request_id: str, prompt: list[int], max_tokens: int) -> Visitor:
    """Stays, and ends its request by the `Abort` call of another connection."""
    channel = grpc.insecure_channel(cluster.grpc)
    call = _generate(channel, request_id, prompt, max_tokens)

    def leave() -> None:
        with grpc.insecure_channel(cluster.grpc) as other:
            stub = inference_pb2_grpc.InferenceStub(other)
            abort = inference_pb2.AbortRequest(request_id=request_id)
            # Another connection: the request itself may still be on its way.
            limit = time.monotonic() + 2.0
            while not stub.Abort(abort, timeout=5.0).found:
                assert time.monotonic() < limit, "the request is unknown"
                time.sleep(0.005)
        reasons = [response.finish_reason for response in call]
        assert reasons[-1] == inference_pb2.FINISH_REASON_ABORT
        channel.close()

    return Visitor(request_id, leave)


def _generate(
    channel: grpc.Channel,
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    timeout: float | None = None,
) -> Any:
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True
        ),
    )
    return inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)


WAYS: dict[str, Callable[..., Visitor]] = {
    "http stream": http_stream,
    "http whole": http_whole,
    "grpc cancel": grpc_cancel,
    "grpc vanish": grpc_vanish,
    "grpc deadline": grpc_deadline,
    "abort": abort_rpc,
}

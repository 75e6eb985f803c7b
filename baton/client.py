"""The blocking client.

    with Client("127.0.0.1:50051") as client:
        print(client.complete("Hi", max_tokens=16).text)

A stream that is left early (a `break`, an exception, `close`) cancels the call, and the end of the
call aborts the request on every worker: nobody computes for a reader who is gone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from baton.connection import ConnectionConfig, config_for
from baton.errors import DeadlineExceeded, RequestError, Unavailable, error_from_call
from baton.messages import (
    Chunk,
    Collector,
    Completion,
    Model,
    ServerInfo,
    chunk_from,
    model_from,
    server_info_from,
)
from baton.options import RequestOptions, build_request
from protos.baton.v1 import inference_pb2, inference_pb2_grpc


class TokenStream:
    """The chunks of one request, in order; an iterator and a context manager."""

    def __init__(
        self, call: Any, request_id: str, failed: Callable[[grpc.RpcError, str], RequestError]
    ) -> None:
        self._call = call
        self._failed = failed
        self.request_id = request_id
        """The request's id; known from the first chunk on where the router chose it."""

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
            RequestError: the router refused or lost the request.
        """
        try:
            chunk = chunk_from(next(self._call))
        except grpc.RpcError as error:
            raise self._failed(error, self.request_id) from None
        self.request_id = chunk.request_id or self.request_id
        return chunk

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # `for chunk in client.generate(...): break` leaves no other trace than this.
        self.close()


class Client:
    """A connection to a router. Safe to share among threads."""

    def __init__(
        self, address: str = "127.0.0.1:50051", *, config: ConnectionConfig | None = None
    ) -> None:
        """Connects lazily: the first call meets a router that is away.

        Args:
            address: host:port of the router's gRPC server; grpcs://host:port speaks TLS.
            config: keep-alive, limits, TLS, API key.

        Raises:
            ValueError: the address asks for plain text where `config` asks for TLS.
        """
        self._config = config_for(address, config)
        self._metadata = self._config.metadata()
        self._channel = self._config.open(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._lost = False

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> TokenStream:
        """Streams the continuation of a prompt.

        Args:
            prompt: text, or token ids.
            timeout: seconds for the whole stream; then it ends with DeadlineExceeded.
            options: max_tokens, temperature, seed ... (`baton.RequestOptions` explains each).

        Raises:
            InvalidRequest: a value that cannot be sent. All else is raised by the stream.
            TypeError: an option that there is none of.
        """
        return self._generate(build_request(prompt, options), timeout)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer at once; arguments as for `generate`.

        Raises:
            RequestError: the router refused or lost the request.
        """
        collector = Collector()
        request = build_request(prompt, options, whole=True)
        with self._generate(request, timeout) as stream:
            for chunk in stream:
                collector.add(chunk)
        return collector.completion()

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Ends a running request; False where none of that id was live.

        Raises:
            RequestError: the router is out of reach.
        """
        try:
            response = self._stub.Abort(
                inference_pb2.AbortRequest(request_id=request_id),
                timeout=self._timeout(timeout),
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise self._failed(error, request_id) from None
        return bool(response.found)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """The models served.

        Raises:
            RequestError: the router is out of reach.
        """
        try:
            response = self._stub.ListModels(
                inference_pb2.ListModelsRequest(),
                timeout=self._timeout(timeout),
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise self._failed(error) from None
        return [model_from(card) for card in response.models]

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """The router's version and its workers.

        Raises:
            RequestError: the router is out of reach.
        """
        try:
            response = self._stub.GetServerInfo(
                inference_pb2.GetServerInfoRequest(),
                timeout=self._timeout(timeout),
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise self._failed(error) from None
        return server_info_from(response)

    def close(self) -> None:
        """Closes the connection; open streams end with Cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> TokenStream:
        call = self._stub.Generate(request, timeout=self._timeout(timeout), metadata=self._metadata)
        return TokenStream(call, request.request_id, self._failed)

    def _failed(self, error: grpc.RpcError, request_id: str = "") -> RequestError:
        failure = error_from_call(error, request_id=request_id)
        self._lost = self._lost or isinstance(failure, Unavailable)
        return failure

    def _timeout(self, timeout: float | None) -> float | None:
        """Seconds that the call may take; waits first where the connection was lost.

        Left to itself, gRPC fails calls at once until its pause between two attempts is over.
        """
        if timeout is None:
            timeout = self._config.default_timeout_s
        if not self._lost or self._config.reconnect_wait_s <= 0:
            return timeout
        wait = self._config.reconnect_wait_s
        began = time.monotonic()
        try:
            self._stub.ListModels(
                inference_pb2.ListModelsRequest(),
                timeout=wait if timeout is None else min(wait, timeout),
                wait_for_ready=True,
                metadata=self._metadata,
            )
            self._lost = False
        except grpc.RpcError as error:
            # Only silence means that there is still no connection; the call itself will say so.
            self._lost = isinstance(error_from_call(error), DeadlineExceeded)
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - began))

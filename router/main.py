"""The router's process: both doors and the registry on one event loop, from start to drain."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.baton.v1 import inference_pb2_grpc, worker_pb2_grpc
from protos.errors import BatonError, ErrorCode
from router import registry_service, service
from router.config import RouterConfig
from router.core import Router
from router.http.app import create_app
from router.registry import InMemoryRegistry

logger = logging.getLogger(__name__)

MIN_PING_INTERVAL_MS = 5_000
"""Keep-alive pings of clients that come more often end their connection."""

MAX_METADATA_BYTES = 64 << 10
SEND_BUFFER_BYTES = 128 << 10
"""The kernel's part per HTTP connection: left to itself it holds megabytes for a reader that has
stopped, and the bounds on streams count from there."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the doors listen."""

    http: int
    grpc: int


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: the router decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RouterServer:
    """A running router. Use it as an async context manager, or call start and stop."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.router = Router(config, InMemoryRegistry())
        self._checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._tasks: list[asyncio.Task[None]] = []
        self._grpc: grpc.aio.Server | None = None
        self._http: _HttpServer | None = None

    async def start(self) -> Ports:
        """Opens both doors. Raises OSError where an address cannot be listened on."""
        config = self.config
        listener = _listen(config.http_host, config.http_port)
        try:
            self._grpc, grpc_port = self._make_grpc()
            await self._grpc.start()
        except BaseException:
            listener.close()
            raise
        self.router.fleet.start()
        self._http = self._make_http()
        self._tasks = [
            asyncio.create_task(self._http.serve(sockets=[listener]), name="http door"),
            asyncio.create_task(self._keep_readiness(), name="readiness"),
        ]
        ports = Ports(http=listener.getsockname()[1], grpc=grpc_port)
        while not self._http.started:
            if self._tasks[0].done():
                self._tasks[0].result()
                raise OSError("the HTTP door did not open")
            await asyncio.sleep(0.005)
        logger.info(
            "HTTP on %s:%d, gRPC on %s:%d",
            config.http_host,
            ports.http,
            config.grpc_host,
            ports.grpc,
        )
        return ports

    async def stop(self, *, drain_timeout_s: float) -> None:
        """Takes no new request, lets those that run finish for so long, then ends all."""
        self.router.draining = True
        await self._checks.enter_graceful_shutdown()
        if self.router.live:
            logger.info("stopping: %d requests to finish", self.router.live)
        if not await self.router.wait_until_idle(drain_timeout_s):
            logger.warning(
                "%d requests did not finish within %.0f s", self.router.live, drain_timeout_s
            )
            self.router.fail_all(BatonError(ErrorCode.UNAVAILABLE, "the router stopped"))
        if self._http is not None:
            self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(grace=1.0)
        if self._tasks:
            http, readiness = self._tasks
            readiness.cancel()
            await asyncio.gather(http, readiness, return_exceptions=True)
        await self.router.close()

    async def __aenter__(self) -> Ports:
        return await self.start()

    async def __aexit__(self, *error: object) -> None:
        await self.stop(drain_timeout_s=0.0)

    def _make_grpc(self) -> tuple[grpc.aio.Server, int]:
        config, router = self.config, self.router
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                # Two routers on one port would each see half of the workers.
                ("grpc.so_reuseport", 0),
                # Clients may ask whether we live while their stream is silent; gRPC's default
                # takes that for an attack and ends the stream after a few pings.
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ]
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(service.InferenceService(router), server)
        worker_pb2_grpc.add_RegistryServicer_to_server(
            registry_service.RegistryService(
                router.fleet.registry, heartbeat_interval_s=config.heartbeat_interval_s
            ),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, server)
        reflection.enable_server_reflection(
            [
                service.SERVICE_NAME,
                registry_service.SERVICE_NAME,
                health.SERVICE_NAME,
                reflection.SERVICE_NAME,
            ],
            server,
        )
        host = f"[{config.grpc_host}]" if ":" in config.grpc_host else config.grpc_host
        address = f"{host}:{config.grpc_port}"
        try:
            return server, server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address} for gRPC: {error}") from error

    def _make_http(self) -> _HttpServer:
        return _HttpServer(
            uvicorn.Config(
                create_app(self.router),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )

    async def _keep_readiness(self) -> None:
        """Readiness by service name; liveness ("") is SERVING from the start."""
        while True:
            ready = not self.router.why_not_ready()
            status = health_pb2.HealthCheckResponse
            await self._checks.set(
                service.SERVICE_NAME, status.SERVING if ready else status.NOT_SERVING
            )
            await self.router.fleet.wait_for_change(1.0)


async def serve(config: RouterConfig, *, ready: Callable[[Ports], None] | None = None) -> None:
    """Runs a router until SIGINT or SIGTERM; a second signal ends the drain.

    Args:
        config: the settings.
        ready: called once, when both doors are open.

    Raises:
        OSError: an address cannot be listened on.
    """
    server = RouterServer(config)
    async with _signals() as (stop, hurry):
        try:
            ports = await server.start()
            if ready is not None:
                ready(ports)
            await stop.wait()
        finally:
            stopping = asyncio.create_task(server.stop(drain_timeout_s=config.drain_timeout_s))
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                server.router.fail_all(BatonError(ErrorCode.UNAVAILABLE, "the router stopped"))
            hurrying.cancel()
            await stopping


def run(config: RouterConfig, *, ready: Callable[[Ports], None] | None = None) -> None:
    """`serve` on a loop of its own: uvloop where it is installed."""
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve(config, ready=ready))
    else:
        uvloop.run(serve(config, ready=ready))


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """(stop, hurry): set by the first and the second SIGINT or SIGTERM."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    numbers: list[signal.Signals] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only a main thread takes signals; elsewhere the caller cancels.
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, on_signal)
            numbers.append(number)
    try:
        yield stop, hurry
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError that names the address."""
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind((host, port))
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"cannot listen on {host}:{port} for HTTP: {error.strerror}"
        ) from error
    return listener

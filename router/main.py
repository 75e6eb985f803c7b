"""The router's process: both doors and the registry on one event loop, from start to drain."""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2

from observability import logs
from protos.errors import BatonError, ErrorCode
from router import limits, service, tls
from router.config import RouterConfig
from router.core import Router
from router.grpc_doors import make_grpc_doors
from router.http.app import create_app
from router.http.connection import BoundedProtocol, ConnectionBounds
from router.registry_choice import make_registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the doors listen."""

    http: int
    grpc: int
    workers: int
    """Where workers register: the gRPC door, or their own (`workers_apart`)."""


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: the router decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RouterServer:
    """A running router. Use it as an async context manager, or call start and stop."""

    def __init__(self, config: RouterConfig) -> None:
        """Raises RegistryUnavailableError (an OSError): the registry asked for cannot be made."""
        self.config = config
        self.router = Router(config, make_registry(config))
        self._checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._tasks: list[asyncio.Task[None]] = []
        self._grpc: list[grpc.aio.Server] = []
        self._http: _HttpServer | None = None

    async def start(self) -> Ports:
        """Opens both doors. Raises OSError where an address cannot be listened on."""
        config = self.config
        listener = _listen(config)
        http_connections, grpc_connections = limits.allow_files(
            config.max_connections, config.max_grpc_connections
        )
        try:
            doors = make_grpc_doors(self.router, self._checks, max_connections=grpc_connections)
            self._grpc = doors.servers
            for server in self._grpc:
                await server.start()
        except BaseException:
            listener.close()
            raise
        await self.router.fleet.start()
        self._http = self._make_http(max_connections=http_connections)
        self._tasks = [
            asyncio.create_task(self._http.serve(sockets=[listener]), name="http door"),
            asyncio.create_task(self._keep_readiness(), name="readiness"),
        ]
        ports = Ports(
            http=listener.getsockname()[1], grpc=doors.clients_port, workers=doors.workers_port
        )
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
        # Not ready, yet alive: a liveness probe must not end what a drain lets finish.
        await self._checks.set(service.SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.router.live:
            logger.info("stopping: %d requests to finish", self.router.live)
        if not await self.router.wait_until_idle(drain_timeout_s):
            logger.warning(
                "%d requests did not finish within %.0f s", self.router.live, drain_timeout_s
            )
            self.router.fail_all(BatonError(ErrorCode.UNAVAILABLE, "the router stopped"))
        if self._http is not None:
            self._http.should_exit = True
        await asyncio.gather(*(server.stop(grace=1.0) for server in self._grpc))
        for watch in self.router.metrics.refusals.doors.values():
            watch.close()
        if self._tasks:
            http, readiness = self._tasks
            readiness.cancel()
            await asyncio.gather(http, readiness, return_exceptions=True)
        await self.router.close()

    async def __aenter__(self) -> Ports:
        return await self.start()

    async def __aexit__(self, *error: object) -> None:
        await self.stop(drain_timeout_s=0.0)

    def _make_http(self, *, max_connections: int) -> _HttpServer:
        config = self.config
        bounds = ConnectionBounds(
            head_timeout_s=config.head_timeout_s,
            write_timeout_s=config.write_timeout_s,
            max_header_bytes=config.max_header_bytes,
            max_connections=max_connections,
            tls_handshake_s=limits.HANDSHAKE_TIMEOUT_MS / 1e3 if config.tls_cert else 0.0,
            on_refused=self.router.metrics.refusals.http_connection,
        )
        protocol: Any = functools.partial(BoundedProtocol, bounds=bounds)
        return _HttpServer(
            uvicorn.Config(
                create_app(self.router),
                http=protocol,
                ws="none",
                h11_max_incomplete_event_size=config.max_header_bytes,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
                **tls.uvicorn_options(config),
            )
        )

    async def _keep_readiness(self) -> None:
        """Readiness by service name; liveness ("") is SERVING from the start."""
        files = tls.clients_files(self.config)
        while True:
            if files is not None and files.changed() and self._http is not None:
                tls.renew(self._http.config, self.config)
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
    logs.configure(level=config.log_level, format=config.log_format, facts={"role": "router"})
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


def _listen(config: RouterConfig) -> socket.socket:
    """The HTTP door's listening socket. Raises OSError that names the address."""
    host, port = config.http_host, config.http_port
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limits.bound_http_socket(listener, config)
        listener.bind((host, port))
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno, f"cannot listen on {host}:{port} for HTTP: {error.strerror}"
        ) from error
    return listener

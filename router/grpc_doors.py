"""The gRPC doors: the clients', and the workers' where they do not share it.

Whoever may register a worker is given prompts and answers, so a door that asks clients for TLS or
an API key takes no workers. They have a door of their own then, behind mutual TLS or, without
`tls_ca`, on an address that others cannot reach; what it tells of the public service serves
operators there, who need no key.
"""

import functools
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.baton.v1 import inference_pb2, inference_pb2_grpc, worker_pb2_grpc
from protos.door_watch import DoorWatch, PlainDoorWatch, TlsDoorWatch
from protos.slow_senders import SlowSenders
from protos.tls import ServerFiles
from router import limits, registry_service, service, tls
from router.core import Router


@dataclass(frozen=True, slots=True)
class GrpcDoors:
    """Servers that are bound to their ports, not started yet."""

    servers: list[grpc.aio.Server]
    clients_port: int
    workers_port: int
    """Where workers register: the clients' port, or their own (`workers_apart`)."""


class _Overview(inference_pb2_grpc.InferenceServicer):
    """What the workers' door tells of the public service: no requests, just what is there."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        return service.models_of(self._router)

    async def GetServerInfo(
        self,
        request: inference_pb2.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.GetServerInfoResponse:
        return await service.server_info_of(self._router)


def make_grpc_doors(
    router: Router, checks: health.HealthServicer, *, max_connections: int
) -> GrpcDoors:
    """Args: max_connections: of each door.

    Raises OSError: a port cannot be listened on, or a file of TLS cannot be used.
    """
    config = router.config
    files = tls.clients_files(config)
    door = functools.partial(_Door, router, checks, max_connections=max_connections)
    clients = door(name="grpc", files=files)
    clients.add(service.SERVICE_NAME)
    inference_pb2_grpc.add_InferenceServicer_to_server(
        service.InferenceService(router), clients.server
    )
    if not config.workers_apart:
        clients.add_registry()
        port = clients.bind(config.grpc_host, config.grpc_port)
        return GrpcDoors([clients.server], port, port)
    port = clients.bind(config.grpc_host, config.grpc_port)
    workers = door(name="workers", files=tls.workers_files(config))
    workers.add(service.SERVICE_NAME)
    inference_pb2_grpc.add_InferenceServicer_to_server(_Overview(router), workers.server)
    workers.add_registry()
    workers_port = workers.bind(config.workers_host, config.workers_port)
    return GrpcDoors([clients.server, workers.server], port, workers_port)


class _Door:
    """One server in the making."""

    def __init__(
        self,
        router: Router,
        checks: health.HealthServicer,
        *,
        max_connections: int,
        name: str,
        files: ServerFiles | None,
    ) -> None:
        """`name`: as metrics show it; `files`: of TLS, None: plain text."""
        self._router = router
        self._names = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._name = name
        self._credentials = None
        self.watch: DoorWatch = PlainDoorWatch()
        if files is not None:
            self.watch = watch = TlsDoorWatch()
            self._credentials = files.credentials(on_connection=watch.on_connection)
        interceptors: list[Any] = [self.watch, SlowSenders(router.config.body_timeout_s)]
        self.server = grpc.aio.server(
            options=limits.grpc_options(router.config, max_connections=max_connections),
            interceptors=interceptors,
        )
        health_pb2_grpc.add_HealthServicer_to_server(checks, self.server)

    def add(self, name: str) -> None:
        """The server's reflection knows this service."""
        self._names.append(name)

    def add_registry(self) -> None:
        self.add(registry_service.SERVICE_NAME)
        worker_pb2_grpc.add_RegistryServicer_to_server(
            registry_service.RegistryService(
                self._router.fleet,
                heartbeat_interval_s=self._router.config.heartbeat_interval_s,
                max_workers=self._router.config.max_workers,
                on_refused=self._router.metrics.refusals.worker,
            ),
            self.server,
        )

    def bind(self, host: str, port: int) -> int:
        """The port that it got. Raises OSError that names the address."""
        reflection.enable_server_reflection(self._names, self.server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = self.server.add_insecure_port(address)
            else:
                bound = self.server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address} for gRPC: {error}") from error
        if self.watch.begin(bound):
            self._router.metrics.refusals.doors[self._name] = self.watch
        return bound

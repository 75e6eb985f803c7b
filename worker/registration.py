"""Keeps a worker known to its routers: registers, heartbeats, registers again after a restart.

A worker that is told of several routers registers with each: they may share a registry, and then
one would do, or have each its own.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.tls import PLAIN, TlsSettings, open_channel

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""Pause after a router that could not be reached; short, so that start-up order does not matter."""

REFUSED_RETRY_S = 5.0
"""Pause after a refusal: an operator must change something first."""

RPC_TIMEOUT_S = 2.0

REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Answers that will be the same the next time."""

GOODBYE_RETRY_S = 0.2
"""Pause after a goodbye that nobody acknowledged."""

LOST_ROUTERS = 2
"""So often in a row a router that is told goodbye may turn out to be no longer there: once for a
connection that broke, and once for a new one."""

CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    # Behind one name there may be several routers, of which some are gone: look anew, soon.
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
]


def router_addresses(setting: str) -> list[str]:
    """'a:1, b:2' → ['a:1', 'b:2'], each once; nothing where a worker is to be found instead."""
    return list(dict.fromkeys(part.strip() for part in setting.split(",") if part.strip()))


async def register_with_all(
    routers: Sequence[str],
    *,
    request: worker_pb2.RegisterRequest,
    status: Callable[[], worker_pb2.WorkerStatus],
    leaving: Callable[[], bool] = lambda: False,
    leave_by: Callable[[], float] = time.monotonic,
    tls: TlsSettings = PLAIN,
) -> None:
    """Keeps a worker known to every router until cancelled, and then tells them that it goes. One
    that does not answer is told again until `leave_by`, time.monotonic() seconds. A router that
    has struck it off when it is `leaving` is not asked to list it again.
    """
    if not routers:
        logger.info("no router is named: waiting to be found at %s", request.address)
        await asyncio.Event().wait()
    # A group cancels each once: a second time would cut their goodbyes short.
    async with asyncio.TaskGroup() as group:
        for router in routers:
            registration = Registration(
                router=router,
                request=request,
                status=status,
                leaving=leaving,
                leave_by=leave_by,
                tls=tls,
            )
            group.create_task(registration.run(), name=f"registration with {router}")


class Registration:
    """One worker's membership in one router's registry."""

    def __init__(
        self,
        *,
        router: str,
        request: worker_pb2.RegisterRequest,
        status: Callable[[], worker_pb2.WorkerStatus],
        leaving: Callable[[], bool] = lambda: False,
        leave_by: Callable[[], float] = time.monotonic,
        tls: TlsSettings = PLAIN,
    ) -> None:
        self._leaving = leaving
        self._leave_by = leave_by
        self._listed = False
        """The router has accepted it at some time."""
        self._tls = tls
        self._router = router
        self._request = request
        self._status = status

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                # Anew after each failure: a certificate may have been replaced since.
                channel = open_channel(self._router, tls=self._tls, options=CHANNEL_OPTIONS)
            except OSError as error:
                logger.error("no connection to router %s: %s", self._router, error)
                await asyncio.sleep(REFUSED_RETRY_S)
                continue
            async with channel:
                stub = worker_pb2_grpc.RegistryStub(channel)
                try:
                    await self._register_and_beat(stub)
                except asyncio.CancelledError:
                    await self._leave(stub)
                    raise

    async def _leave(self, stub: worker_pb2_grpc.RegistryStub) -> None:
        goodbye = worker_pb2.DeregisterRequest(instance_id=self._request.instance_id)
        lost = 0
        while lost < LOST_ROUTERS:
            try:
                await stub.Deregister(goodbye, timeout=RPC_TIMEOUT_S)
            except asyncio.CancelledError:
                return
            except grpc.RpcError as error:
                if error.code() in REFUSALS:
                    logger.warning("router %s refused a goodbye: %s", self._router, error)
                    return
                gone = error.code() is grpc.StatusCode.UNAVAILABLE
                lost = lost + 1 if gone else 0
                # A router that has ended before its workers is nothing out of the ordinary.
                level = logging.DEBUG if gone else logging.WARNING
                logger.log(level, "router %s was not told goodbye: %s", self._router, error)
            else:
                return
            if not self._listed or time.monotonic() >= self._leave_by():
                return
            await asyncio.sleep(GOODBYE_RETRY_S)

    async def _register_and_beat(self, stub: worker_pb2_grpc.RegistryStub) -> None:
        try:
            reply = await stub.Register(self._request, timeout=RPC_TIMEOUT_S)
        except grpc.RpcError as error:
            logger.debug("router %s cannot be reached: %s", self._router, error)
            await asyncio.sleep(RETRY_S)
            return
        if not reply.accepted:
            logger.error(
                "router %s lists but does not use this worker: %s", self._router, reply.reason
            )
            await asyncio.sleep(REFUSED_RETRY_S)
            return
        self._listed = True
        logger.info("registered with router %s as %s", self._router, self._request.instance_id)
        while True:
            await asyncio.sleep(reply.heartbeat_interval_s or 1.0)
            try:
                beat = await stub.Heartbeat(
                    worker_pb2.HeartbeatRequest(
                        instance_id=self._request.instance_id, status=self._status()
                    ),
                    timeout=RPC_TIMEOUT_S,
                )
            except grpc.RpcError as error:
                logger.warning("heartbeat to router %s failed: %s", self._router, error)
                return
            if not beat.known:
                if self._leaving():
                    await asyncio.Event().wait()
                return

"""`baton up`: a router and its workers as processes of one machine.

Two promises shape this file. Standard output gets one line, when everything is ready, so that a
script can wait for it. And nothing is left running: children sit in process groups of their own,
are stopped router first (so that requests drain), and are tied to this process should it be
killed.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.aio import AsyncClient
from baton.config import settings_of
from baton.errors import RequestError
from baton.messages import ServerInfo
from baton.plan import Plan, PlannedWorker, UpConfig
from baton.processes import Child, OnLine, child_command, child_environment, child_secrets
from router.config import RouterConfig
from worker.config import WorkerConfig

ROUTER = "router"
SERVICE = "baton.v1.Inference"
POLL_S = 0.1
PROGRESS_EVERY_S = 5.0
RESTART_DELAY_S = 1.0
ROUTER_GRACE_S = 5.0

Say = Callable[[str], None]
T = TypeVar("T")


class StartError(Exception):
    """The deployment did not become ready; the message ends with the culprit's last lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A deployment that takes requests."""

    http_url: str
    grpc_address: str
    grpc_url: str
    """The same as clients take it, with the scheme that says whether it speaks TLS."""

    model: str
    workers: str
    """How many of each role there are: "prefill 1  decode 2"."""

    transport: str
    """The transport that all workers with peers share and prefer; "none" where nothing moves."""

    def line(self) -> str:
        return (
            f"ready: {self.http_url}  {self.grpc_url}  model {self.model}  "
            f"{self.workers}  transport {self.transport}"
        )


class Deployment:
    """The processes of one plan; `async with` stops them all at its end."""

    def __init__(self, plan: Plan, *, say: Say, on_line: OnLine) -> None:
        """
        Args:
            plan: what to start.
            say: gets the deployment's own progress, one line at a time.
            on_line: gets every line that a child writes.
        """
        self._plan = plan
        self._say = say
        self._on_line = on_line
        self._router: Child | None = None
        self._workers: dict[str, Child] = {}
        settings = settings_of(UpConfig, RouterConfig, WorkerConfig).values()
        self._environment = child_environment(
            os.environ, settings=[setting.variable for setting in settings]
        )

    async def start(self) -> Ready:
        """Starts everything and waits until the router gives out work to every worker.

        Raises:
            StartError: a child ended, or `start_timeout_s` went by.
        """
        plan = self._plan
        self._say(f"starting router, {', '.join(f'{n} {role}' for role, n in _counts(plan.up))}")
        self._router = await self._start_child(ROUTER, plan.router, command=ROUTER)
        for worker in plan.workers:
            await self._start_worker(worker)
        started = time.monotonic()
        try:
            async with asyncio.timeout(plan.up.start_timeout_s):
                return await self._wait_until_ready(started)
        except TimeoutError:
            raise StartError(
                f"not ready after {plan.up.start_timeout_s:.0f} s (--start-timeout-s)"
            ) from None

    async def supervise(self) -> int:
        """Watches the children until the router ends, which is a failure: 1.

        A worker that dies is announced, and started anew with --restart.
        """
        watches = {
            asyncio.create_task(self._watch_worker(worker), name=f"watch {worker.name}")
            for worker in self._plan.workers
        }
        try:
            router = self._router
            if router is None:
                return 1
            await router.wait()
            self._say(f"the router {router.describe_end()}: stopping")
            return 1
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def stop(self) -> None:
        """Stops the router first, so that running requests finish, then the workers."""
        if self._router is not None:
            self._router.terminate()
            limit = self._plan.router.drain_timeout_s + ROUTER_GRACE_S
            if not await self._router.end(within_s=limit):
                self._say(f"the router did not drain within {limit:.0f} s and was killed")
        for child in self._workers.values():
            child.terminate()
        limit = self._plan.up.stop_timeout_s
        ended = await asyncio.gather(
            *(child.end(within_s=limit) for child in self._workers.values())
        )
        for child, punctual in zip(self._workers.values(), ended, strict=True):
            if not punctual:
                self._say(f"{child.name} did not end within {limit:.0f} s and was killed")

    def kill(self) -> None:
        """Ends everything at once."""
        for child in self._children():
            child.kill()

    async def __aenter__(self) -> "Deployment":
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            await self.stop()
        finally:
            self.kill()

    # ---- start ----------------------------------------------------------------------------------

    def _children(self) -> list[Child]:
        router = [] if self._router is None else [self._router]
        return router + list(self._workers.values())

    async def _start_child(
        self, name: str, config: RouterConfig | WorkerConfig, *, command: str
    ) -> Child:
        return await Child.start(
            name,
            child_command(command, config),
            environment={**self._environment, **child_secrets(config)},
            on_line=self._on_line,
        )

    async def _start_worker(self, worker: PlannedWorker) -> None:
        self._workers[worker.name] = await self._start_child(
            worker.name, worker.config, command=worker.role
        )

    async def _wait_until_ready(self, started: float) -> Ready:
        plan = self._plan
        announced = started
        connection = plan.workers_connection()
        async with (
            AsyncClient(plan.workers_address, config=connection) as client,
            connection.open_async(plan.workers_address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                await self._check_alive()
                count = 0
                with contextlib.suppress(RequestError, grpc.RpcError):
                    info = await client.server_info(timeout=2.0)
                    count = len(ready_workers(info))
                    if count >= len(plan.workers) and await _is_serving(health):
                        models = await client.models(timeout=2.0)
                        name = models[0].id if models else plan.router.served_model_name
                        return self._ready(info, name)
                now = time.monotonic()
                if now - announced >= PROGRESS_EVERY_S:
                    announced = now
                    self._say(
                        f"waiting: {count} of {len(plan.workers)} workers are ready "
                        f"({now - started:.0f} s)"
                    )
                await asyncio.sleep(POLL_S)

    async def _check_alive(self) -> None:
        for child in self._children():
            if not child.is_running:
                await child.drain_output()
                said = "".join(f"\n  {line}" for line in child.last_lines)
                raise StartError(f"{child.name} {child.describe_end()} during start{said}")

    def _ready(self, info: ServerInfo, model: str) -> Ready:
        secure = bool(self._plan.router.tls_cert)
        return Ready(
            http_url=f"{'https' if secure else 'http'}://{self._plan.http_address}/v1",
            grpc_address=self._plan.grpc_address,
            grpc_url=f"{'grpcs' if secure else 'grpc'}://{self._plan.grpc_address}",
            model=model,
            workers="  ".join(f"{role} {n}" for role, n in _counts(self._plan.up)),
            transport=common_transport(info),
        )

    # ---- life -----------------------------------------------------------------------------------

    async def _watch_worker(self, worker: PlannedWorker) -> None:
        while True:
            child = self._workers[worker.name]
            await child.wait()
            # Its engine process must not linger, nor hold a device that a successor needs.
            child.kill()
            ending = f"{worker.name} (pid {child.pid}) {child.describe_end()}"
            if not self._plan.up.restart:
                self._say(f"{ending}: going on without it")
                return
            self._say(f"{ending}: starting it anew")
            await asyncio.sleep(RESTART_DELAY_S)
            await self._start_worker(worker)


def ready_workers(info: ServerInfo) -> list[str]:
    """Ids of the workers that get requests."""
    return [worker.id for worker in info.workers if worker.state == "ready"]


def _counts(up: UpConfig) -> list[tuple[str, int]]:
    """Roles that are played, and by how many."""
    counts = {"prefill": up.prefill, "decode": up.decode, "unified": up.unified}
    return [(role, count) for role, count in counts.items() if count]


def common_transport(info: ServerInfo) -> str:
    """The first transport, in the workers' order of preference, that all of them offer. Unified
    workers, which move nothing, are not asked; "none" where there are no others.
    """
    offers = [w.transports for w in info.workers if w.state == "ready" and w.role != "unified"]
    if not offers:
        return "none"
    return next((name for name in offers[0] if all(name in offer for offer in offers)), "none")


async def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    response = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=2.0)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def run_up(plan: Plan) -> int:
    """Runs a plan until SIGINT or SIGTERM; the exit status.

    A first signal stops in order, a second one kills.
    """
    stopping = asyncio.Event()
    deployment = Deployment(plan, say=_say, on_line=_log_line)

    def on_signal() -> None:
        if stopping.is_set():
            _say("killing")
            deployment.kill()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if plan.model.is_random:
        _say(f"no model given: serving {plan.model.name}, random weights whose text is noise")
    stop_asked = asyncio.create_task(stopping.wait())
    try:
        async with deployment:
            starting = asyncio.create_task(deployment.start())
            ready = await _first(starting, stop_asked)
            if ready is None:
                return 0
            print(ready.line(), flush=True)
            supervising = asyncio.create_task(deployment.supervise())
            status = await _first(supervising, stop_asked)
            if status is None:
                _say("stopping")
                return 0
            return status
    except StartError as error:
        _say(str(error))
        return 1
    finally:
        stop_asked.cancel()


async def _first(work: asyncio.Task[T], stop_asked: asyncio.Task[bool]) -> T | None:
    """The result of `work`, or None where the user asked to stop before; then it is cancelled."""
    await asyncio.wait({work, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        return work.result()
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, StartError):
        await work
    return None


def _say(text: str) -> None:
    print(f"baton: {text}", file=sys.stderr, flush=True)


def _log_line(name: str, line: str) -> None:
    # A JSON line says itself whose it is, and is to stay one.
    shown = line if line.startswith("{") else f"[{name}] {line}"
    print(shown, file=sys.stderr, flush=True)

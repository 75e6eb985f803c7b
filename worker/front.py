"""The front of a worker: gRPC on one side, its engine process on the other, nothing in between.

Requests pass through untouched; the front only remembers which router asked for which request, so
that answers find their way back and a lost router's requests are aborted.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import signal
import sys
import time
import uuid
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from kvtransfer.host import pid_namespace
from observability import logs
from protos.baton.v1 import channel_pb2, inference_pb2, kv_pb2, worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION
from worker.config import WorkerConfig
from worker.drain import DrainClock
from worker.engine_handle import EngineHandle, EngineStartError
from worker.front_metrics import FrontMetrics
from worker.peer_lists import PeerLists
from worker.refusals import WorkerRefusals
from worker.registration import register_with_all, router_addresses
from worker.server import WorkerServer
from worker.service import RouterSession, WorkerService

logger = logging.getLogger(__name__)

SERVICE_NAME = "baton.v1.Worker"
STATUS_TIMEOUT_S = 2.0
PROBE_TIMEOUT_S = 60.0
LEAVE_LIMIT_S = 2.0
"""What a drained worker gives its routers to hear its last words, where the drain took all of its
time; else the rest of that."""
DEAD_GRACE_S = 0.5
"""Longest the front of a dead engine tries to take its leave of the router."""


class FrontRole(Protocol):
    """What a role adds to the common front."""

    engine_module: str
    role: inference_pb2.WorkerRole
    takes: str
    """The kind of RouterMessage that brings this role a request."""

    def attach(self, front: "WorkerFront", server: grpc.aio.Server) -> list[str]:
        """Called once before the server starts; returns the names of services added."""
        ...

    def on_peers(self, peers: worker_pb2.PeerUpdate) -> None:
        """The other role's workers, as all routers together list them now."""
        ...

    def on_engine_message(self, message: channel_pb2.EngineToFront) -> None:
        """KV messages of the engine, for the role's peer sessions."""
        ...

    async def close(self) -> None: ...


class WorkerFront:
    """One worker process group, from start to drain."""

    def __init__(self, config: WorkerConfig, role: FrontRole) -> None:
        self.config = config
        self.role = role
        self.instance_id = (
            f"{inference_pb2.WorkerRole.Name(role.role)[12:].lower()}-{uuid.uuid4().hex[:12]}"
        )
        self.engine = EngineHandle(module=role.engine_module)
        self.ready = channel_pb2.EngineReady()
        self.address = ""
        self.refusals = WorkerRefusals()
        self.metrics = FrontMetrics(self, role.role)
        self._sessions: set[RouterSession] = set()
        self._unattended = asyncio.Event()
        """No router has a session."""
        self._unattended.set()
        self._owners: dict[tuple[str, int], RouterSession] = {}
        self._pings: dict[int, tuple[RouterSession, int]] = {}
        self._queries: dict[int, asyncio.Future[worker_pb2.WorkerStatus]] = {}
        self._probes: dict[int, asyncio.Future[worker_pb2.ProbeReport]] = {}
        self._nonces = itertools.count(1)
        self._status = worker_pb2.WorkerStatus(
            instance_id=self.instance_id, state=inference_pb2.WORKER_STATE_READY
        )
        self._epoch = time.time_ns() // 1_000_000
        self._drain = DrainClock()
        self._leave_by = math.inf
        """It has begun to take its leave, and goes then. time.monotonic() seconds."""
        self._peer_lists = PeerLists()
        self._peer_states: dict[str, worker_pb2.PeerState] = {}

    # ---- life -----------------------------------------------------------------------------------

    async def run(self) -> int:
        """Starts engine and server, serves until drained or the engine dies; the exit status."""
        try:
            door = WorkerServer(self.config)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        try:
            start = {"instance_id": self.instance_id, **dataclasses.asdict(self.config)}
            self.ready = await self.engine.start(
                json.dumps(start).encode(),
                on_progress=lambda line: logger.info("%s", line),
            )
        except EngineStartError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            await self.engine.stop()
            return 1
        server = door.grpc
        checks = HealthServicer()
        service = WorkerService(self, on_refused=self.refusals.router)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
        names += self.role.attach(self, server)
        reflection.enable_server_reflection(names, server)
        try:
            self.address = door.bind()
            self.refusals.door = door.watch
            await self.metrics.start()
        except OSError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            await self.engine.stop()
            return 1
        await server.start()
        await checks.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        logger.info("%s serves on %s", self.instance_id, self.address)
        return await self._serve(door, checks)

    async def _serve(self, door: WorkerServer, checks: HealthServicer) -> int:
        registration = asyncio.create_task(
            register_with_all(
                router_addresses(self.config.router),
                request=self.describe(),
                status=lambda: self._status,
                leaving=lambda: self._leave_by < math.inf,
                leave_by=lambda: self._leave_by,
                tls=self.config,
            )
        )
        pump = asyncio.create_task(self.engine.pump(self._on_engine_message))
        draining = asyncio.create_task(self._drain_when_asked(checks))
        await asyncio.wait({pump, draining}, return_when=asyncio.FIRST_COMPLETED)
        died = pump.done()
        if died:
            logger.error("the engine process died: this worker ends with it")
            self._leave_by = time.monotonic()
            for session in list(self._sessions):
                session.break_off("the engine process died")
        else:
            await self._take_leave()
        for task in (registration, draining):
            task.cancel()
        # Leaving the list is a courtesy: a dead engine's front must be gone within a second.
        await asyncio.wait({registration}, timeout=DEAD_GRACE_S if died else None)
        for session in list(self._sessions):
            session.close()
        await self.role.close()
        await self.metrics.stop()
        await door.stop(grace_s=0.0 if died else 1.0)
        status = await self.engine.stop()
        pump.cancel()
        return status or int(died)

    async def _drain_when_asked(self, checks: HealthServicer) -> None:
        await self._drain.begun.wait()
        logger.info("draining: %d requests to finish", len(self._owners))
        self._status.state = inference_pb2.WORKER_STATE_DRAINING
        for session in self._sessions:
            # Unasked for, since the next ping may be half a second away.
            session.send(worker_pb2.WorkerMessage(pong=worker_pb2.Pong(status=self._status)))
        await checks.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.engine.send(channel_pb2.FrontToEngine(drain=True))
        if await self._drain.in_time():
            return
        logger.warning("%d requests did not finish and are handed over", len(self._owners))
        for session in list(self._sessions):
            session.close()
        # Their routers replay them elsewhere; here, no page may go while a peer still reads it.
        self._drain.start_again(self.config.lease_s)
        if not await self._drain.in_time():
            logger.error("%d requests are still held past their lease", len(self._owners))

    async def _take_leave(self) -> None:
        """Waits until every router has read all that it is told: it ends its session when it comes
        to the goodbye. One that stands still may do so for as long as the drain has time.
        """
        left_s = max(LEAVE_LIMIT_S, self._drain.left_s)
        self._leave_by = time.monotonic() + left_s
        for session in list(self._sessions):
            self._say_goodbye(session)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._unattended.wait()

    def _say_goodbye(self, session: RouterSession) -> None:
        if self._drain.done.is_set():
            session.send(worker_pb2.WorkerMessage(goodbye=worker_pb2.Goodbye()))
        else:
            session.close()

    def drain(self, timeout_s: float | None = None) -> None:
        """Takes no new request, finishes what runs, then ends.

        Args:
            timeout_s: what still runs then is handed over; None: as configured. Of several calls
                the earliest end counts.
        """
        self._drain.begin(self.config.drain_timeout_s if timeout_s is None else timeout_s)

    def describe(self) -> worker_pb2.RegisterRequest:
        """What it registers with."""
        return worker_pb2.RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            instance_id=self.instance_id,
            role=self.role.role,
            address=self.address,
            model=self.ready.model,
            pid=os.getpid(),
            engine_pids=[self.ready.engine_pid, *self.ready.rank_pids],
            transports=[offer.name for offer in self.ready.transports],
            fingerprint=self.ready.fingerprint,
            epoch=self._epoch,
            metrics_address=self.metrics.address,
        )

    def connect_info(self) -> kv_pb2.ConnectInfo:
        """What this worker tells a peer at the beginning of a KV session."""
        return kv_pb2.ConnectInfo(
            protocol_version=PROTOCOL_VERSION,
            instance_id=self.instance_id,
            fingerprint=self.ready.fingerprint,
            transports=self.ready.transports,
            pid=self.ready.engine_pid,
            pid_namespace=pid_namespace(),
            page_size=self.ready.model.page_size,
            tp_size=self.config.tensor_parallel_size,
            more_pids=self.ready.rank_pids,
        )

    # ---- router -> engine -----------------------------------------------------------------------

    def on_session_opened(self, session: RouterSession) -> worker_pb2.WorkerHello:
        self._sessions.add(session)
        self._unattended.clear()
        for state in self._peer_states.values():
            session.send(worker_pb2.WorkerMessage(peer=state))
        if self._leave_by < math.inf:
            self._say_goodbye(session)
        return worker_pb2.WorkerHello(
            instance_id=self.instance_id, fingerprint=self.ready.fingerprint, status=self._status
        )

    def on_session_closed(self, session: RouterSession) -> None:
        self._sessions.discard(session)
        if not self._sessions:
            self._unattended.set()
        self.role.on_peers(self._peer_lists.leave(session))
        self._pings = {n: asked for n, asked in self._pings.items() if asked[0] is not session}
        for (request_id, attempt), owner in list(self._owners.items()):
            if owner is session:
                self._abort(request_id, attempt, "the router's session ended")

    def on_router_message(self, session: RouterSession, message: worker_pb2.RouterMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind in ("reserve", "prefill", "generate"):
            self._accept(session, message, kind)
        elif kind == "ticket":
            if self._owns(session, message.ticket):
                self.engine.send(channel_pb2.FrontToEngine(ticket=message.ticket))
        elif kind == "abort":
            if self._owns(session, message.abort):
                self._abort(message.abort.request_id, message.abort.attempt, message.abort.reason)
        elif kind == "peers":
            self._take_peers(session, message.peers)
        elif kind == "ping":
            # Through the engine and back: a stopped engine must not look alive.
            nonce = next(self._nonces)
            self._pings[nonce] = (session, message.ping.nonce)
            self.engine.send(channel_pb2.FrontToEngine(ping=nonce))

    def _take_peers(self, session: RouterSession, update: worker_pb2.PeerUpdate) -> None:
        self.role.on_peers(self._peer_lists.say(session, update))
        for peer in update.peers:
            # A session that another router brought about is no news to come for this one.
            state = self._peer_states.get(peer.instance_id)
            if state is not None:
                session.send(worker_pb2.WorkerMessage(peer=state))

    def _owns(
        self, session: RouterSession, work: worker_pb2.TicketForPrefill | worker_pb2.AbortWork
    ) -> bool:
        """A router speaks of its own requests only: another's may bear the same id."""
        return self._owners.get((work.request_id, work.attempt)) is session

    def _accept(self, session: RouterSession, message: worker_pb2.RouterMessage, kind: str) -> None:
        request = getattr(message, kind)
        key = (request.request_id, request.attempt)
        if key in self._owners:
            self._refuse(session, key, worker_pb2.ERROR_CODE_ALREADY_EXISTS, "is live already")
        elif kind != self.role.takes:
            self._refuse(
                session,
                key,
                worker_pb2.ERROR_CODE_FAILED_PRECONDITION,
                f"came as {kind}; this worker takes {self.role.takes}",
            )
        elif self._drain.begun.is_set():
            self._refuse(
                session,
                key,
                worker_pb2.ERROR_CODE_UNAVAILABLE,
                "met a draining worker",
                turned_away=True,
            )
        else:
            self._owners[key] = session
            self.metrics.on_accepted(key, request)
            self.engine.send(channel_pb2.FrontToEngine(**{kind: request}))

    def _refuse(
        self,
        session: RouterSession,
        key: tuple[str, int],
        code: worker_pb2.ErrorCode,
        why: str,
        *,
        turned_away: bool = False,
    ) -> None:
        failed = worker_pb2.WorkFailed(
            request_id=key[0],
            attempt=key[1],
            error=worker_pb2.Error(code=code, message=f"request {key[0]} {why}"),
            retryable=turned_away,
            turned_away=turned_away,
        )
        session.send(worker_pb2.WorkerMessage(failed=failed))

    def _abort(self, request_id: str, attempt: int, reason: str) -> None:
        work = worker_pb2.AbortWork(request_id=request_id, attempt=attempt, reason=reason)
        self.engine.send(channel_pb2.FrontToEngine(abort=work))

    # ---- engine -> router -----------------------------------------------------------------------

    async def _on_engine_message(self, message: channel_pb2.EngineToFront) -> None:
        kind = message.WhichOneof("kind")
        if kind == "step":
            self._route_step(message.step)
            self.metrics.on_step(message.step)
        elif kind == "reserved":
            self._route(message.reserved, worker_pb2.WorkerMessage(reserved=message.reserved))
        elif kind == "work_failed":
            self.metrics.on_failed(message.work_failed)
            self._route(message.work_failed, worker_pb2.WorkerMessage(failed=message.work_failed))
        elif kind == "request_done":
            done = message.request_done
            self._owners.pop((done.request_id, done.attempt), None)
            self.metrics.on_done(done)
        elif kind == "pong":
            self._answer_ping(message.pong)
        elif kind == "status":
            self._take_status(message.status)
        elif kind == "probed":
            answer = self._probes.pop(message.probed.nonce, None)
            if answer is not None and not answer.done():
                answer.set_result(message.probed.report)
        elif kind == "drained":
            self._drain.done.set()
        else:
            self.role.on_engine_message(message)

    def _route(
        self,
        answer: worker_pb2.Reserved | worker_pb2.WorkFailed,
        message: worker_pb2.WorkerMessage,
    ) -> None:
        session = self._owners.get((answer.request_id, answer.attempt))
        if session is not None:
            session.send(message)

    def _route_step(self, step: worker_pb2.StepOutput) -> None:
        if len(self._sessions) == 1:
            next(iter(self._sessions)).send(worker_pb2.WorkerMessage(step=step))
            return
        shares: dict[RouterSession, worker_pb2.StepOutput] = {}
        for output in step.outputs:
            session = self._owners.get((output.request_id, output.attempt))
            if session is not None:
                share = shares.setdefault(session, worker_pb2.StepOutput(step=step.step))
                share.outputs.append(output)
        for session, share in shares.items():
            session.send(worker_pb2.WorkerMessage(step=share))

    def _answer_ping(self, nonce: int) -> None:
        asked = self._pings.pop(nonce, None)
        if asked is not None:
            session, router_nonce = asked
            pong = worker_pb2.Pong(nonce=router_nonce, status=self._status)
            session.send(worker_pb2.WorkerMessage(pong=pong))

    def _take_status(self, reply: channel_pb2.StatusReply) -> None:
        state = self._status.state
        self._status.CopyFrom(reply.status)
        self._status.instance_id = self.instance_id
        self._status.state = state
        if reply.HasField("figures"):
            self.metrics.on_figures(reply.figures)
        waiter = self._queries.pop(reply.nonce, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(self._status)

    async def status(self, *, figures: bool = False) -> worker_pb2.WorkerStatus:
        """Asks the engine: to recount its pages, or for its figures. Raises TimeoutError when it
        does not answer within 2 s."""
        nonce = next(self._nonces)
        waiter: asyncio.Future[worker_pb2.WorkerStatus] = asyncio.get_running_loop().create_future()
        self._queries[nonce] = waiter
        query = channel_pb2.StatusQuery(nonce=nonce, figures=figures)
        self.engine.send(channel_pb2.FrontToEngine(status=query))
        try:
            return await asyncio.wait_for(waiter, STATUS_TIMEOUT_S)
        finally:
            self._queries.pop(nonce, None)

    async def probe(self, request: worker_pb2.ProbeRequest) -> worker_pb2.ProbeReport:
        """Asks the engine to measure. Raises TimeoutError when it does not answer within 60 s."""
        nonce = next(self._nonces)
        answer: asyncio.Future[worker_pb2.ProbeReport] = asyncio.get_running_loop().create_future()
        self._probes[nonce] = answer
        order = channel_pb2.ProbeOrder(nonce=nonce, request=request)
        self.engine.send(channel_pb2.FrontToEngine(probe=order))
        try:
            report = await asyncio.wait_for(answer, PROBE_TIMEOUT_S)
        finally:
            self._probes.pop(nonce, None)
        report.prefill_instance = self.instance_id
        return report

    def to_engine(self, message: channel_pb2.FrontToEngine) -> None:
        self.engine.send(message)

    def report_peer(self, state: worker_pb2.PeerState, *, remember: bool = False) -> None:
        """Tells every router whether KV can flow to that peer. `remember` keeps it for routers
        that come later: what is connected, or was refused, but not what was lost.
        """
        if remember:
            self._peer_states[state.instance_id] = state
        else:
            self._peer_states.pop(state.instance_id, None)
        for session in self._sessions:
            session.send(worker_pb2.WorkerMessage(peer=state))

    def forget_peer(self, instance_id: str) -> None:
        self._peer_states.pop(instance_id, None)


def run_front(config: WorkerConfig, role: FrontRole) -> int:
    """Runs one worker until it is drained; returns the process's exit status."""
    front = WorkerFront(config, role)
    facts = {"role": front.instance_id.split("-")[0], "worker": front.instance_id}
    logs.configure(
        level=config.log_level, format=config.log_format, facts={**facts, "process": "front"}
    )
    return asyncio.run(front.run())

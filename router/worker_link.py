"""One worker's session: requests go out, tokens come back, and silence is noticed.

A hung process keeps its sockets open, so a broken connection is not the only sign of death: the
worker must also answer pings. When it does not, every request on it is told at once, and the
link dials again for as long as the worker's heartbeats arrive at the registry.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import grpc

from protos.baton.v1 import worker_pb2
from protos.tls import open_channel
from protos.version import PROTOCOL_VERSION
from router.config import RouterConfig
from router.registry import WorkerRecord

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 2.0
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # A new dial must not wait for the back-off of the one before, so channels share nothing.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]

Session = grpc.aio.StreamStreamCall[worker_pb2.RouterMessage, worker_pb2.WorkerMessage]
WorkKey = tuple[str, int]
"""(request id, attempt): what an earlier attempt left behind never reaches a later one."""

PROBE_TIMEOUT_S = 60.0
"""Longest that a worker may take to measure a link."""


class SessionLost(Exception):
    """The session cannot go on; the message says why."""


class WorkSink(Protocol):
    """Who takes what a worker says of one piece of work. Called in the loop, never waits."""

    def on_reserved(self, link: "WorkerLink", reserved: worker_pb2.Reserved) -> None: ...

    def on_output(self, link: "WorkerLink", output: worker_pb2.RequestOutput) -> None: ...

    def on_failed(self, link: "WorkerLink", failed: worker_pb2.WorkFailed) -> None: ...

    def on_lost(self, link: "WorkerLink", reason: str) -> None:
        """The worker is lost; nothing follows for this piece of work."""
        ...


class WorkerLink:
    """The router's end of one worker's session."""

    def __init__(
        self,
        record: WorkerRecord,
        *,
        router_id: str,
        config: RouterConfig,
        on_change: Callable[["WorkerLink"], None],
    ) -> None:
        self.record = record
        self.pending_tokens = 0
        """Prompt tokens given to this worker that have not become a first token yet."""
        self.told_peers: worker_pb2.PeerUpdate | None = None
        """What a prefill worker was told of decode workers in this session; the fleet's to set."""
        self.left = False
        """It has taken its leave: what it took is finished, and it is not dialled again."""
        self._last_session = False
        """It is off the list: it is not dialled again either."""
        self._router_id = router_id
        self._config = config
        self._on_change = on_change
        self._work: dict[WorkKey, WorkSink] = {}
        self._tokens: dict[WorkKey, int] = {}
        self._outgoing: asyncio.Queue[worker_pb2.RouterMessage] = asyncio.Queue()
        self._nonces = itertools.count(1)
        self._last_heard = 0.0
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._heartbeat = asyncio.Event()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def requests(self) -> int:
        """Pieces of work that this router has on the worker."""
        return len(self._work)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link {self.id}")

    async def close(self, reason: str) -> None:
        """Ends the session; work on it is lost."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._down(reason)

    async def retire(self, reason: str) -> None:
        """Lets the session end by itself, to its last message: the word that a worker is gone comes
        by another way and may overtake its last tokens. A worker that stands still is noticed as
        ever, and one that only left the list does not keep a session that carries nothing.
        """
        self._last_session = True
        ended: set[asyncio.Task[None]] = set()
        while self._task is not None and self.record.connected and not ended:
            ended, _ = await asyncio.wait({self._task}, timeout=self._config.silence_timeout_s)
            if not self._work:
                break
        await self.close(reason)

    # ---- work -----------------------------------------------------------------------------------

    def attach(self, key: WorkKey, sink: WorkSink, *, prompt_tokens: int = 0) -> None:
        """Routes what the worker says about `key` to `sink`, until `detach` or its loss."""
        self._work[key] = sink
        if prompt_tokens:
            self._tokens[key] = prompt_tokens
            self.pending_tokens += prompt_tokens

    def settle(self, key: WorkKey) -> None:
        """The prompt is computed: it no longer counts as pending."""
        self.pending_tokens -= self._tokens.pop(key, 0)

    def detach(self, key: WorkKey) -> None:
        """Nothing about `key` reaches its sink any more; an unknown key is no error."""
        self._work.pop(key, None)
        self.settle(key)

    def send(self, message: worker_pb2.RouterMessage) -> None:
        """Queues a message; dropped where the session is down (the sinks have been told)."""
        if self.record.connected:
            self._outgoing.put_nowait(message)

    async def get_status(self, *, timeout_s: float) -> worker_pb2.WorkerStatus:
        """Asks the worker for its figures now. Raises grpc.RpcError or SessionLost."""
        status = await self._ask(
            "GetStatus",
            worker_pb2.GetStatusRequest(),
            answer=worker_pb2.WorkerStatus,
            timeout_s=timeout_s,
        )
        return cast(worker_pb2.WorkerStatus, status)

    async def drain(self, *, timeout_s: float | None) -> None:
        """Tells the worker to drain. Raises grpc.RpcError or SessionLost."""
        await self._ask(
            "Drain",
            worker_pb2.DrainRequest(timeout_s=timeout_s),
            answer=worker_pb2.DrainResponse,
            timeout_s=self._config.silence_timeout_s,
        )

    async def probe(self, request: worker_pb2.ProbeRequest) -> worker_pb2.ProbeReport:
        """Has a prefill worker measure its way to a peer. Raises grpc.RpcError or SessionLost."""
        report: worker_pb2.ProbeReport = await self._ask(
            "Probe", request, answer=worker_pb2.ProbeReport, timeout_s=PROBE_TIMEOUT_S
        )
        return report

    async def _ask(self, method: str, request: Any, *, answer: Any, timeout_s: float) -> Any:
        """One call beside the session, over its connection."""
        channel, task = self._channel, asyncio.current_task()
        if channel is None or not self.record.connected:
            raise SessionLost(f"worker {self.id} is not connected")
        call = channel.unary_unary(
            f"/baton.v1.Worker/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return await call(request, timeout=timeout_s)
        except asyncio.CancelledError:
            # A channel that is closed cancels its calls, and with them whoever awaits one.
            if task is None or task.cancelling():
                raise
            raise SessionLost(f"the session with worker {self.id} ended") from None

    # ---- session --------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                await self._session()
            except (SessionLost, grpc.RpcError, OSError) as error:
                reason = str(error) if not isinstance(error, grpc.RpcError) else _describe(error)
            except Exception as error:
                # Whatever broke, the requests must hear of it.
                logger.exception("session with worker %s failed", self.id)
                reason = repr(error)
            self._down(reason)
            if self.left or self._last_session:
                return
            if time.monotonic() - started > LAST_BACKOFF_S:
                backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)
            await self._until_alive()

    def on_heartbeat(self) -> None:
        """The registry heard from the worker: a lost one is worth another dial."""
        self._heartbeat.set()

    async def _until_alive(self) -> None:
        age_s = time.monotonic() - self.record.last_heartbeat
        if age_s > self._config.heartbeat_timeout_s:
            self._heartbeat.clear()
            await self._heartbeat.wait()

    async def _session(self) -> None:
        """Runs one session to its end. Raises SessionLost or grpc.RpcError; never returns."""
        limit = self._config.max_worker_message_bytes
        options = [
            *CHANNEL_OPTIONS,
            ("grpc.max_send_message_length", limit),
            ("grpc.max_receive_message_length", limit),
        ]
        address = self.record.registration.address
        async with open_channel(address, tls=self._config, options=options) as channel:
            open_session = channel.stream_stream(
                "/baton.v1.Worker/Session",
                request_serializer=worker_pb2.RouterMessage.SerializeToString,
                response_deserializer=worker_pb2.WorkerMessage.FromString,
            )
            call = cast(Session, open_session(None))
            try:
                async with asyncio.timeout(self._config.silence_timeout_s):
                    await self._greet(call)
            except TimeoutError:
                raise SessionLost("it did not answer the session's hello") from None
            try:
                async with asyncio.timeout(self._config.silence_timeout_s):
                    early = await self._sound_out(call)
            except TimeoutError:
                raise SessionLost("its engine does not answer") from None
            self._channel = channel
            self._up()
            for message in early:
                self._dispatch(message)
            await self._converse(call)

    async def _greet(self, call: Session) -> None:
        hello = worker_pb2.SessionHello(
            router_id=self._router_id, protocol_version=PROTOCOL_VERSION, instance_id=self.id
        )
        await call.write(worker_pb2.RouterMessage(hello=hello))
        answer = await self._read(call)
        if answer.WhichOneof("kind") != "hello" or answer.hello.instance_id != self.id:
            raise SessionLost(f"another instance answers: {answer.hello.instance_id or 'unnamed'}")
        if answer.hello.fingerprint != self.record.registration.fingerprint:
            raise SessionLost("it answers with another fingerprint than it registered")
        self.record.take_status(answer.hello.status)

    async def _sound_out(self, call: Session) -> list[worker_pb2.WorkerMessage]:
        """Waits for a first pong, which comes from the engine: its front alone, which answers the
        hello, would make a worker whose engine hangs look ready again and again. Returns what was
        said before it. One that is leaving says no more than that.
        """
        ping = worker_pb2.Ping(nonce=next(self._nonces))
        await call.write(worker_pb2.RouterMessage(ping=ping))
        early: list[worker_pb2.WorkerMessage] = []
        while (message := await self._read(call)).WhichOneof("kind") not in ("pong", "goodbye"):
            early.append(message)
        return [*early, message]

    async def _converse(self, call: Session) -> None:
        tasks = [
            asyncio.create_task(self._receive(call)),
            asyncio.create_task(self._transmit(call)),
            asyncio.create_task(self._watch()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _read(self, call: Session) -> worker_pb2.WorkerMessage:
        message = await call.read()
        if not isinstance(message, worker_pb2.WorkerMessage):  # the stream's end
            code, details = await call.code(), await call.details()
            raise SessionLost(f"it ended the session: {code.name} {details or ''}".rstrip())
        self._last_heard = time.monotonic()
        return message

    async def _receive(self, call: Session) -> None:
        while True:
            self._dispatch(await self._read(call))

    async def _transmit(self, call: Session) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _watch(self) -> None:
        """Pings, and raises SessionLost once the worker has been silent for too long."""
        interval_s, limit_s = self._config.ping_interval_s, self._config.silence_timeout_s
        while True:
            ping = worker_pb2.Ping(nonce=next(self._nonces))
            self._outgoing.put_nowait(worker_pb2.RouterMessage(ping=ping))
            before = time.monotonic()
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            # Time for which this process itself stood still is not the worker's silence.
            self._last_heard += max(0.0, now - before - 2 * interval_s)
            if now - self._last_heard > limit_s:
                raise SessionLost(f"it said nothing for {now - self._last_heard:.1f} s")

    # ---- what the worker says -------------------------------------------------------------------

    def _dispatch(self, message: worker_pb2.WorkerMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "step":
            for output in message.step.outputs:
                sink = self._work.get((output.request_id, output.attempt))
                if sink is not None:
                    sink.on_output(self, output)
        elif kind == "pong":
            self._take_status(message.pong.status)
        elif kind == "reserved":
            sink = self._work.get((message.reserved.request_id, message.reserved.attempt))
            if sink is not None:
                sink.on_reserved(self, message.reserved)
        elif kind == "failed":
            sink = self._work.get((message.failed.request_id, message.failed.attempt))
            if message.failed.turned_away:
                self.note_draining()
            if sink is not None:
                sink.on_failed(self, message.failed)
        elif kind == "goodbye":
            self.left = True
            raise SessionLost("it has drained and left")
        elif kind == "peer":
            self.record.peers[message.peer.instance_id] = message.peer
            self._on_change(self)

    def note_draining(self) -> None:
        """It takes nothing any more, as its own word says, whatever its status said last."""
        if not self.record.drains:
            self.record.note_draining()
            self._on_change(self)

    def _take_status(self, status: worker_pb2.WorkerStatus) -> None:
        before = self.record.state
        self.record.take_status(status)
        if self.record.state != before:
            self._on_change(self)

    def _up(self) -> None:
        self._outgoing = asyncio.Queue()
        self.told_peers = None
        self.record.peers.clear()
        self.record.connected = True
        self._last_heard = time.monotonic()
        logger.info(
            "session with %s worker %s at %s is up",
            self.record.role_name,
            self.id,
            self.record.registration.address,
        )
        self._on_change(self)

    def _down(self, reason: str) -> None:
        self._channel = None
        self.record.lost_reason = reason
        if not self.record.connected:
            return
        self.record.connected = False
        self.record.lost_since = time.monotonic()
        self.record.peers.clear()
        work, self._work = self._work, {}
        self._tokens.clear()
        self.pending_tokens = 0
        logger.warning(
            "%s worker %s is lost, with %d requests: %s",
            self.record.role_name,
            self.id,
            len(work),
            reason,
        )
        self._on_change(self)
        for sink in work.values():
            sink.on_lost(self, reason)


def _describe(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details() or ''}".rstrip()
    return repr(error)

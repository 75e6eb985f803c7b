"""A scripted pair of workers: real gRPC servers, and a model that is a function of all its input.

The next token depends on the ids before it, how many they are, and the seed; so a gap, a double, a
wrong prefix or another seed after a replay changes all that follows.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos.baton.v1 import inference_pb2, kv_pb2, worker_pb2, worker_pb2_grpc
from protos.version import PROTOCOL_VERSION

PREFILL = inference_pb2.WORKER_ROLE_PREFILL
DECODE = inference_pb2.WORKER_ROLE_DECODE
UNIFIED = inference_pb2.WORKER_ROLE_UNIFIED
ROLE_NAMES = {PREFILL: "prefill", DECODE: "decode", UNIFIED: "unified"}
VOCAB = 256
EOS = 255
NAMES = itertools.count(1)


AFTER_HANDOVER = {
    "transfer_tail_ms": 0.02,
    "verify_ms": 0.01,
    "join_ms": 0.03,
    "first_decode_step_ms": 0.04,
    "kv_bytes": 1000,
    "transport": "grpc",
}
"""A decode worker's timing."""


def next_token(ids: Sequence[int], seed: int) -> int:
    """Never EOS."""
    recent = sum((i + 2) * (t + 1) for i, t in enumerate(ids[-8:]))
    return (recent * 31 + len(ids) * 7) % 251 ^ (seed % 4)


def expected(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, seed))
    return ids[len(prompt) :]


def most_likely(token: int, count: int) -> list[inference_pb2.TopLogprob]:
    """Alternatives, of which the token itself is none."""
    return [
        inference_pb2.TopLogprob(id=(token + 1 + i) % VOCAB, logprob=-0.1 * (i + 1))
        for i in range(count)
    ]


@dataclass
class Script:
    """What one worker does out of the ordinary."""

    die_before: int | None = None
    """The process ends instead of sending the token of this index."""
    hang_before: int | None = None
    """It stops answering anything instead of sending the token of this index."""
    fail_before: int | None = None
    """It answers WorkFailed(retryable) once, instead of the token of this index."""
    lose_peer_before: int | None = None
    """As `fail_before`, and the failure lies between the two workers."""
    turn_away: bool = False
    """It drains, which nobody has heard yet, and takes nothing."""
    reserve_error: worker_pb2.Error | None = None
    retryable: bool = False
    token_delay_s: float = 0.0
    first_token_delay_s: float = 0.0
    """Prefill: KV is handed over first, the token follows after this."""
    never_reserve: bool = False
    stop_at: int | None = None
    """The token of this index is EOS."""
    tokens: Sequence[int] = ()
    """The output's tokens, while they last."""
    timing: dict[str, float] = field(default_factory=dict)


class Bus:
    """The KV transfer between fake workers."""

    def __init__(self) -> None:
        self.workers: dict[str, FakeWorker] = {}


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(
        self,
        role: inference_pb2.WorkerRole,
        *,
        bus: Bus,
        router: str,
        script: Script | None = None,
        path: str = "",
        fingerprint: str = "f00d",
        max_total_tokens: int = 4096,
        context_length: int = 1024,
        protocol_version: int = PROTOCOL_VERSION,
    ) -> None:
        self.id = f"{ROLE_NAMES[role]}-{next(NAMES)}"
        self.role, self.script = role, script or Script()
        self.received: list[worker_pb2.RouterMessage] = []
        self.drains: list[worker_pb2.DrainRequest] = []
        self.state = inference_pb2.WORKER_STATE_READY
        self.status_running = 0
        self._bus, self._router_address = bus, router
        self._outgoing: asyncio.Queue[worker_pb2.WorkerMessage] = asyncio.Queue()
        self._requests: dict[tuple[str, int], Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.hung = False
        self.dead = False
        self.registration = worker_pb2.RegisterRequest(
            protocol_version=protocol_version,
            instance_id=self.id,
            role=role,
            model=worker_pb2.ModelDescription(
                name="tiny",
                path=path,
                context_length=context_length,
                vocab_size=VOCAB,
                eos_token_ids=[EOS],
                max_total_tokens=max_total_tokens,
                page_size=16,
            ),
            pid=4242,
            engine_pids=[4243],
            transports=["grpc"],
            fingerprint=fingerprint,
        )

    # ---- life -----------------------------------------------------------------------------------

    async def start(self, port: int = 0) -> worker_pb2.RegisterResponse:
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        self.registration.address = f"127.0.0.1:{port}"
        self._bus.workers[self.id] = self
        self._channel = grpc.aio.insecure_channel(self._router_address)
        self._registry = worker_pb2_grpc.RegistryStub(self._channel)
        answer = await self._registry.Register(self.registration)
        self._heart = asyncio.create_task(self._beat())
        return answer

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            with contextlib.suppress(grpc.RpcError):
                if not self.hung:
                    await self._registry.Heartbeat(
                        worker_pb2.HeartbeatRequest(instance_id=self.id, status=self.status())
                    )

    async def stop(self) -> None:
        if self.dead:
            return
        self.dead = True
        self._heart.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(self._heart, *self._tasks, return_exceptions=True)
        await self._server.stop(0)
        await self._channel.close()
        self._bus.workers.pop(self.id, None)

    def die(self) -> None:
        """The process ends now."""
        if not self.dead:
            self._bus.workers.pop(self.id, None)
            self._grave = asyncio.create_task(self.stop())

    def kinds(self, kind: str) -> list[Any]:
        return [getattr(m, kind) for m in self.received if m.WhichOneof("kind") == kind]

    def status(self) -> worker_pb2.WorkerStatus:
        return worker_pb2.WorkerStatus(
            instance_id=self.id,
            state=self.state,
            pages=inference_pb2.PageCounts(free=90, cached=4, held=1, in_use=5, total=100),
            running=self.status_running,
        )

    async def _while_hung(self) -> None:
        await until(lambda: not self.hung, timeout_s=60)

    # ---- the service ----------------------------------------------------------------------------

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.WorkerStatus:
        await self._while_hung()
        return self.status()

    async def Describe(self, request: Any, context: Any) -> worker_pb2.RegisterRequest:
        await self._while_hung()
        return self.registration

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> Any:
        self.drains.append(request)
        self.state = inference_pb2.WORKER_STATE_DRAINING
        return worker_pb2.DrainResponse()

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self._while_hung()
        hello = await anext(aiter(requests))
        assert hello.hello.instance_id == self.id
        self._outgoing = asyncio.Queue()
        yield worker_pb2.WorkerMessage(
            hello=worker_pb2.WorkerHello(
                instance_id=self.id,
                fingerprint=self.registration.fingerprint,
                status=self.status(),
            )
        )
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                message = await self._outgoing.get()
                await self._while_hung()
                yield message
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            async for message in requests:
                if not self.hung:
                    self._take(message)

    def _take(self, message: worker_pb2.RouterMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "ping":
            pong = worker_pb2.Pong(nonce=message.ping.nonce, status=self.status())
            self.say(pong=pong)
            return
        self.received.append(message)
        if self.script.turn_away and kind in ("reserve", "prefill", "generate"):
            self._turn_away(getattr(message, kind))
        elif kind == "peers":
            for peer in message.peers.peers:
                state = worker_pb2.PeerState(
                    instance_id=peer.instance_id, connected=True, transport="grpc"
                )
                self.say(peer=state)
                self._bus.workers[peer.instance_id].say(
                    peer=worker_pb2.PeerState(instance_id=self.id, connected=True, transport="grpc")
                )
        elif kind == "reserve":
            self._spawn(self._reserve(message.reserve))
        elif kind == "prefill":
            request = message.prefill
            self._requests[request.request_id, request.attempt] = request
            if not request.decode_instance:
                self._spawn(self._prefill(request, None))
        elif kind == "ticket":
            request = self._requests[message.ticket.request_id, message.ticket.attempt]
            self._spawn(self._prefill(request, message.ticket.ticket))
        elif kind == "generate":
            request = message.generate
            self._requests[request.request_id, request.attempt] = request
            self._spawn(self._generate(request))
        elif kind == "abort":
            self._requests.pop((message.abort.request_id, message.abort.attempt), None)

    def _turn_away(self, request: Any) -> None:
        message = f"request {request.request_id} met a draining worker"
        error = worker_pb2.Error(code=worker_pb2.ERROR_CODE_UNAVAILABLE, message=message)
        self.say(
            failed=worker_pb2.WorkFailed(
                request_id=request.request_id,
                attempt=request.attempt,
                error=error,
                retryable=True,
                turned_away=True,
            )
        )

    async def deregister(self) -> None:
        """It tells the router's registry that it goes."""
        self._heart.cancel()
        goodbye = worker_pb2.DeregisterRequest(instance_id=self.id)
        await self._registry.Deregister(goodbye, timeout=5)

    def say(self, **kind: Any) -> None:
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(**kind))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the roles ------------------------------------------------------------------------------

    async def _reserve(self, request: worker_pb2.ReserveRequest) -> None:
        if self.script.never_reserve:
            return
        if self.script.reserve_error is not None:
            self.say(
                failed=worker_pb2.WorkFailed(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    error=self.script.reserve_error,
                    retryable=self.script.retryable,
                )
            )
            return
        self._requests[request.request_id, request.attempt] = request
        ticket = kv_pb2.Ticket(ticket_id=1, instance_id=self.id, request_id=request.request_id)
        self.say(
            reserved=worker_pb2.Reserved(
                request_id=request.request_id,
                attempt=request.attempt,
                ticket=ticket,
                reserve_ms=0.5,
            )
        )

    async def _prefill(self, request: Any, ticket: kv_pb2.Ticket | None) -> None:
        ids = [*request.prompt_ids, *request.output_so_far]
        first = self._draw(request, ids)
        ended = self._finish(request, len(request.output_so_far), first)
        if ticket is not None and not ended and self.script.first_token_delay_s:
            self._hand_over(request, [*ids, first])
            await asyncio.sleep(self.script.first_token_delay_s)
        await asyncio.sleep(self.script.token_delay_s)
        timing = {"queue_ms": 0.7, "prefill_ms": 0.3, "cached_tokens": 2, **self.script.timing}
        sent = await self._emit(request, len(request.output_so_far), first, timing)
        if sent and ticket is not None and not ended and not self.script.first_token_delay_s:
            self._hand_over(request, [*ids, first])

    def _hand_over(self, request: Any, ids: list[int]) -> None:
        decode = self._bus.workers.get(request.decode_instance)
        if decode is not None:
            decode._spawn(decode._decode(request.request_id, request.attempt, ids))

    async def _generate(self, request: Any) -> None:
        """Both phases; the second output's timing is that of the first decode step."""
        ids, index = [*request.prompt_ids, *request.output_so_far], len(request.output_so_far)
        first = self._draw(request, ids)
        await asyncio.sleep(self.script.token_delay_s)
        timing = {"queue_ms": 0.7, "prefill_ms": 0.3, "cached_tokens": 2, **self.script.timing}
        if await self._emit(request, index, first, timing) and not self._finish(
            request, index, first
        ):
            step = {"join_ms": 0.03, "first_decode_step_ms": 0.04}
            await self._decode(request.request_id, request.attempt, [*ids, first], timing=step)

    async def _decode(
        self,
        request_id: str,
        attempt: int,
        ids: list[int],
        *,
        timing: dict[str, Any] | None = AFTER_HANDOVER,
    ) -> None:
        request = self._requests.get((request_id, attempt))
        while request is not None and (request_id, attempt) in self._requests:
            index = len(ids) - len(request.prompt_ids)
            await asyncio.sleep(self.script.token_delay_s)
            token = self._draw(request, ids)
            if not await self._emit(request, index, token, timing):
                return
            if self._finish(request, index, token):
                return
            ids, timing = [*ids, token], None

    def _draw(self, request: Any, ids: list[int]) -> int:
        index = len(ids) - len(request.prompt_ids)
        if self.script.stop_at == index:
            return EOS
        if index < len(self.script.tokens):
            return self.script.tokens[index]
        return next_token(ids, request.sampling.seed)

    def _finish(self, request: Any, index: int, token: int) -> int:
        if token in (EOS, *request.sampling.stop_token_ids):
            return inference_pb2.FINISH_REASON_STOP
        if index + 1 >= request.sampling.max_tokens:
            return inference_pb2.FINISH_REASON_LENGTH
        return 0

    async def _emit(self, request: Any, index: int, token: int, timing: Any) -> bool:
        if index == self.script.die_before:
            self.die()
            return False
        if index == self.script.hang_before:
            self.hung = True
            return False
        script = self.script
        if index in (script.fail_before, script.lose_peer_before):
            between = index == script.lose_peer_before
            script.fail_before = script.lose_peer_before = None
            error = worker_pb2.Error(code=worker_pb2.ERROR_CODE_DATA_LOSS, message="a page differs")
            self.say(
                failed=worker_pb2.WorkFailed(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    error=error,
                    retryable=True,
                    between_workers=between,
                )
            )
            return False
        finish = self._finish(request, index, token)
        logprob = -0.5 if request.sampling.logprobs else None
        prompt_tokens = []
        begins = self.role != DECODE and index == len(request.output_so_far)
        if begins and request.sampling.HasField("prompt_logprobs"):
            alternatives = request.sampling.prompt_logprobs
            prompt_tokens = [
                inference_pb2.Token(
                    index=i,
                    id=id,
                    logprob=-1.0 if i else None,
                    top=most_likely(id, alternatives if i else 0),
                )
                for i, id in enumerate(request.prompt_ids)
            ]
        output = worker_pb2.RequestOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            tokens=[
                inference_pb2.Token(
                    index=index,
                    id=token,
                    logprob=logprob,
                    top=most_likely(token, request.sampling.top_logprobs),
                )
            ],
            prompt_tokens=prompt_tokens,
            finish_reason=finish,
            stop_token_id=token if finish == inference_pb2.FINISH_REASON_STOP else None,
            timing=worker_pb2.WorkerTiming(**timing) if timing else None,
        )
        self.say(step=worker_pb2.StepOutput(step=1, outputs=[output]))
        return True


async def until(condition: Callable[[], Any], *, timeout_s: float = 5.0) -> None:
    """Waits for a condition that another task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)

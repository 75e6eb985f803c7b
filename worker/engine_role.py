"""What the roles' engines share: from channel message to scheduler, from step to answer.

A role joins the scheduler (engine) with the transfer of pages (kvtransfer); neither of the two
knows the other. Every method runs on the scheduler's thread.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence

from engine.errors import EngineError, InvalidRequestError
from engine.grammar.spec import Grammar, GrammarKind
from engine.memory.audit import PageCounts
from engine.memory.host_pool import HostPool
from engine.sampling_params import SamplingParams
from engine.scheduler.logprobs import Alternatives
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.step_result import StepResult, TokenOutput
from engine.types import RequestId
from kvtransfer.events import KvEvent, PeerAttached, PeerDetached, TransferThreadFailed
from kvtransfer.geometry import KvGeometry
from kvtransfer.states import TransferFailure
from observability.histogram import PASS_S, Histogram
from protos.baton.v1 import channel_pb2, inference_pb2, kv_pb2, worker_pb2
from worker.engine_parts import EngineParts
from worker.figures import engine_figures
from worker.handover_trace import HandoverTrace
from worker.link_probe import measure_link

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
"""How often a busy engine tells its front its load. Pages are recounted when somebody asks and when
the engine falls idle only, since a recount of a large pool would stall running requests; else the
books' own counters are told."""

MAX_TOP_K = 2**63 - 1
"""What a tensor of it holds."""

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ABORT,
}

FAILURE_CODES = {
    TransferFailure.MISMATCH: "DATA_LOSS",
    TransferFailure.ABORTED: "ABORTED",
    TransferFailure.REFUSED: "RESOURCE_EXHAUSTED",
}
"""Error code under which a failed transfer is reported; UNAVAILABLE for all others."""


def told(failure: TransferFailure, detail: str) -> str:
    """A failed transfer as clients read of it: its typed reason, then what happened."""
    return f"{failure.name.lower().replace('_', ' ')}: {detail}"


PlacedRequest = worker_pb2.ReserveRequest | worker_pb2.PrefillRequest | worker_pb2.GenerateLocally

RETRY_AFTER_FULL_S = 1.0
"""Hint to a client whose request met a full queue."""


class EngineFailedError(Exception):
    """The engine cannot go on; the process ends and its requests are replayed elsewhere."""


def make_rid(request_id: str, attempt: int) -> RequestId:
    """The engine's id of one attempt: a replay may overlap with the end of what it replaces."""
    return RequestId(f"{request_id}#{attempt}")


def split_rid(rid: str) -> tuple[str, int]:
    """Inverse of `make_rid`."""
    request_id, _, attempt = rid.rpartition("#")
    return request_id, int(attempt)


class EngineRole(SchedulerRole):
    """Base of the roles."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.agent = parts.agent
        self.arrivals: dict[RequestId, float] = {}
        """Live requests of this engine: time.monotonic() seconds of their arrival."""
        self.trace = HandoverTrace(parts.config.handover_trace)
        self.draining = False
        self._unreported: set[RequestId] = set()
        """Requests whose first output from here has not been sent."""
        self.pass_seconds = Histogram(PASS_S)
        """How long the scheduler's passes took that ran something; the engine's loop fills it."""
        self._message_at = time.monotonic()
        """When the message that is being handled came to the process: a wait for the step before
        it is part of its request's queue, not of the network."""
        self._step = 0
        self._computed_tokens = 0
        self._last_status = 0.0
        total = parts.memory.allocator.num_pages
        self._pages = PageCounts(free=total, cached=0, held=0, in_use=0, total=total)

    # ---- messages -------------------------------------------------------------------------------

    def handle(self, message: channel_pb2.FrontToEngine, *, at: float | None = None) -> None:
        """One message of the front. A request's errors are reported, never raised. `at`: when it
        came, time.monotonic() seconds; None: just now."""
        self._message_at = time.monotonic() if at is None else at
        kind = message.WhichOneof("kind")
        if kind == "abort":
            self.abort(make_rid(message.abort.request_id, message.abort.attempt))
        elif kind == "status":
            self._answer_status(message.status)
        elif kind == "drain":
            self.draining = True
            self.on_drain()
        elif kind == "kv":
            self.parts.deliver_message(message.kv.peer, message.kv.message)
        elif kind == "kv_write_done":
            done = message.kv_write_done
            self.parts.deliver_write_done(done.write_id, done.error)
        elif kind == "peer_connected":
            connected = message.peer_connected
            self.agent.peer_connected(
                connected.info.instance_id,
                connected.transport,
                connected.offer,
                _geometry(connected.info),
            )
        elif kind == "probe":
            measure_link(self.parts, self.parts.channel.send, message.probe)
        elif kind == "peer_gone":
            gone = message.peer_gone
            self.agent.peer_gone(gone.instance_id, gone.reason, proven_dead=gone.proven_dead)
        else:
            self.handle_request(message)

    @abstractmethod
    def handle_request(self, message: channel_pb2.FrontToEngine) -> None:
        """The messages of one role alone."""

    def on_drain(self) -> None:
        """No new request follows: what waits and has cost nothing yet may be turned away."""

    @abstractmethod
    def abort(self, rid: RequestId) -> None:
        """Ends a request in whatever phase it is; unknown ids are ignored."""

    def poll(self) -> None:
        for event in self.agent.poll_events():
            match event:
                case PeerAttached(peer=peer, ok=ok, reason=reason):
                    self._report_peer(peer, ok, reason)
                case PeerDetached(peer=peer, reason=reason):
                    self._report_peer(peer, False, reason)
                case TransferThreadFailed(detail=detail):
                    raise EngineFailedError(f"the KV transfer thread stopped: {detail}")
                case _:
                    self.on_kv_event(event)

    @abstractmethod
    def on_kv_event(self, event: KvEvent) -> None:
        """Transfers of this role's requests."""

    def _report_peer(self, peer: str, ok: bool, reason: str) -> None:
        attached = channel_pb2.PeerAttached(instance_id=peer, ok=ok, reason=reason)
        self.parts.channel.send(channel_pb2.EngineToFront(peer_attached=attached))

    # ---- requests -------------------------------------------------------------------------------

    def arrive(self, request: PlacedRequest) -> RequestId:
        """Notes a new request; `done` is its counterpart."""
        rid = make_rid(request.request_id, request.attempt)
        self.arrivals[rid] = self._message_at
        self._unreported.add(rid)
        logger.debug("request %s arrived in the engine", rid, extra={"request_id": rid})
        return rid

    def checked_req(self, request: PlacedRequest) -> Req:
        """`make_req`, whatever the message holds. Raises InvalidRequestError: values that Python or
        torch cannot take are the sender's fault, and must not end an engine that serves others.
        """
        if request.sampling.top_k > MAX_TOP_K:
            raise InvalidRequestError(
                f"request {request.request_id}: top_k {request.sampling.top_k} is above {MAX_TOP_K}"
            )
        try:
            return self.make_req(request)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidRequestError(f"request {request.request_id}: {error}") from error

    def make_req(self, request: PlacedRequest) -> Req:
        """Raises InvalidRequestError for sampling that cannot be."""
        sampling = request.sampling
        return Req(
            make_rid(request.request_id, request.attempt),
            request.prompt_ids,
            SamplingParams(
                max_new_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
                stop_token_ids=frozenset(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
                logprobs=sampling.logprobs,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty or 1.0,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=dict(sampling.logit_bias),
                min_tokens=sampling.min_tokens,
                top_logprobs=sampling.top_logprobs,
                prompt_logprobs=(
                    sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None
                ),
                grammar=_grammar(sampling.grammar),
            ),
            eos_token_ids=self.parts.model_config.eos_token_ids,
            prior_output_ids=request.output_so_far,
            priority=request.priority,
            extra_key=request.cache_salt,
            lora_id=request.lora_id,
            deadline=time.monotonic() + request.deadline_s if request.deadline_s > 0 else None,
        )

    def report_failure(
        self,
        rid: RequestId,
        code: str,
        message: str,
        *,
        retryable: bool,
        retry_after_s: float = 0.0,
        between_workers: bool = False,
        turned_away: bool = False,
    ) -> None:
        """Tells the router that no further token of this attempt comes from here.

        `between_workers`: KV did not get from one to the other, which may be the peer's fault;
        `turned_away`: this worker drains, and has done nothing for it."""
        if rid not in self.arrivals:
            return
        request_id, attempt = split_rid(rid)
        error = worker_pb2.Error(
            code=f"ERROR_CODE_{code}", message=message, retry_after_s=retry_after_s
        )
        failed = worker_pb2.WorkFailed(
            request_id=request_id,
            attempt=attempt,
            error=error,
            retryable=retryable,
            between_workers=between_workers,
            turned_away=turned_away,
        )
        self.parts.channel.send(channel_pb2.EngineToFront(work_failed=failed))

    def refuse(self, rid: RequestId, error: EngineError) -> None:
        """Reports an engine's error: lack of room may be cured elsewhere, bad input not."""
        retryable = error.code == "RESOURCE_EXHAUSTED"
        hint_s = RETRY_AFTER_FULL_S if retryable else 0.0
        self.report_failure(rid, error.code, str(error), retryable=retryable, retry_after_s=hint_s)

    def done(self, rid: RequestId) -> None:
        """The engine holds nothing of this request any more."""
        self._unreported.discard(rid)
        self.scheduler.grammar_queue.discard(rid)
        if self.arrivals.pop(rid, None) is None:
            return
        logger.debug("the engine holds nothing of request %s", rid, extra={"request_id": rid})
        request_id, attempt = split_rid(rid)
        done = channel_pb2.RequestDone(request_id=request_id, attempt=attempt)
        self.parts.channel.send(channel_pb2.EngineToFront(request_done=done))

    # ---- answers --------------------------------------------------------------------------------

    def publish(self, result: StepResult) -> None:
        """Sends one pass's tokens in one message, then what failed and what is gone."""
        self._computed_tokens += result.num_input_tokens
        self._send_outputs(result.outputs)
        for rid, error in result.errors:
            self.refuse(rid, error)
        for rid in result.released:
            self.on_released(rid)

    def on_tokens_drawn(self) -> None:
        self._send_outputs(self.scheduler.take_outputs())

    def _send_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        if not outputs:
            return
        self._step += 1
        # Who has waited longest is new here: the others' tokens follow those of a step ago. So
        # newcomers' go ahead, in a message of their own, since every hop from here takes a message
        # apart token by token.
        new = [output for output in outputs if output.rid in self._unreported]
        names = {output.rid for output in new}
        for part in (new, [output for output in outputs if output.rid not in names]):
            if part:
                step = worker_pb2.StepOutput(step=self._step)
                step.outputs.extend(self._to_proto(output) for output in part)
                self.parts.channel.send(channel_pb2.EngineToFront(step=step))

    def _to_proto(self, output: TokenOutput) -> worker_pb2.RequestOutput:
        request_id, attempt = split_rid(output.rid)
        token = inference_pb2.Token(index=output.index, id=output.token)
        if output.logprob is not None:
            token.logprob = output.logprob
        if output.top:
            token.top.extend(_top_to_proto(output.top))
        answer = worker_pb2.RequestOutput(request_id=request_id, attempt=attempt, tokens=[token])
        if output.prompt is not None:
            answer.prompt_tokens.extend(
                inference_pb2.Token(
                    index=index, id=token.token, logprob=token.logprob, top=_top_to_proto(token.top)
                )
                for index, token in enumerate(output.prompt)
            )
        if output.finish_reason is not None:
            answer.finish_reason = FINISH_REASONS[output.finish_reason]
            if output.stop_token is not None:
                answer.stop_token_id = output.stop_token
        if output.rid in self._unreported:
            self._unreported.discard(output.rid)
            answer.timing.CopyFrom(self.worker_timing(output.rid))
        return answer

    @abstractmethod
    def worker_timing(self, rid: RequestId) -> worker_pb2.WorkerTiming:
        """Durations for the request's first output from this worker."""

    def report_timing_again(self, rid: RequestId) -> None:
        """Asks `worker_timing` once more, for the request's next output."""
        self._unreported.add(rid)

    def on_released(self, rid: RequestId) -> None:
        """The scheduler holds nothing of the request any more."""
        self.done(rid)

    def _answer_status(self, query: channel_pb2.StatusQuery) -> None:
        self.send_status(query.nonce, recount=not query.figures, figures=query.figures)

    def send_status(self, nonce: int = 0, *, recount: bool = True, figures: bool = False) -> None:
        """`recount` looks at every page; without it the books' own counters are told."""
        scheduler = self.scheduler
        self._pages = scheduler.page_counts() if recount else scheduler.estimated_page_counts()
        self._last_status = time.monotonic()
        reply = channel_pb2.StatusReply(nonce=nonce, status=self.status())
        if figures:
            reply.figures.CopyFrom(
                engine_figures(
                    scheduler,
                    self.agent.stats(),
                    queues=self.queues(),
                    pages=reply.status.pages,
                    computed_tokens=self._computed_tokens,
                    pass_seconds=self.pass_seconds,
                )
            )
        self.parts.channel.send(channel_pb2.EngineToFront(status=reply))

    def queues(self) -> dict[str, int]:
        """Requests by where they are: each in one queue, and every queue of the role listed."""
        lengths = self.scheduler.queue_lengths()
        return {"waiting": lengths["waiting"], "running": lengths["running"]}

    def send_status_if_due(self) -> None:
        if time.monotonic() - self._last_status >= STATUS_INTERVAL_S:
            self.send_status(recount=False)

    def status(self) -> worker_pb2.WorkerStatus:
        scheduler = self.scheduler
        counts = self._pages
        rows = self.parts.memory.req_to_token
        stats = self.agent.stats()
        slots = stats.slots
        return worker_pb2.WorkerStatus(
            pages=inference_pb2.PageCounts(
                free=counts.free,
                cached=counts.cached,
                held=counts.held,
                in_use=counts.in_use,
                total=counts.total,
            ),
            running=sum(1 for _ in scheduler.running_requests()),
            waiting=sum(1 for _ in scheduler.returning_requests()),
            rows_free=rows.available_size(),
            rows_total=rows.size,
            slots_free=slots.free,
            slots_granted=slots.granted,
            slots_quarantined=slots.quarantined,
            slots_total=slots.total,
            window_replacements=stats.window_replacements,
            transfer_handles=stats.handles,
            queued_tokens=sum(req.seqlen for req in scheduler.returning_requests()),
            host_cache=_host_pages(self.parts.memory.host_cache),
            retracted=_host_pages(self.parts.memory.retracted_host),
        )

    def is_idle(self) -> bool:
        """Nothing is live: a draining worker may end."""
        return not self.arrivals


def _geometry(info: kv_pb2.ConnectInfo) -> KvGeometry | None:
    """How the peer cuts KV; None where it does not say: as this worker."""
    if not info.page_size:
        return None
    return KvGeometry(page_size=info.page_size, tp_size=info.tp_size or 1)


def _host_pages(host: HostPool | None) -> worker_pb2.HostPages | None:
    if host is None:
        return None
    return worker_pb2.HostPages(
        used=host.allocator.num_pages - host.free_pages,
        total=host.allocator.num_pages,
        written=host.counters.written,
        loaded=host.counters.loaded,
        spoilt=host.counters.spoilt,
    )


def _grammar(message: inference_pb2.Grammar) -> Grammar | None:
    kind = message.WhichOneof("kind")
    return None if kind is None else Grammar(GrammarKind(kind), getattr(message, kind))


def _top_to_proto(top: Alternatives) -> list[inference_pb2.TopLogprob]:
    return [inference_pb2.TopLogprob(id=id, logprob=logprob) for id, logprob in top]

"""What a caller of the client library gets, and its translation from the wire."""

from dataclasses import dataclass, field
from typing import Literal

from protos.baton.v1 import inference_pb2

FinishReason = Literal["stop", "length", "abort"]
_FINISH_REASONS: dict[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """One of the most likely tokens at a position."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of the output, or of the prompt."""

    index: int
    """Position in the output, or in the prompt, from 0."""

    id: int
    """Index into the model's vocabulary."""

    logprob: float | None = None
    """Natural log of its probability under the unmodified distribution; None: not asked for, or
    the prompt's first token, before which nothing comes."""

    top: tuple[TopLogprob, ...] = ()
    """The most likely tokens here, most likely first, as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from a prefix cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How the request travelled."""

    transport: str
    """What moved the KV: nixl, grpc, or none."""

    kv_bytes: int
    """Bytes of KV that went from prefill to decode."""

    phases_ms: dict[str, float]
    """Milliseconds by phase: ttft and its parts, handover and its parts (inference.proto)."""

    prefill_worker: str
    decode_worker: str
    seed: int
    """The seed used; the router draws one where none was given."""

    replays: int
    """How often the request was replayed on other workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one message of the stream added."""

    request_id: str
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    """Set on the last chunk."""

    stop_token_id: int | None = None
    stop_text: str | None = None
    """The stop text that ended the output; None: none did."""

    prompt_tokens: tuple[Token, ...] = ()
    """The prompt's tokens, with the first chunk, where their log probabilities were asked for."""

    usage: Usage | None = None
    """Set on the last chunk."""

    report: Report | None = None
    """Set on the last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    """One a token, natural log; None unless asked for."""

    tokens: list[Token]
    """The output's tokens with all that was reported of each."""

    prompt_tokens: list[Token]
    """The prompt's, where their log probabilities were asked for."""

    finish_reason: FinishReason | None
    stop_token_id: int | None
    stop_text: str | None
    """The stop text that ended the output; None: none did."""

    usage: Usage
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that the router serves."""

    id: str
    created: int
    """Unix seconds."""

    context_length: int
    """Longest prompt + output in tokens."""

    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker as the router sees it."""

    id: str
    role: str
    """prefill, decode or unified."""

    address: str
    pid: int
    """Process id of the front."""

    engine_pids: tuple[int, ...]
    state: str
    """ready, draining, lost or incompatible."""

    transports: tuple[str, ...]
    pages: dict[str, int]
    """free, cached, held, in_use and total."""

    running: int
    waiting: int
    reason: str = ""
    """Why it gets no requests; empty where it does, or where it drains by itself."""

    silent_s: float = 0.0
    """Since its last sign of life. Seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Where a router's list of workers comes from."""

    kind: str = "memory"
    """memory, redis or kubernetes."""

    up: bool = True
    """False: it cannot be reached, and the router serves from what it knows."""

    last_sync_age_s: float = 0.0
    """Since the list last agreed with it. Seconds."""

    problem: str = ""
    """What is wrong; empty while it is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """The router and its workers."""

    version: str
    protocol_version: int
    router_id: str = ""
    """New at every start of the router."""

    registry: Registry = field(default_factory=Registry)
    workers: tuple[Worker, ...] = field(default=())


def chunk_from(response: inference_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=response.request_id,
        text=response.text,
        tokens=tuple(_token(token) for token in response.tokens),
        prompt_tokens=tuple(_token(token) for token in response.prompt_tokens),
        finish_reason=_FINISH_REASONS.get(response.finish_reason),
        stop_token_id=response.stop_token_id if response.HasField("stop_token_id") else None,
        stop_text=response.stop_text if response.HasField("stop_text") else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
        report=_report(response.report) if response.HasField("report") else None,
    )


class Collector:
    """Joins the chunks of one stream into a Completion."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._prompt_tokens: list[Token] = []
        self._last = Chunk(request_id="")

    def add(self, chunk: Chunk) -> None:
        self._text.append(chunk.text)
        self._tokens.extend(chunk.tokens)
        self._prompt_tokens.extend(chunk.prompt_tokens)
        self._last = chunk

    def completion(self) -> Completion:
        last = self._last
        logprobs = [token.logprob for token in self._tokens if token.logprob is not None]
        return Completion(
            request_id=last.request_id,
            text="".join(self._text),
            token_ids=[token.id for token in self._tokens],
            logprobs=logprobs if logprobs and len(logprobs) == len(self._tokens) else None,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            stop_text=last.stop_text,
            usage=last.usage or _usage(inference_pb2.Usage()),
            report=last.report or _report(inference_pb2.Report()),
        )


def model_from(card: inference_pb2.ModelCard) -> Model:
    return Model(
        id=card.id,
        created=card.created,
        context_length=card.context_length,
        vocab_size=card.vocab_size,
    )


def server_info_from(response: inference_pb2.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=response.version,
        protocol_version=response.protocol_version,
        router_id=response.router_id,
        registry=Registry(
            kind=response.registry.kind,
            up=response.registry.up,
            last_sync_age_s=response.registry.last_sync_age_s,
            problem=response.registry.problem,
        ),
        workers=tuple(_worker(worker) for worker in response.workers),
    )


def _token(token: inference_pb2.Token) -> Token:
    return Token(
        index=token.index,
        id=token.id,
        logprob=token.logprob if token.HasField("logprob") else None,
        top=tuple(TopLogprob(id=top.id, logprob=top.logprob) for top in token.top),
    )


def _usage(usage: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _report(report: inference_pb2.Report) -> Report:
    return Report(
        transport=report.transport,
        kv_bytes=report.kv_bytes,
        phases_ms={
            phase.name.removesuffix("_ms"): float(getattr(report.phases, phase.name))
            for phase in report.phases.DESCRIPTOR.fields
        },
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        seed=report.seed,
        replays=report.replays,
    )


def _worker(worker: inference_pb2.WorkerInfo) -> Worker:
    role = inference_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_")
    state = inference_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_")
    return Worker(
        id=worker.id,
        role=role.lower(),
        address=worker.address,
        pid=worker.pid,
        engine_pids=tuple(worker.engine_pids),
        state=state.lower(),
        transports=tuple(worker.transports),
        pages={
            "free": worker.pages.free,
            "cached": worker.pages.cached,
            "held": worker.pages.held,
            "in_use": worker.pages.in_use,
            "total": worker.pages.total,
        },
        running=worker.running,
        waiting=worker.waiting,
        reason=worker.reason,
        silent_s=worker.silent_s,
    )

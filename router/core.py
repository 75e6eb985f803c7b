"""What both doors stand on: admission, the live requests, the model, the workers."""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from observability.tracing import RequestTrace, Tracing
from protos.baton.v1 import worker_pb2
from protos.errors import BatonError, ErrorCode
from router import traces
from router.access_log import log_end
from router.callers import ANYBODY, Caller, CallerLimitError, Callers, UnknownCallerError
from router.config import RouterConfig
from router.detokenizer import IncrementalDetokenizer
from router.fleet import Fleet, ModelFacts
from router.journey import Journey
from router.metrics import RouterMetrics
from router.policy import LeastLoaded, Policy
from router.registry import WorkerRegistry
from router.request import (
    GenerationRequest,
    RequestSpec,
    check_cache_salt,
    check_priority,
    check_prompt,
    check_request_id,
)
from router.sampling import resolve_sampling
from router.stop_strings import check_stop
from router.tokenizer import TextCodec, TokenizerSource

logger = logging.getLogger(__name__)

RETRY_AFTER_FULL_S = 1.0

LiveKey = tuple[str, str]
"""(tenant, request id): one tenant's ids neither meet another's nor tell of them."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that has its place; its journey has to be closed."""

    journey: Journey
    codec: TextCodec | None


class Router:
    """One router, whatever doors lead to it."""

    def __init__(
        self, config: RouterConfig, registry: WorkerRegistry, *, policy: Policy | None = None
    ) -> None:
        self.config = config
        self.started_at = time.time()
        """Unix seconds."""
        self.fleet = Fleet(registry, config=config)
        self.tokenizers = TokenizerSource(config.tokenizer)
        self._tracing = _tracing(config, self.fleet.router_id)
        self.draining = False
        """Set when the router stops: what runs may finish, nothing new is taken."""
        self._policy = policy or LeastLoaded()
        self._callers = Callers(Path(config.api_keys_file) if config.api_keys_file else None)
        self._live: dict[LiveKey, Journey | None] = {}
        """By tenant and request id; None: it is being admitted."""
        self._aborted: set[LiveKey] = set()
        """Those aborted by their client while they were being admitted."""
        self.metrics = RouterMetrics(self.fleet, self._live.values)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """Requests in the router, waiting or running."""
        return len(self._live)

    def why_not_ready(self) -> str:
        """Empty while requests can be served; else what is missing."""
        if self.draining:
            return "the router is stopping"
        reason, problem = self.fleet.why_unusable(), self.fleet.registry.health().problem
        # Known workers serve on without the registry; its failure may be why there are none.
        return f"{reason} ({problem})" if reason and problem else reason

    async def admit(self, spec: RequestSpec) -> Admitted:
        """Checks a request and gives it a place. Close the journey, whatever happens.

        Raises:
            BatonError: INVALID_ARGUMENT (bad input), NOT_FOUND (another model), ALREADY_EXISTS (the
                id is live), RESOURCE_EXHAUSTED (too many requests), UNAVAILABLE (no workers).
        """
        try:
            return await self._admit(spec, spec.arrival.at)
        except BatonError as error:
            if isinstance(error, CallerLimitError):
                self.metrics.refusals.limit(error.limit)
            self.metrics.refused(error.code.value.lower())
            raise

    async def _admit(self, spec: RequestSpec, arrived_at: float) -> Admitted:
        request_id, caller = check_request_id(spec.request_id), spec.caller
        key = (caller.tenant, request_id)
        self._check_room(key)
        caller.enter()
        self._live[key] = None
        self._idle.clear()
        try:
            model = self.model(spec.model)
            ids, codec = await self._tokens(spec, model)
            check_prompt(ids, model=model)
            caller.use_tokens(len(ids))
            sampling = resolve_sampling(spec, prompt_tokens=len(ids), model=model)
            trace = self._begin_trace(spec, request_id, model, sampling)
            request = GenerationRequest(
                request_id=request_id,
                model=model.name,
                prompt_ids=ids,
                sampling=sampling,
                priority=check_priority(spec.priority),
                cache_salt=caller.cache_salt(check_cache_salt(spec.cache_salt)),
                caller=caller,
                arrived_at=arrived_at,
                deadline=arrived_at + self._timeout_s(spec),
                stop=_stop(spec, codec),
                skip_special_tokens=spec.skip_special_tokens is not False,
                whole=spec.whole,
                traceparent=trace.traceparent if trace else spec.arrival.traceparent,
            )
            journey = Journey(
                request,
                fleet=self.fleet,
                policy=self._policy,
                config=self.config,
                detokenizer=_detokenizer(request, codec),
                on_tokens=self.metrics.on_tokens,
                on_close=self._closed,
                trace=trace,
            )
        except BaseException:
            self._release(key, caller)
            raise
        self._live[key] = journey
        if key in self._aborted:
            journey.abort()
        return Admitted(journey, codec)

    def _check_room(self, key: LiveKey) -> None:
        if self.draining:
            raise BatonError(
                ErrorCode.UNAVAILABLE, "the router is stopping", retry_after_s=RETRY_AFTER_FULL_S
            )
        if key in self._live:
            raise BatonError(
                ErrorCode.ALREADY_EXISTS,
                f"a request with id {key[1]} is running",
                param="request_id",
            )
        if len(self._live) >= self.config.max_queued_requests:
            raise BatonError(
                ErrorCode.RESOURCE_EXHAUSTED,
                f"the router holds {len(self._live)} requests, its limit (max_queued_requests); "
                "try again later",
                retry_after_s=RETRY_AFTER_FULL_S,
            )

    def _timeout_s(self, spec: RequestSpec) -> float:
        limit_s = self.config.request_timeout_s
        return limit_s if spec.timeout_s is None else min(spec.timeout_s, limit_s)

    async def _tokens(
        self, spec: RequestSpec, model: ModelFacts
    ) -> tuple[list[int], TextCodec | None]:
        if isinstance(spec.prompt, str):
            if not spec.prompt:
                raise BatonError(ErrorCode.INVALID_ARGUMENT, "the prompt is empty", param="prompt")
            codec = await self.tokenizers.get(model.path)
            return await codec.encode(spec.prompt), codec
        return list(spec.prompt), await self.tokenizers.find(model.path)

    def model(self, name: str = "") -> ModelFacts:
        """The model of that name; empty: the one served.

        Raises:
            BatonError: NOT_FOUND, or UNAVAILABLE while no worker has registered.
        """
        model = self.fleet.model()
        if model is None:
            raise BatonError(
                ErrorCode.UNAVAILABLE, "no worker has registered yet", retry_after_s=1.0
            )
        if name and name != model.name:
            raise BatonError(
                ErrorCode.NOT_FOUND,
                f"the model '{name}' does not exist; this router serves '{model.name}'",
                param="model",
            )
        return model

    def system_fingerprint(self) -> str:
        """Names what makes answers: the same seed draws the same tokens while this is the same."""
        model = self.fleet.model()
        made_of = f"{version()} {model.fingerprint if model is not None else ''}"
        return f"fp_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    def authenticate(self, authorization: str | None, *, door: str) -> Caller:
        """Who calls with that header at that door (grpc or http).

        Raises:
            BatonError: UNAUTHENTICATED; keys are asked for, and none that is known came.
        """
        try:
            return self._callers.caller(authorization)
        except UnknownCallerError as error:
            self.metrics.refusals.auth(door, error.reason)
            raise

    def abort(self, request_id: str, *, caller: Caller = ANYBODY) -> bool:
        """Ends a running request of the caller's tenant. False: none of that id is running."""
        key = (caller.tenant, request_id)
        if key not in self._live:
            return False
        journey = self._live[key]
        if journey is None:
            self._aborted.add(key)
        else:
            journey.abort()
        return True

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether the last request ended within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._live

    def fail_all(self, error: BatonError) -> None:
        """Ends what still runs, at the end of a drain."""
        for journey in list(self._live.values()):
            if journey is not None:
                journey.fail(error)

    def _closed(self, journey: Journey) -> None:
        request = journey.request
        self._release((request.caller.tenant, request.request_id), request.caller)
        request.caller.use_tokens(journey.output_tokens)
        self.metrics.on_close(journey)
        log_end(journey)
        if self._tracing is not None and journey.trace is not None:
            # In the loop's next turn: the client's last message goes first.
            asyncio.get_running_loop().call_soon(
                traces.finish, self._tracing, journey, time.monotonic()
            )

    def _begin_trace(
        self,
        spec: RequestSpec,
        request_id: str,
        model: ModelFacts,
        sampling: worker_pb2.ResolvedSampling,
    ) -> RequestTrace | None:
        if self._tracing is None:
            return None
        operation = spec.arrival.operation
        return self._tracing.begin(
            traces.name_of(operation, model.name),
            spec.arrival.traceparent,
            traces.at_start(operation, model.name, request_id, sampling),
            started=spec.arrival.at,
        )

    def unused_id(self, wanted: str, caller: Caller) -> str:
        """The id, or one that begins with it where a request of the caller's has that name."""
        if any((caller.tenant, name) in self._live for name in (wanted, f"{wanted}-0")):
            return f"{wanted}.{secrets.token_hex(4)}"
        return wanted

    def _release(self, key: LiveKey, caller: Caller) -> None:
        caller.leave()
        self._live.pop(key, None)
        self._aborted.discard(key)
        if not self._live:
            self._idle.set()

    async def close(self) -> None:
        await self.fleet.close()
        await self.tokenizers.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)


def _tracing(config: RouterConfig, router_id: str) -> Tracing | None:
    if not config.otlp_endpoint:
        return None
    facts = {
        "service.name": "baton-router",
        "service.instance.id": router_id,
        "service.version": version(),
    }
    return Tracing(endpoint=config.otlp_endpoint, ratio=config.trace_sample_ratio, facts=facts)


def _stop(spec: RequestSpec, codec: TextCodec | None) -> tuple[str, ...]:
    stop = check_stop(spec.stop)
    if stop and codec is None:
        raise BatonError(
            ErrorCode.FAILED_PRECONDITION,
            "stop strings need text, and this router has no tokenizer; send stop_token_ids",
            param="stop",
        )
    return stop


def _detokenizer(
    request: GenerationRequest, codec: TextCodec | None
) -> IncrementalDetokenizer | None:
    if codec is None:
        return None
    return codec.detokenizer(
        prompt_ids=request.prompt_ids, skip_special_tokens=request.skip_special_tokens
    )


def version() -> str:
    """Of the installed distribution; "0" where Baton runs from a bare source tree."""
    try:
        return metadata.version("baton-serve")
    except metadata.PackageNotFoundError:
        return "0"

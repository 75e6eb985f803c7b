"""The gRPC door: translates, and maps errors to statuses at its edge."""

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Any

import grpc

from observability import trace_context
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from protos.errors import BatonError, ErrorCode
from protos.version import PROTOCOL_VERSION
from router.callers import Caller
from router.core import Router, version
from router.grammar import check_grammar
from router.output import Delta
from router.request import Arrival, RequestSpec
from router.stall import StallGuard

logger = logging.getLogger(__name__)

SERVICE_NAME = "baton.v1.Inference"
NOT_AN_OPERATOR = "this API key may not see the workers; an operator's may (`operator: true`)"
RETRY_AFTER_KEY = "retry-after"
"""Trailing metadata: seconds after which another try makes sense."""
REQUEST_ID_KEY = "x-request-id"
"""Metadata of a call: the client's name of it, where `request_id` is empty."""
PARAM_KEY = "baton-param"
"""Trailing metadata: the request's field at fault."""

Context = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """baton.v1.Inference over one router."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        try:
            await self._generate(request, context)
        except BatonError as error:
            await abort(context, error)
        except asyncio.CancelledError:
            raise
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("request %s broke the router's code", request.request_id)
            await abort(context, BatonError(ErrorCode.INTERNAL, "an error inside the router"))

    async def _generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        spec = spec_of(request, timeout_s=context.time_remaining(), arrival=arrival_of(context))
        spec = replace(spec, caller=self._caller(context))
        admitted = await self._router.admit(self._named(spec))
        with contextlib.closing(admitted.journey) as journey:
            request_id = journey.request.request_id
            try:
                with StallGuard(self._router.config.write_timeout_s) as guard:
                    async with contextlib.aclosing(journey.deltas()) as deltas:
                        async for delta in deltas:
                            guard.begin()
                            await context.write(response_of(delta, request_id))
                            guard.end()
            except TimeoutError as error:
                raise BatonError(
                    ErrorCode.RESOURCE_EXHAUSTED, f"request {request_id}: {error}"
                ) from error

    def _named(self, spec: RequestSpec) -> RequestSpec:
        """A name in the request is a key, of which one runs at a time; one in the metadata is
        not."""
        if spec.request_id or not spec.arrival.request_id:
            return spec
        return replace(
            spec, request_id=self._router.unused_id(spec.arrival.request_id, spec.caller)
        )

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.AbortResponse:
        caller = await self._checked(context)
        found = self._router.abort(request.request_id, caller=caller)
        return inference_pb2.AbortResponse(found=found)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        await self._checked(context)
        return models_of(self._router)

    async def GetServerInfo(
        self,
        request: inference_pb2.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> inference_pb2.GetServerInfoResponse:
        caller = await self._checked(context)
        if not caller.operator:
            self._router.metrics.refusals.auth("grpc", "forbidden")
            await abort(context, BatonError(ErrorCode.PERMISSION_DENIED, NOT_AN_OPERATOR))
        return await server_info_of(self._router)

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Raises BatonError (UNAUTHENTICATED)."""
        for key, value in context.invocation_metadata() or ():
            if key == "authorization" and isinstance(value, str):
                return self._router.authenticate(value, door="grpc")
        return self._router.authenticate(None, door="grpc")

    async def _checked(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """The caller; ends the call of one who is unknown."""
        try:
            return self._caller(context)
        except BatonError as error:
            await abort(context, error)
            raise


def models_of(router: Router) -> inference_pb2.ListModelsResponse:
    """The model served, if there is one."""
    model = router.fleet.model()
    if model is None:
        return inference_pb2.ListModelsResponse()
    card = inference_pb2.ModelCard(
        id=model.name,
        created=int(router.started_at),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
    )
    return inference_pb2.ListModelsResponse(models=[card])


async def server_info_of(router: Router) -> inference_pb2.GetServerInfoResponse:
    """The router and its workers, asked now."""
    await router.fleet.refresh()
    return inference_pb2.GetServerInfoResponse(
        version=version(),
        protocol_version=PROTOCOL_VERSION,
        workers=[record.info() for record in router.fleet.registry.workers()],
        router_id=router.fleet.router_id,
        registry=router.fleet.registry.info(),
    )


def arrival_of(context: grpc.aio.ServicerContext[Any, Any]) -> Arrival:
    """What a call's metadata says of it."""
    metadata = dict(context.invocation_metadata() or ())
    wanted, parent = metadata.get(REQUEST_ID_KEY, ""), metadata.get(trace_context.HEADER, "")
    return Arrival(
        request_id=wanted if isinstance(wanted, str) and wanted.isprintable() else "",
        traceparent=trace_context.checked(parent) if isinstance(parent, str) else "",
    )


def spec_of(
    request: inference_pb2.GenerateRequest,
    *,
    timeout_s: float | None,
    arrival: Arrival | None = None,
) -> RequestSpec:
    """Raises BatonError (INVALID_ARGUMENT) for a request without a prompt, or with a grammar of a
    wrong form."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise BatonError(
            ErrorCode.INVALID_ARGUMENT, "give a prompt: text or token_ids", param="prompt"
        )
    sampling = request.sampling
    return RequestSpec(
        prompt=request.text if kind == "text" else request.token_ids.ids,
        request_id=request.request_id,
        model=request.model,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None
        ),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        top_logprobs=sampling.top_logprobs,
        min_tokens=sampling.min_tokens,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        cache_salt=request.cache_salt,
        grammar=check_grammar(sampling.grammar),
        stop=sampling.stop,
        skip_special_tokens=(
            sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else None
        ),
        whole=request.whole,
        priority=request.priority,
        timeout_s=timeout_s,
        arrival=arrival or Arrival(),
    )


def response_of(delta: Delta, request_id: str) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id,
        tokens=[
            inference_pb2.Token(
                index=token.index, id=token.id, logprob=token.logprob, top=_top(token.top)
            )
            for token in delta.tokens
        ],
        text=delta.text,
        prompt_tokens=[
            inference_pb2.Token(
                index=index, id=token.id, logprob=token.logprob, top=_top(token.top)
            )
            for index, token in enumerate(delta.prompt_tokens)
        ],
    )
    if delta.last:
        response.finish_reason = delta.finish_reason
        response.usage.CopyFrom(delta.usage)
        response.report.CopyFrom(delta.report)
        if delta.stop_token_id is not None:
            response.stop_token_id = delta.stop_token_id
        if delta.stop_text is not None:
            response.stop_text = delta.stop_text
    return response


def _top(top: list[tuple[int, float]]) -> list[inference_pb2.TopLogprob]:
    return [inference_pb2.TopLogprob(id=id, logprob=logprob) for id, logprob in top]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> None:
    """Ends the call with the error's status, and hints as trailing metadata."""
    hints: list[tuple[str, str]] = []
    if error.retry_after_s > 0:
        hints.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
    if error.param:
        hints.append((PARAM_KEY, error.param))
    await context.abort(grpc.StatusCode[error.code.value], error.message, tuple(hints))

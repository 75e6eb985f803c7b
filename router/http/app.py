"""The FastAPI app: routes, and the OpenAPI document that describes them."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from observability.sheet import CONTENT_TYPE
from protos.baton.v1 import inference_pb2
from router.core import Router, version
from router.fleet import ModelFacts
from router.http import answer_schema
from router.http.chat import create_chat_completion
from router.http.chat_request import ChatRequest
from router.http.completion_request import CompletionRequest
from router.http.completions import create_completion
from router.http.errors import install, json_response
from router.http.key_gate import KeyGate, only_operators
from router.http.openapi import answers, describe, ref, takes
from router.http.request_id import RequestIds
from router.http.tokenization import (
    DetokenizeRequest,
    TokenizeMessages,
    TokenizePrompt,
    detokenize,
    tokenize,
)
from router.registry import WorkerRecord, state_name

METRICS_TYPE = "text/plain"


def create_app(router: Router) -> FastAPI:
    """The HTTP door of one router."""
    app = FastAPI(title="Baton", version=version(), docs_url=None, redoc_url=None)
    install(app)
    app.add_middleware(KeyGate, router=router)
    # Added last, it comes first: a refusal carries the id as well.
    app.add_middleware(RequestIds)
    _add_generation(app, router)
    _add_tokens(app, router)
    _add_models(app, router)
    _add_operations(app, router)
    describe(app)
    return app


def _add_generation(app: FastAPI, router: Router) -> None:
    # Bodies are read by hand: bounded, strict, and with OpenAI's error objects.
    errors = (400, 401, 404, 408, 409, 413, 429, 500, 503, 504)

    @app.post(
        "/v1/completions",
        response_class=Response,
        responses=answers(answer_schema.Completion, *errors, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Completes prompts; with `stream`, as server-sent events that end with [DONE]."""
        return await create_completion(router, request)

    @app.post(
        "/v1/chat/completions",
        response_class=Response,
        responses=answers(answer_schema.ChatCompletion, *errors, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message; with `stream`, as events that end with [DONE]."""
        return await create_chat_completion(router, request)


def _add_tokens(app: FastAPI, router: Router) -> None:
    errors = (400, 401, 404, 408, 413, 429, 500, 503)

    @app.post(
        "/tokenize",
        response_class=Response,
        responses=answers(answer_schema.Tokens, *errors),
        openapi_extra=takes(TokenizePrompt, TokenizeMessages),
    )
    async def to_tokens(request: Request) -> Response:
        """The tokens of a text, or of messages in the model's template."""
        return await tokenize(router, request)

    @app.post(
        "/detokenize",
        response_class=Response,
        responses=answers(answer_schema.Text, *errors),
        openapi_extra=takes(DetokenizeRequest),
    )
    async def to_text(request: Request) -> Response:
        """The text of tokens, special ones included."""
        return await detokenize(router, request)


def _add_models(app: FastAPI, router: Router) -> None:
    @app.get("/v1/models", response_class=Response, responses=answers(answer_schema.ModelList, 401))
    async def models() -> Response:
        """The models served."""
        model = router.fleet.model()
        cards = [] if model is None else [_card(router, model)]
        return json_response({"object": "list", "data": cards})

    @app.get(
        "/v1/models/{name:path}",
        response_class=Response,
        responses=answers(answer_schema.ModelCard, 401, 404, 503),
    )
    async def model(name: str) -> Response:
        """One model."""
        facts = router.model(name)
        return json_response(_card(router, facts))


def _add_operations(app: FastAPI, router: Router) -> None:
    health_answers = answers(answer_schema.Health) | {
        503: {
            "description": "Requests cannot be served",
            "content": {"application/json": {"schema": ref(answer_schema.Health)}},
        }
    }

    @app.get("/health", response_class=Response, responses=health_answers)
    async def health() -> Response:
        """200 while requests can be served."""
        reason = router.why_not_ready()
        status = HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK
        return json_response(
            {
                "status": "unavailable" if reason else "ok",
                "reason": reason,
                "registry": router.fleet.registry.health().problem,
            },
            status=status,
        )

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"description": "Metrics", "content": {METRICS_TYPE: {}}}},
    )
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(router.metrics.render(), media_type=CONTENT_TYPE)

    @app.get(
        "/metrics/targets",
        response_class=Response,
        responses={
            200: {
                "description": "Target groups",
                "content": {
                    "application/json": {
                        "schema": {"type": "array", "items": ref(answer_schema.TargetGroup)}
                    }
                },
            },
            **answers(None, 401),
        },
    )
    async def metrics_targets() -> Response:
        """Where the workers serve their metrics, for Prometheus' HTTP service discovery."""
        scheme = "https" if router.config.mutual else "http"
        return json_response(scrape_targets(router.fleet.registry.workers(), scheme=scheme))

    worker_list = {"type": "array", "items": ref(answer_schema.WorkerCard)}
    listed = {"application/json": {"schema": worker_list}}

    @app.get(
        "/workers",
        response_class=Response,
        responses={
            200: {"description": "The workers", "content": listed},
            **answers(None, 401, 403),
        },
    )
    async def workers(request: Request) -> Response:
        """All workers with their figures, asked now; with API keys, for operators."""
        only_operators(router, request)
        await router.fleet.refresh()
        return json_response([worker_object(r) for r in router.fleet.registry.workers()])


def scrape_targets(records: Iterable[WorkerRecord], *, scheme: str) -> list[dict[str, Any]]:
    """A target group a worker; one that serves no metrics has none. `scheme`: workers speak TLS at
    that port where they do with the router."""
    return [
        {
            "targets": [record.registration.metrics_address],
            "labels": {
                "__scheme__": scheme,
                "__meta_baton_worker": record.id,
                "__meta_baton_role": record.role_name,
            },
        }
        for record in records
        if record.registration.metrics_address and record.connected
    ]


def worker_object(record: WorkerRecord) -> dict[str, Any]:
    """One worker as GET /workers shows it."""
    pages = record.status.pages
    return {
        "id": record.id,
        "role": record.role_name,
        "address": record.registration.address,
        "pid": record.registration.pid,
        "engine_pids": list(record.registration.engine_pids),
        "state": state_name(record.state),
        "reason": record.reason,
        "transports": list(record.registration.transports),
        "pages": {
            field.name: getattr(pages, field.name)
            for field in inference_pb2.PageCounts.DESCRIPTOR.fields
        },
        "running": record.status.running,
        "waiting": record.status.waiting,
    }


def _card(router: Router, model: ModelFacts) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(router.started_at),
        "owned_by": "baton",
        "max_model_len": model.context_length,
        "vocab_size": model.vocab_size,
    }

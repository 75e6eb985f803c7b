"""The FastAPI app: routes, and the OpenAPI document that describes them."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from protos.baton.v1 import inference_pb2
from router.core import Router, version
from router.http.completions import create_completion
from router.http.errors import install, json_response
from router.http.schema import CompletionRequest
from router.registry import WorkerRecord, state_name

REF_TEMPLATE = "#/components/schemas/{model}"
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def create_app(router: Router) -> FastAPI:
    """The HTTP door of one router."""
    app = FastAPI(title="Baton", version=version(), docs_url=None, redoc_url=None)
    install(app)
    _add_completions(app, router)
    _add_models(app, router)
    _add_operations(app, router)
    _describe(app)
    return app


def _add_completions(app: FastAPI, router: Router) -> None:
    # The body is read by hand: bounded, strict, and with OpenAI's error objects.
    body = {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": REF_TEMPLATE.format(model="CompletionRequest")}}
        },
    }

    @app.post(
        "/v1/completions",
        response_class=Response,
        responses=_responses(400, 404, 408, 409, 413, 429, 500, 503, 504),
        openapi_extra={"requestBody": body},
    )
    async def completions(request: Request) -> Response:
        """Completes one prompt; with `stream`, as server-sent events that end with [DONE]."""
        return await create_completion(router, request)


def _add_models(app: FastAPI, router: Router) -> None:
    @app.get("/v1/models", response_class=Response)
    async def models() -> Response:
        """The models served."""
        model = router.fleet.model()
        cards = [] if model is None else [_card(router, model.name, model.context_length)]
        return json_response({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}", response_class=Response, responses=_responses(404, 503))
    async def model(name: str) -> Response:
        """One model."""
        facts = router.model(name)
        return json_response(_card(router, facts.name, facts.context_length))


def _add_operations(app: FastAPI, router: Router) -> None:
    @app.get("/health", response_class=Response, responses=_responses(503))
    async def health() -> Response:
        """200 while requests can be served."""
        reason = router.why_not_ready()
        status = HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK
        return json_response(
            {"status": "unavailable" if reason else "ok", "reason": reason}, status=status
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(router.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/workers", response_class=Response)
    async def workers() -> Response:
        """All workers with their figures, asked now."""
        await router.fleet.refresh()
        return json_response([worker_object(r) for r in router.fleet.registry.workers()])


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
        "reason": record.incompatible,
        "transports": list(record.registration.transports),
        "pages": {
            field.name: getattr(pages, field.name)
            for field in inference_pb2.PageCounts.DESCRIPTOR.fields
        },
        "running": record.status.running,
        "waiting": record.status.waiting,
    }


def _card(router: Router, name: str, context_length: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(router.started_at),
        "owned_by": "baton",
        "max_model_len": context_length,
    }


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": REF_TEMPLATE.format(model="Error")}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": schema}},
        }
        for status in statuses
    }


def _describe(app: FastAPI) -> None:
    """Adds the schemas of bodies that FastAPI does not parse itself to the served document."""
    document = app.openapi()
    _, schemas = models_json_schema([(CompletionRequest, "validation")], ref_template=REF_TEMPLATE)
    target = document.setdefault("components", {}).setdefault("schemas", {})
    target.update(schemas["$defs"])
    target["Error"] = ERROR_SCHEMA

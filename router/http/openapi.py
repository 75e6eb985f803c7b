"""What the served OpenAPI document says of bodies that FastAPI does not parse itself."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.http import answer_schema
from router.http.chat_request import ChatRequest
from router.http.completion_request import CompletionRequest
from router.http.tokenization import DetokenizeRequest, TokenizeMessages, TokenizePrompt

REF_TEMPLATE = "#/components/schemas/{model}"
REQUESTS: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatRequest,
    TokenizePrompt,
    TokenizeMessages,
    DetokenizeRequest,
)


def takes(*models: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is one of these."""
    refs = [ref(model) for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(
    model: type[BaseModel] | None, *statuses: int, stream: bool = False
) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: that model, or one of these errors.

    Args:
        model: of the answer; None: not described.
        statuses: of the errors.
        stream: the answer may be server-sent events instead.
    """
    described: dict[int | str, dict[str, Any]] = {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": ref(answer_schema.Error)}},
        }
        for status in statuses
    }
    if model is not None:
        content: dict[str, Any] = {"application/json": {"schema": ref(model)}}
        if stream:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        described[200] = {"description": "The answer", "content": content}
    return described


def describe(app: FastAPI) -> None:
    """Adds the schemas that `takes` and `answers` refer to, and drops FastAPI's own error, which
    this door never answers."""
    document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    models = [(model, "validation") for model in (*REQUESTS, *answer_schema.MODELS)]
    _, schemas = models_json_schema(models, ref_template=REF_TEMPLATE)  # type: ignore[arg-type]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])


def ref(model: type[BaseModel]) -> dict[str, str]:
    """Where the document describes that model."""
    return {"$ref": REF_TEMPLATE.format(model=model.__name__)}

"""Every field of the served document does something, or says that it does not.

The list of fields is the document's own: whatever a request body may hold, at any depth, must be
accounted for in field_accounts.py, with a value that shows what the field does. A field that were
parsed and then forgotten would change neither the answer nor what the workers are asked, and fail
here.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from tests.router.conftest import Cluster, byte_level_bpe
from tests.router.fakes import DECODE, PREFILL, FakeWorker, Script
from tests.router.field_accounts import (
    FIELDS,
    PLACES,
    TEMPLATE,
    Body,
    Nothing,
    Refusal,
)


@dataclass(frozen=True)
class Found:
    """A field of a body, as the document has it."""

    owner: str
    name: str
    schema: Body


def fields_of(document: Body) -> list[Found]:
    """All fields that a request's body may hold, at any depth, each once."""
    components = document["components"]["schemas"]
    found: dict[tuple[str, str], Found] = {}

    def visit(schema: Body, owner: str) -> None:
        if "$ref" in schema:
            owner = schema["$ref"].rpartition("/")[2]
            schema = components[owner]
        for name, below in schema.get("properties", {}).items():
            if (owner, name) not in found:
                found[owner, name] = Found(owner, name, below)
                visit(below, f"{owner}.{name}")
        for kind in ("anyOf", "oneOf", "allOf"):
            for one in schema.get(kind, ()):
                visit(one, owner)
        if isinstance(schema.get("items"), dict):
            visit(schema["items"], owner)

    for operations in document["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                visit(content["schema"], "")
    return list(found.values())


@pytest.fixture
async def prefill(cluster: Cluster, tmp_path: Path) -> FakeWorker:
    """The prefill worker of a pair whose output holds a special token."""
    tokenizer = byte_level_bpe()
    special = tokenizer.token_to_id("<eos>")
    tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", special)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = [*tokenizer.encode("abc", add_special_tokens=False).ids, special] * 2
    prefill = await cluster.worker(PREFILL, Script(tokens=tokens), path=str(tmp_path))
    decode = await cluster.worker(DECODE, Script(tokens=tokens), path=str(tmp_path))
    await cluster.usable(prefill, decode)
    return prefill


VOLATILE = {"id", "created", "baton"}


@dataclass(frozen=True)
class Seen:
    """One answer: all that a client or an operator could tell apart."""

    status: int
    traces: str
    error: Body


class Asking:
    """Asks the router, each thing once."""

    def __init__(
        self, cluster: Cluster, prefill: FakeWorker, caplog: pytest.LogCaptureFixture
    ) -> None:
        self._cluster, self._prefill, self._caplog = cluster, prefill, caplog
        self._seen: dict[str, Seen] = {}

    async def __call__(self, path: str, body: Body) -> Seen:
        key = path + json.dumps(body)
        if key not in self._seen:
            self._seen[key] = await self._ask(path, body)
        return self._seen[key]

    async def _ask(self, path: str, body: Body) -> Seen:
        self._caplog.clear()
        before = len(self._prefill.kinds("prefill"))
        answer = await self._cluster.http.post(path, json=body)
        asked = [
            str([work.sampling, work.prompt_ids, work.priority, work.cache_salt])
            for work in self._prefill.kinds("prefill")[before:]
        ]
        users = [
            record.args[-1]
            for record in self._caplog.records
            if isinstance(record.args, tuple) and "over HTTP" in record.msg
        ]
        shown, error = _shown(answer)
        return Seen(answer.status_code, repr([shown, asked, users]), error)


def _shown(answer: httpx.Response) -> tuple[Any, Body]:
    """What an answer says, but for what differs each time; and its error object."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        told = answer.json()
        return {k: v for k, v in told.items() if k not in VOLATILE}, told.get("error", {})
    events = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line and not line.endswith("[DONE]")
    ]
    # How tokens come together in chunks is a matter of time.
    said = [choice for event in events for choice in event["choices"]]
    text = "".join(one.get("text") or one.get("delta", {}).get("content", "") for one in said)
    return ["stream", text, events[-1].get("usage")], {}


def has_the_blame(found: Found, param: object) -> bool:
    """The error names the field, or, where it tells a part's kind, that part."""
    path = str(param).split(".")
    part = found.owner.partition(".")[2]
    return found.name in path or part in path or found.name in ("type", "role")


async def problem_of(found: Found, ask: Asking) -> str:
    """How a field does not do what it should; empty where it does."""
    account = FIELDS[found.owner][found.name]
    path, part, around = PLACES[found.owner]
    plain = {**part, **account.beside}
    without = await ask(path, around(plain))
    within = await ask(path, around({**plain, found.name: account.value}))
    if without.status != 200:
        return f"the plain body is refused: {without}"
    if isinstance(account, Refusal):
        refused = within.status == 400 and has_the_blame(found, within.error.get("param"))
        return "" if refused else f"is not refused by its name: {within}"
    if isinstance(account, Nothing):
        if within != without:
            return f"has an effect: {within}"
        said = "no effect" in found.schema.get("description", "").lower()
        return "" if said else "has no effect, and its description does not say so"
    if within.status != 200 and (found.name, within.status) != ("model", 404):
        return f"is refused: {within}"
    return "" if within.traces != without.traces else "changes nothing"


async def test_every_field_of_the_document_is_honoured_or_refused_or_said_to_have_no_effect(
    cluster: Cluster, prefill: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="router.http")
    fields = fields_of((await cluster.http.get("/openapi.json")).json())
    accounted = {(owner, name) for owner, names in FIELDS.items() for name in names}
    assert {(found.owner, found.name) for found in fields} == accounted
    ask = Asking(cluster, prefill, caplog)
    problems = {f"{f.owner}.{f.name}": await problem_of(f, ask) for f in fields}
    assert not {where: problem for where, problem in problems.items() if problem}


def kinds_of(schema: Body) -> set[str]:
    """The JSON types that the document allows."""
    if "enum" in schema:
        return {KINDS[type(value)] for value in schema["enum"]}
    if "const" in schema:
        return {"string"}
    if "$ref" in schema:
        return {"object"}
    if "type" in schema:
        return {schema["type"]}
    return {kind for one in schema.get("anyOf", ()) for kind in kinds_of(one)}


KINDS = {str: "string", bool: "boolean", list: "array", dict: "object", type(None): "null"}
WRONG: dict[str, list[Any]] = {
    "integer": [True],
    "number": ["1"],
    "string": [3],
    "boolean": [1],
    "array": [{}],
    "object": [[]],
}
"""What is taken for another type by readers that are not strict."""


DRAWN = {"seed"}
"""Fields whose absence means another value each time."""


def outside(found: Found) -> list[Any]:
    """Values that the document does not allow: of another type, or beyond a bound."""
    kinds = kinds_of(found.schema)
    wrong = [bad for kind in sorted(kinds - {"null"}) for bad in WRONG[kind]]
    allowed = kinds | ({"integer"} if "number" in kinds else set())
    of_kind = {str: "string", bool: "boolean", int: "integer", float: "number"}
    values = [bad for bad in wrong if {**KINDS, **of_kind}[type(bad)] not in allowed]
    bounds = found.schema
    if "enum" in bounds:
        values.append("surely not")
    if "minimum" in bounds:
        values.append(bounds["minimum"] - 1)
    if "maximum" in bounds:
        values.append(bounds["maximum"] + 1)
    if "exclusiveMinimum" in bounds:
        values.append(bounds["exclusiveMinimum"])
    return values


async def test_what_the_document_does_not_allow_is_refused_by_name_and_null_says_nothing(
    cluster: Cluster, prefill: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="router.http")
    ask = Asking(cluster, prefill, caplog)
    problems = []
    for found in fields_of((await cluster.http.get("/openapi.json")).json()):
        path, part, around = PLACES[found.owner]
        plain = {**part, **FIELDS[found.owner][found.name].beside}
        values = outside(found)
        assert values, found
        for value in values:
            seen = await ask(path, around({**plain, found.name: value}))
            refused = seen.status == 400 and has_the_blame(found, seen.error.get("param"))
            if not refused:
                problems.append((found.owner, found.name, value, seen.status, seen.error))
        shown_as_sent = found.owner == "FunctionDefinition"
        if "null" in kinds_of(found.schema) and not (found.name in DRAWN or shown_as_sent):
            absent = {name: value for name, value in plain.items() if name != found.name}
            said = await ask(path, around({**absent, found.name: None}))
            if said != await ask(path, around(absent)):
                problems.append((found.owner, found.name, None, said.status, said.error))
    assert not problems


def test_the_documentation_names_every_field() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    bodies = ("CompletionRequest", "ChatRequest", "ResponseFormat", "JsonSchemaFormat")
    missing = {name for body in bodies for name in FIELDS[body] if f"`{name}`" not in text}
    assert not missing

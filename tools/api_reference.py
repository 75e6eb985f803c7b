"""Writes docs/api.md: the gRPC contract from its .proto, the HTTP bodies from the models that read
them, the statuses from the one mapping of errors.

All three are what runs, so the page cannot promise what the doors do not take; a test compares it
with what this writes.
Usage: python tools/api_reference.py [--check]
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from google.protobuf import descriptor_pb2 as pb  # noqa: E402
from grpc_tools import protoc  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from protos.errors import HTTP_ERRORS  # noqa: E402
from router.http.openapi import REQUESTS  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
PROTO = "protos/baton/v1/inference.proto"
HEAD = f"""# API reference

Written by `make docs` from [inference.proto](../{PROTO})
and from the models that read HTTP bodies; the text in between is in [http.md](http.md) and
[client.md](client.md). A running router describes itself too: gRPC by reflection, HTTP at
`/openapi.json`.
"""
Place = tuple[int, ...]
FIELD = pb.FieldDescriptorProto
TYPE_NAMES = {
    FIELD.TYPE_DOUBLE: "double",
    FIELD.TYPE_INT64: "int64",
    FIELD.TYPE_UINT64: "uint64",
    FIELD.TYPE_INT32: "int32",
    FIELD.TYPE_UINT32: "uint32",
    FIELD.TYPE_BOOL: "bool",
    FIELD.TYPE_STRING: "string",
    FIELD.TYPE_BYTES: "bytes",
    FIELD.TYPE_FLOAT: "float",
}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *grpc_part(), *http_part(), *errors_part()])


# ---- gRPC ----------------------------------------------------------------------------------------


def described_proto() -> pb.FileDescriptorProto:
    """The public contract with its comments, as the compiler sees it."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "set"
        arguments = ["protoc", f"-I{ROOT}", "--include_source_info", f"-o{target}", PROTO]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"protoc failed on {PROTO}")
        return pb.FileDescriptorSet.FromString(target.read_bytes()).file[0]


def grpc_part() -> Iterator[str]:
    file = described_proto()
    comments = {
        tuple(where.path): " ".join((where.leading_comments or where.trailing_comments).split())
        for where in file.source_code_info.location
    }
    yield f"\n## gRPC: `{file.package}.{file.service[0].name}`\n"
    yield "| call | takes | answers | |"
    yield "|---|---|---|---|"
    for index, method in enumerate(file.service[0].method):
        answer = ("stream of " if method.server_streaming else "") + short(method.output_type)
        note = comments.get((6, 0, 2, index), "")
        yield row(f"`{method.name}`", short(method.input_type), answer, note)
    for index, message in enumerate(file.message_type):
        yield from message_part(message, (4, index), comments)
    for index, enum in enumerate(file.enum_type):
        yield f"\n### {enum.name}\n"
        yield from sentence(comments.get((5, index), ""))
        yield "| value | number | |"
        yield "|---|---|---|"
        for number, value in enumerate(enum.value):
            note = comments.get((5, index, 2, number), "")
            yield row(f"`{value.name}`", str(value.number), note)


def message_part(
    message: pb.DescriptorProto, path: Place, comments: dict[Place, str]
) -> Iterator[str]:
    yield f"\n### {message.name}\n"
    yield from sentence(comments.get(path, ""))
    if not message.field:
        yield "No fields."
        return
    yield "| field | type | |"
    yield "|---|---|---|"
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    for index, field in enumerate(message.field):
        name = f"`{field.name}`"
        if field.HasField("oneof_index") and not field.proto3_optional:
            name += f" (one of `{message.oneof_decl[field.oneof_index].name}`)"
        yield row(name, type_of(field, maps), comments.get((*path, 2, index), ""))


def type_of(field: pb.FieldDescriptorProto, maps: dict[str, pb.DescriptorProto]) -> str:
    entry = maps.get(short(field.type_name))
    if entry is not None:
        key, value = entry.field
        return f"map of {type_of(key, {})} to {type_of(value, {})}"
    name = TYPE_NAMES.get(field.type) or short(field.type_name)
    if field.label == FIELD.LABEL_REPEATED:
        return f"list of {name}"
    return f"{name}, optional" if field.proto3_optional else name


def short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# ---- HTTP ----------------------------------------------------------------------------------------


def http_part() -> Iterator[str]:
    yield "\n## HTTP: bodies\n"
    yield '`null` always means "not said"; a field that is not listed is refused by its name.'
    for model in REQUESTS:
        yield from body_part(model)


def body_part(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    yield f"\n### {model.__name__}\n"
    yield from sentence(" ".join(schema.get("description", "").split()))
    yield "| field | type | |"
    yield "|---|---|---|"
    for name, field in schema["properties"].items():
        shown = f"`{name}`" + (", required" if name in required else "")
        about = " ".join(field.get("description", "").split())
        note = " ".join(filter(None, (bounds(field), about)))
        yield row(shown, json_type(field), note)


def json_type(field: dict[str, Any]) -> str:
    """A field's JSON type in words; references by their names."""
    if "$ref" in field:
        return short(field["$ref"].replace("/", "."))
    if "const" in field:
        return f"`{field['const']!r}`"
    if "enum" in field:
        values = [f"`{value!r}`" for value in field["enum"] if value is not None]
        return "one of " + ", ".join(values)
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = [json_type(kind) for kind in field[key] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if field.get("type") == "array":
        return f"list of {json_type(field.get('items', {}))}"
    return str(field.get("type", "any"))


def bounds(field: dict[str, Any]) -> str:
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
        "maxLength": "at most {} characters",
        "maxItems": "at most {} entries",
    }
    said = [text.format(field[key]) for key, text in words.items() if key in field]
    return (", ".join(said).capitalize() + ".") if said else ""


# ---- errors --------------------------------------------------------------------------------------


def errors_part() -> Iterator[str]:
    yield "\n## Errors\n"
    yield "| gRPC status | HTTP status | type of the HTTP error |"
    yield "|---|---|---|"
    for code, http in HTTP_ERRORS.items():
        yield row(f"`{code.value}`", str(http.status.value), f"`{http.type}`")
    yield ""


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sentence(text: str) -> Iterator[str]:
    if text:
        yield f"{text}\n"


def main() -> int:
    written = page()
    if "--check" in sys.argv[1:]:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != written
        if stale:
            print(f"{PAGE.relative_to(ROOT)} is out of date")
        return int(stale)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

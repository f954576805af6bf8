"""`/openapi.json`: the routes that are served, with the very types that read their bodies.

The table names each route once more; a route that is not in it is an error at start, so that the two cannot differ.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from clawloop_edge.gateway.errors import Shape

Json = dict[str, Any]
_REF = "#/components/schemas/{name}"
_REASONS = {
    400: "what was sent is wrong, and the message says what",
    401: "wrong or missing token",
    403: "called by a foreign name, or by a page of another origin",
    404: "there is no such thing",
    413: "the body is too large",
    503: "not now; try again after Retry-After",
}
_OPENAI_ERROR: Json = {
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
_ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


class Doc(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to say of one route.

    `body` reads its body; `parts` are the types of fields that are read on their own, so that what is unknown in them
    is kept. `reply` is the JSON schema of a 200; `streams`: it may also be server-sent events.
    """

    summary: str
    body: type[msgspec.Struct] | None = None
    parts: Mapping[str, Any] = {}
    reply: Json = {}
    content_type: str = "application/json"
    streams: bool = False
    statuses: tuple[int, ...] = (401, 403)
    shape: Shape = Shape.OPENAI
    open: bool = False


Docs = Mapping[tuple[str, str], Doc]
"""by method and path"""


def document(routes: Iterable[web.AbstractRoute], docs: Docs) -> Json:
    """The OpenAPI 3.1 document of these routes.

    Raises:
        KeyError: a route of which `docs` says nothing.
    """
    served = sorted(
        (route.resource.canonical, route.method)
        for route in routes
        if route.resource is not None and route.method != "HEAD"
    )
    found = {(method, path): docs[method, path] for path, method in served}
    schemas = _schemas(found.values())
    paths: dict[str, Json] = {}
    for (method, path), doc in found.items():
        paths.setdefault(path, {})[method.lower()] = _operation(doc, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "clawloop edge", "version": version("clawloop")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}],
    }


def _schemas(docs: Iterable[Doc]) -> dict[str, Json]:
    """The bodies' schemas. Fields that are read on their own get the schema that they are read with."""
    bodies = [doc for doc in docs if doc.body is not None]
    types = [kind for doc in bodies for kind in (doc.body, *doc.parts.values())]
    found, components = msgspec.json.schema_components(types, ref_template=_REF)
    schemas: dict[str, Json] = dict(components)
    position = 0
    for doc in bodies:
        body = schemas[found[position]["$ref"].rpartition("/")[2]]
        for offset, name in enumerate(doc.parts, start=1):
            body["properties"][name] = _with_part(body["properties"][name], found[position + offset])
        position += 1 + len(doc.parts)
    return {**schemas, "OpenaiError": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}


def _with_part(field: Json, part: Json) -> Json:
    """A list of anything becomes a list of `part`; null stays allowed."""
    if "anyOf" in field:
        return {**field, "anyOf": [_with_part(choice, part) for choice in field["anyOf"]]}
    return {**field, "items": part} if field.get("type") == "array" else field


def _operation(doc: Doc, path: str) -> Json:
    content: Json = {doc.content_type: {"schema": doc.reply}}
    if doc.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: Json = {"200": {"description": "done", "content": content}}
    error = {"$ref": _REF.format(name="AnthropicError" if doc.shape is Shape.ANTHROPIC else "OpenaiError")}
    for status in sorted({*doc.statuses, *((400, 413) if doc.body else ())}):
        body = doc.reply if doc.open else error
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": body}},
        }
    operation: Json = {"summary": doc.summary, "responses": responses}
    if doc.body is not None:
        schema = {"$ref": _REF.format(name=doc.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if doc.open:
        operation["security"] = []
    return operation

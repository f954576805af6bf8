"""`/openapi.json`: the routes that are served, with the very types that read their bodies.

Routes are described in a table (`openapi_docs`); a route of which it says nothing is an error at start, so that the two
cannot differ. What a type cannot say of a body is added to its schema, in the types' own metadata or in the table.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from clawloop_edge.gateway.errors import Shape

Json = dict[str, Any]
_REF = "#/components/schemas/{name}"
_MESSAGE: Json = {"type": "string", "minLength": 1}
_NAMED: Json = {"type": ["string", "null"]}
_OPENAI_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _MESSAGE, "type": {"type": "string"}, "param": _NAMED, "code": _NAMED},
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}
_ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": _MESSAGE},
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
_CLAW_R1_ERROR: Json = {
    **_OPENAI_ERROR,
    "required": ["error", "detail"],
    "properties": {**_OPENAI_ERROR["properties"], "detail": _MESSAGE},
}
_ERRORS = {
    Shape.OPENAI: ("OpenaiError", _OPENAI_ERROR),
    Shape.ANTHROPIC: ("AnthropicError", _ANTHROPIC_ERROR),
    Shape.CLAW_R1: ("ClawR1Error", _CLAW_R1_ERROR),
}
_EVENT: Json = {
    "description": "each of the server-sent events; its data is JSON, but for OpenAI's [DONE]",
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
REASONS = {
    400: "what was sent is wrong, and the message says what",
    401: "wrong or missing token",
    403: "called by a foreign name, or by a page of another origin",
    404: "there is no such thing",
    408: "the body took too long to come",
    409: "it contradicts what is known already",
    413: "the body is too large",
    415: "the body is packed; send it as it is",
    422: "it cannot be judged, however often it is sent",
    500: "the model failed, and the log says how",
    503: "not now; try again after Retry-After",
}
_BODY_STATUSES = (400, 408, 413, 415)
"""what may be said of any body"""


class Part(msgspec.Struct, frozen=True):
    """A list's items that are read on their own, so that what is unknown in them is kept: an item is one of `kinds`,
    and matches `rules`, a JSON schema."""

    kinds: tuple[type[msgspec.Struct], ...]
    rules: Json = {}


class Doc(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to say of one route.

    `body` reads its body; `parts` are its fields that are lists of `Part`, and `rules` a JSON schema that it matches
    besides. `reply` is the JSON schema of a 200; `streams`: it may also be server-sent events. `headers` and `query`
    are schemas of optional ones. `keyed`: a trajectory's id in the path is as good as the token. `open`: no token is
    needed, and whatever the status, the reply is the same.
    """

    summary: str
    body: type[msgspec.Struct] | None = None
    parts: Mapping[str, Part] = {}
    rules: Json = {}
    optional_body: bool = False
    reply: Json = {}
    content_type: str = "application/json"
    streams: bool = False
    headers: Mapping[str, Json] = {}
    query: Mapping[str, Json] = {}
    statuses: tuple[int, ...] = ()
    shape: Shape = Shape.OPENAI
    keyed: bool = False
    open: bool = False


Docs = Mapping[tuple[str, str], Doc | None]
"""by method and path; None: other names of what is described elsewhere"""


def add_document(app: web.Application, docs: Docs) -> None:
    """Serve `/openapi.json`, of all the routes that `app` has once it starts.

    The start raises LookupError if `docs` says nothing of one of them.
    """
    written: list[bytes] = []

    async def write(app: web.Application) -> None:
        written.append(msgspec.json.encode(document(routes_of(app), docs)))

    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=written[-1], content_type="application/json")

    app.on_startup.append(write)
    app.router.add_get("/openapi.json", handle)


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """Method and path of what `app` serves; HEAD comes with GET."""
    routes = [(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None]
    return [route for route in routes if route[0] != "HEAD"]


def document(routes: Iterable[tuple[str, str]], docs: Docs) -> Json:
    """The OpenAPI 3.1 document of these routes, each a method and a path.

    Raises:
        LookupError: a route of which `docs` says nothing.
    """
    served = sorted((path, method) for method, path in routes)
    unknown = [f"{method} {path}" for path, method in served if (method, path) not in docs]
    if unknown:
        raise LookupError(f"/openapi.json does not know {', '.join(unknown)}; describe it in gateway/openapi_docs.py")
    found = {(method, path): doc for path, method in served if (doc := docs[method, path]) is not None}
    bodies, schemas = _schemas([doc for doc in found.values() if doc.body is not None])
    paths: dict[str, Json] = {}
    for (method, path), doc in found.items():
        paths.setdefault(path, {})[method.lower()] = _operation(doc, path, next(bodies) if doc.body else None)
    return {
        "openapi": "3.1.0",
        "info": {"title": "clawloop edge", "version": version("clawloop")},
        "paths": paths,
        "components": {
            "schemas": {**schemas, **dict(_ERRORS.values())},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}],
    }


def _schemas(docs: list[Doc]) -> tuple[Iterator[Json], dict[str, Json]]:
    """The schemas of these bodies in order, and of the types that they are made of by name."""
    kinds: dict[Any, None] = {}
    for doc in docs:
        kinds.update(dict.fromkeys((doc.body, *(kind for part in doc.parts.values() for kind in part.kinds))))
    found, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    refs = dict(zip(kinds, found, strict=True))
    bodies = [_body(doc, refs, components) for doc in docs]
    tops = {_name(refs[doc.body]) for doc in docs}
    return iter(bodies), {name: schema for name, schema in components.items() if name not in tops}


def _name(ref: Json) -> str:
    return str(ref["$ref"]).rpartition("/")[2]


def _body(doc: Doc, refs: Mapping[Any, Json], components: Mapping[str, Any]) -> Json:
    schema: Json = components[_name(refs[doc.body])]
    properties = dict(schema["properties"])
    for name, part in doc.parts.items():
        kinds = [refs[kind] for kind in part.kinds]
        item = {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), **part.rules}
        properties[name] = _with_items(properties[name], item)
    return {**schema, "properties": properties, **doc.rules}


def _with_items(field: Json, item: Json) -> Json:
    """A list of anything becomes a list of `item`; what else the field may be stays."""
    if "anyOf" in field:
        return {**field, "anyOf": [_with_items(choice, item) for choice in field["anyOf"]]}
    return {**field, "items": item} if field.get("type") == "array" else field


def _operation(doc: Doc, path: str, body: Json | None) -> Json:
    content: Json = {doc.content_type: {"schema": doc.reply}}
    if doc.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    responses: Json = {"200": {"description": "done", "content": content}}
    error = {"$ref": _REF.format(name=_ERRORS[doc.shape][0])}
    common = (403,) if doc.open or doc.keyed else (401, 403)
    for status in sorted({*common, *doc.statuses, *(_BODY_STATUSES if body else ())}):
        schema = {"anyOf": [doc.reply, error]} if doc.open and status >= 500 else error
        responses[str(status)] = {
            "description": REASONS[status],
            "content": {"application/json": {"schema": schema}},
        }
    operation: Json = {"summary": doc.summary, "responses": responses}
    if body is not None:
        required = not doc.optional_body
        operation["requestBody"] = {"required": required, "content": {"application/json": {"schema": body}}}
    if parameters := _parameters(doc, path):
        operation["parameters"] = parameters
    if doc.open or doc.keyed:
        operation["security"] = [] if doc.open else [{"bearer": []}, {"key": []}, {}]
    return operation


def _parameters(doc: Doc, path: str) -> list[Json]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    text = {"type": "string", "minLength": 1}
    return [
        *({"name": name, "in": "path", "required": True, "schema": text} for name in names),
        *({"name": name, "in": "query", "schema": schema} for name, schema in doc.query.items()),
        *({"name": name, "in": "header", "schema": schema} for name, schema in doc.headers.items()),
    ]

"""`/openapi.json` is true: schemathesis finds no call that is answered otherwise, and real replies match it."""

import asyncio
import json
import os
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import pytest
import requests
import schemathesis
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from clawloop_edge.app import Edge
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.openapi import document, routes_of
from clawloop_edge.gateway.openapi_docs import DOCS
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool

from .conftest import TOKEN, Serve, Served
from .corpus import SEED, TARGETS, mutations

AUTH = {"Authorization": f"Bearer {TOKEN}"}
SAID_OTHERWISE = (
    r"tool_choice(\.tools)? names .*, which is not among the tools",
    r"tool_choice asks for a tool call, and no tools are given",
    r"top_logprobs needs ",
    r"the schema (cannot be enforced|refers to|is nested)",
    r"an answer that is begun cannot be continued",
    r"input has nothing to answer",
    r"token id \d+ is outside the vocabulary",
    r"this Idempotency-Key was sent before with another body",
    r"must be 1 to 200 printable characters",
    r"the prompt has \d+ tokens and the model's context is ",
    r"messages are nested too deep",
    r"must be an integer( or null)?, not a floating-point number",
    r"prompt must be text or a list of token ids",
)
"""Refusals of what a schema allows: of fields that must fit each other or what was sent before, of JSON schemas,
of 1.0 for 1, and what only the model knows. Everything else that the document allows has to be answered."""


class Live(NamedTuple):
    """A gateway in a thread of its own, and its document."""

    base_url: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A gateway that sync code can call."""
    started: Any = threading.Event()
    found: dict[str, Any] = {}

    async def run(pool: Pool) -> None:
        engine = ScriptedEngine(tiny_model, lambda prompt: "Fine.")
        runner = make_runner(make_app(engine, pool, settings=GatewaySettings(), token=TOKEN))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.update(port=runner.addresses[0][1], stop=asyncio.Event(), loop=asyncio.get_running_loop())
        started.set()
        await found["stop"].wait()
        await runner.cleanup()
        await engine.close()

    with Pool.open(tmp_path_factory.mktemp("live"), KnownKey.of(os.urandom(32)), writer=True) as pool:
        thread = threading.Thread(target=lambda: asyncio.run(run(pool)))
        thread.start()
        assert started.wait(30)
        base_url = f"http://127.0.0.1:{found['port']}"
        yield Live(base_url, requests.get(f"{base_url}/openapi.json", headers=AUTH, timeout=10).json())
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(30)


STATUS = ("GET", "/v1/status")
API = schemathesis.openapi.from_dict(
    document([route for route in DOCS if route != STATUS], DOCS), config=SchemathesisConfig.from_dict({"seed": 20})
)


def said_otherwise(response: Any) -> bool:
    """Whether a 400 is one of those that no schema tells."""
    return response.status_code == 400 and any(re.search(reason, response.text) for reason in SAID_OTHERWISE)


@API.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_schemathesis_finds_nothing(case: Any, live: Live) -> None:
    load_all_checks()
    response = case.call(base_url=live.base_url, headers=AUTH, timeout=10)
    relaxed = []
    if said_otherwise(response):
        relaxed.append("positive_data_acceptance")
    if response.status_code == 503 and "no scorer is configured" in response.text:
        relaxed.append("not_a_server_error")  # there is none in this test
    case.validate_response(response, excluded_checks=CHECKS.get_by_names(relaxed), headers=AUTH)


def reply_schema(document: dict[str, Any], path: str, *, method: str = "post", status: str = "200") -> Any:
    """What the document says of a reply."""
    content = document["paths"][path][method]["responses"][status]["content"]
    schema = content["application/json"]["schema"]
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})


async def described(served: Served) -> dict[str, Any]:
    """The gateway's document."""
    async with served.http.get(f"{served.base_url}/openapi.json", headers=AUTH) as reply:
        assert reply.status == 200
        return dict(await reply.json())


@pytest.fixture
async def served(scripted: Serve) -> Served:
    """A gateway whose engine always says the same."""
    return await scripted(lambda prompt: "Fine.")


async def test_every_route_is_described_and_the_document_needs_the_token(served: Served) -> None:
    async with served.http.get(f"{served.base_url}/openapi.json") as reply:
        assert reply.status == 401
    document = await described(served)
    assert document["openapi"] == "3.1.0"
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    aliases = {route for route, doc in DOCS.items() if doc is None}
    assert told == set(routes_of(served.app)) - aliases
    assert told | aliases | {STATUS} == set(DOCS), "the table describes nothing that is not served"


async def test_a_route_that_is_not_described_is_an_error_at_start(pool: Pool, tiny_model: Path, serve: Serve) -> None:
    engine = ScriptedEngine(tiny_model, [])
    app = make_app(engine, pool, settings=GatewaySettings(), token=TOKEN)

    async def secret(request: web.Request) -> web.Response:
        return web.Response()

    app.router.add_get("/v1/secret", secret)
    runner = make_runner(app)
    with pytest.raises(LookupError, match="does not know GET /v1/secret"):
        await runner.setup()
    await engine.close()


async def test_every_schema_is_one(served: Served) -> None:
    document = await described(served)
    for name, schema in document["components"]["schemas"].items():
        assert jsonschema_rs.meta.is_valid({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"}), name
    for path in document["paths"]:
        for method, operation in document["paths"][path].items():
            for status in operation["responses"]:
                if "application/json" in operation["responses"][status]["content"]:
                    reply_schema(document, path, method=method, status=status)


CALLING = '<think>\nhm\n</think>\n\nLet me.\n<tool_call>\n{"name": "look", "arguments": {"word": "a"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["chat", "responses", "messages", "count_tokens", "completions", "trajectory_chat"])
async def test_real_replies_are_as_described(name: str, scripted: Serve) -> None:
    served = await scripted(lambda prompt: CALLING)
    target = TARGETS[name]
    document = await described(served)
    _, _, begun = await served.post("/init_trajectory")
    path = target.path.format(trajectory=begun["trajectory_uid"])
    length = {"max_output_tokens" if name == "responses" else "max_tokens": 3}
    whole = {"max_output_tokens" if name == "responses" else "max_tokens": 400}
    free = {} if name in ("count_tokens", "completions") else {"tool_choice": None}
    for changed in ({**whole, **free}, {**length, **free}, {**whole, "stop": "Let", "stop_sequences": ["Let"]}):
        body = {**target.body, "max_completion_tokens": None, "text": None, **changed}
        status, _, reply = await served.post(path, body)
        assert status == 200, reply
        reply_schema(document, target.described or target.path).validate(reply)
    for wrong, status in (({"model": 5}, "400"), ({"model": "clawloop@77"}, "404")):
        found, _, reply = await served.post(path, {**target.body, **wrong})
        if name == "count_tokens" and status == "404":
            continue  # a count asks no adapter
        assert str(found) == status
        reply_schema(document, target.described or target.path, status=status).validate(reply)


async def test_the_other_replies_are_as_described(served: Served) -> None:
    document = await described(served)
    for path in ("/v1/models", "/v1/models/{name}", "/healthz", "/readyz", "/health", "/ready", "/openapi.json"):
        async with served.http.get(served.base_url + path.format(name="clawloop"), headers=AUTH) as reply:
            reply_schema(document, path, method="get").validate(await reply.json())
    _, _, begun = await served.post("/init_trajectory")
    reply_schema(document, "/init_trajectory").validate(begun)
    _, headers, _ = await served.post(TARGETS["chat"].path, TARGETS["chat"].body)
    step_id = headers["x-clawloop-step"]
    served.kept(step_id)
    status, _, reply = await served.post("/v1/feedback", {"step_id": step_id, "value": 1})
    assert status == 200, reply
    reply_schema(document, "/v1/feedback").validate(reply)
    for name in ("generate", "submit_steps", "register_trajectory", "complete_trajectory"):
        target = TARGETS[name]
        status, _, reply = await served.post(target.path.format(trajectory=begun["trajectory_uid"]), target.body)
        assert status == 200, reply
        reply_schema(document, target.described or target.path).validate(reply)


async def test_the_status_of_an_edge_is_as_described(pool: Pool, tiny_model: Path, tmp_path: Path) -> None:
    engine = ScriptedEngine(tiny_model, [])
    edge = Edge(EdgeHome(tmp_path), EdgeConfig(model=ModelConfig(path=str(tiny_model))), pool=pool, engine=engine)
    app = make_app(engine, pool, settings=GatewaySettings(), token=TOKEN)
    app.router.add_get("/v1/status", edge.status)
    async with TestClient(TestServer(app), headers=AUTH) as client:
        told = await (await client.get("/openapi.json")).json()
        status = await (await client.get("/v1/status")).json()
    reply_schema(told, "/v1/status", method="get").validate(status)
    doc = DOCS[STATUS]
    assert doc is not None
    assert set(status) == set(doc.reply["required"])
    await engine.close()


async def test_a_stream_says_its_content_type(served: Served) -> None:
    document = await described(served)
    for name in ("chat", "responses", "messages", "completions"):
        target = TARGETS[name]
        body = json.dumps({**target.body, "stream": True, "text": None})
        async with served.http.post(served.base_url + target.path, data=body, headers=AUTH) as reply:
            await reply.read()
            assert reply.status == 200
            content = document["paths"][target.path]["post"]["responses"]["200"]["content"]
            assert reply.content_type in content


@pytest.mark.parametrize("name", ["chat", "responses", "messages", "completions", "generate"])
async def test_what_the_document_allows_is_answered(name: str, served: Served) -> None:
    target, document = TARGETS[name], await described(served)
    schema = document["paths"][target.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})
    allowed = [(what, body) for what, body in mutations(target.body) if validator.is_valid(body)]
    for what, body in random.Random(SEED).sample(allowed, min(150, len(allowed))):
        if body.get("stream"):
            continue
        status, _, reply = await served.post(target.path, body)
        refused = status == 400 and any(re.search(reason, reply["error"]["message"]) for reason in SAID_OTHERWISE)
        assert status in (200, 404) or refused, (what, status, reply)

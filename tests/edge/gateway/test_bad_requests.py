"""What is wrong with a request is said in the shape of its API, and is never a 500."""

import asyncio
import gzip
import io
import json
import time
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import openai
import pytest
from openai import AsyncOpenAI

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import STATS

from .conftest import Serve, Served
from .corpus import TARGETS, malformed

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "clawloop", "messages": USER, **fields}).encode()


def said(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


ASKED = {"role": "user", "content": "x"}
ERROR_FIELDS = {"message", "type", "param", "code"}


def check_shape(body: Any) -> None:
    """OpenAI's error body and nothing else."""
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


@pytest.fixture
async def served(scripted: Serve) -> Served:
    """A gateway whose engine always says the same."""
    return await scripted(lambda prompt: "Fine.")


def check_error(shape: str, body: Any) -> None:
    """The error body of an API and nothing else, with a message that is short and tells something."""
    if shape == "anthropic":
        assert set(body) == {"type", "error"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == ({"error", "detail"} if shape == "claw-r1" else {"error"})
        assert set(body["error"]) == ERROR_FIELDS
        assert body.get("detail", body["error"]["message"]) == body["error"]["message"]
    assert 10 <= len(body["error"]["message"]) <= 1000
    assert "internal" not in body["error"]["message"]


def validity(document: dict[str, Any], path: str) -> Callable[[Any], bool]:
    """Whether a body is what the document says of a path."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})
    return validator.is_valid


@pytest.mark.parametrize("name", TARGETS)
async def test_two_hundred_malformed_bodies_and_more_get_a_4xx_in_the_shape_of_the_api(
    name: str, served: Served
) -> None:
    target = TARGETS[name]
    _, _, begun = await served.post("/init_trajectory")
    path = target.path.format(trajectory=begun["trajectory_uid"])
    auth = {"x-api-key": served.token}
    async with served.http.get(f"{served.base_url}/openapi.json", headers=auth) as reply:
        document = await reply.json()
    is_valid = validity(document, target.described or target.path)
    assert is_valid(target.body), "the body that is broken is a good one"
    corpus = malformed(target.body, is_valid=is_valid, said=target.said, empty_is_wrong=target.empty_is_wrong)
    assert len({data for _, data in corpus}) >= 200
    if target.good != 200:
        assert (await served.post(path, target.body))[0] == target.good
    for what, data in corpus:
        began = time.process_time()
        async with asyncio.timeout(60):
            status, headers, body = await served.post(path, data=data)
        assert 400 <= status < 500, (status, what, data[:200])
        assert time.process_time() - began < 2, what
        assert headers["Content-Type"] == "application/json"
        check_error(target.shape, body)
    served.pool.submit(lambda database: None).result(10)
    stats = served.pool.stats()
    assert (stats.steps, stats.signals, stats.sessions) == (0, 0, 0), "nothing is kept of what was refused"
    assert served.app[STATS]().in_flight == served.engine.health().in_flight == 0
    assert (await served.post(path, target.body))[0] == target.good, "and a good one is answered afterwards"


async def test_a_body_of_very_many_parts_is_refused_and_others_are_served_meanwhile(served: Served) -> None:
    async def others() -> float:
        longest = 0.0
        while True:
            began = time.thread_time()  # of the loop's thread: a busy machine takes none of it
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - began)
            if done.is_set():
                return longest

    done = asyncio.Event()
    watching = asyncio.create_task(others())
    bodies = [
        said(*[ASKED] * 20_000),
        said({"role": "user", "content": [{"type": "text", "text": "x"}] * 50_000}),
        said({"role": "user", "content": "word " * 400_000}),
        chat(stop=["x"] * 500_000),
        chat(tools=["x"] * 500_000),
    ]
    for data in bodies:
        status, _, body = await served.post(CHAT, data=io.BytesIO(data))
        assert status == 400, body
    done.set()
    assert await watching < 2, "the loop stood still"


async def test_what_does_not_change_the_answer_is_accepted(served: Served) -> None:
    fields: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": 1},
        "store": False,
        "unknown": [1, {"x": None}],
        "n": 1,
        "temperature": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "presence_penalty": 0,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "reasoning_effort": "low",
        "top_k": -1,
        "stop": None,
        "tools": None,
        "service_tier": "auto",
        "stream_options": None,
    }
    status, _, body = await served.post(CHAT, data=chat(**fields))
    assert (status, body.get("error")) == (200, None)


@pytest.mark.parametrize("path", ["/v1/messages", "/{t}/1/v1/messages", "/{t}/1/messages", "/{t}/1/v1/v1/messages"])
async def test_errors_of_anthropics_api_have_its_shape_on_every_path(served: Served, path: str) -> None:
    _, _, begun = await served.post("/init_trajectory")
    for trajectory, expected in ((begun["trajectory_uid"], 400), ("unknown", 200)):
        status, _, body = await served.post(
            path.format(t=trajectory), data=chat(max_tokens=0 if expected == 400 else 5)
        )
        assert status == expected, body
        if status != 200:
            check_error("anthropic", body)
    async with served.http.post(served.base_url + path.format(t="unknown"), json={}) as reply:
        assert reply.status in (401, 404)
        check_error("anthropic", await reply.json())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (chat(max_tokens="x"), "max_tokens must be an integer or null, not a string"),
        (chat(max_tokens=1.5), "max_tokens must be an integer or null, not a floating-point number"),
        (chat(stop=[1]), "stop[0] must be a string, not an integer"),
        (chat(stream={}), "stream must be a boolean or null, not an object"),
        (said(ASKED, {"content": "x"}), "messages[1].role is missing"),
        (b"[]", "the body must be an object, not an array"),
        (b"{}", "messages is missing"),
    ],
)
async def test_a_wrong_field_is_told_in_one_sentence_with_what_it_should_be(
    served: Served, data: bytes, message: str
) -> None:
    status, _, body = await served.post(CHAT, data=data)
    assert (status, body["error"]["message"]) == (400, message)


async def test_the_field_to_blame_is_named(served: Served) -> None:
    for data, param in [
        (said(ASKED, {"content": "x"}), "messages[1].role"),
        (chat(max_tokens="x"), "max_tokens"),
        (chat(tools=[tool(name="a"), tool(name="b", parameters=1)]), "tools[1].function.parameters"),
        (chat(n=33), "n"),
    ]:
        _, _, body = await served.post(CHAT, data=data)
        assert body["error"]["param"] == param


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(served: Served) -> None:
    status, _, body = await served.post(CHAT, data=chat(messages=[{"role": "user", "content": "a b " * 20_000}]))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert str(served.engine.tokenizer.context_length) in body["error"]["message"]
    numbers = [int(word) for word in body["error"]["message"].split() if word.isdigit()]
    assert max(numbers) > served.engine.tokenizer.context_length


async def test_a_wrong_or_missing_token_is_401(served: Served) -> None:
    async with AsyncOpenAI(base_url=served.sdk["base_url"], api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
    assert caught.value.code == "invalid_api_key"
    for headers in ({}, {"Authorization": served.token}, {"Authorization": f"Basic {served.token}"}, {"x-api-key": ""}):
        async with served.http.get(f"{served.base_url}/v1/models", headers=headers) as reply:
            assert reply.status == 401
            check_shape(await reply.json())
    async with served.http.get(f"{served.base_url}/v1/models", headers={"x-api-key": served.token}) as reply:
        assert reply.status == 200


async def test_foreign_hosts_and_origins_are_403(served: Served) -> None:
    auth = {"Authorization": f"Bearer {served.token}"}
    foreign = [
        {"Host": "evil.example"},
        {"Host": "evil.example:8100"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "x@127.0.0.1"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
    ]
    for headers in foreign:
        for path in ("/v1/models", "/healthz"):
            async with served.http.get(served.base_url + path, headers={**auth, **headers}) as reply:
                assert reply.status == 403, headers
                check_shape(await reply.json())
    for headers in ({"Host": "localhost:1"}, {"Host": "[::1]:8100"}, {"Origin": "http://127.0.0.1:9"}):
        async with served.http.get(f"{served.base_url}/v1/models", headers={**auth, **headers}) as reply:
            assert reply.status == 200, headers


async def test_unknown_paths_are_404_and_wrong_methods_405(served: Served) -> None:
    auth = {"Authorization": f"Bearer {served.token}"}
    for method, path, wanted in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("POST", "/v1/chat/completions/x", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/feedback", 405),
        ("OPTIONS", CHAT, 405),
    ]:
        async with served.http.request(method, served.base_url + path, headers=auth) as reply:
            assert reply.status == wanted, (method, path)
            check_shape(await reply.json())


async def test_a_body_over_the_limit_is_413_and_a_packed_one_415(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", max_body_bytes=10_000)
    big = chat(padding="x" * 20_000)
    status, _, body = await served.post(CHAT, data=big)
    assert status == 413
    check_shape(body)
    for packing in ("gzip", "deflate", "br", "zstd", "x-unknown"):
        packed = {"Content-Encoding": packing}
        status, _, body = await served.post(CHAT, data=gzip.compress(chat()), headers=packed)
        assert status == 415
        check_shape(body)
    assert (await served.post(CHAT, data=chat()))[0] == 200


async def test_our_own_headers_are_checked(served: Served) -> None:
    for headers in (
        {"X-Clawloop-Session": ""},
        {"X-Clawloop-Session": "x" * 201},
        {"X-Clawloop-Channel": "test"},
        {"X-Clawloop-Incognito": "maybe"},
    ):
        status, _, body = await served.post(CHAT, data=chat(), headers=headers)
        assert status == 400, headers
        check_shape(body)
    status, _, _ = await served.post(
        CHAT, data=chat(), headers={"traceparent": "garbage", "session_id": "\u00e9" * 999}
    )
    assert status == 200


async def test_a_busy_engine_is_503_with_retry_after(
    serve: Serve, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawloop_edge.errors import EngineBusy

    class Busy(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            raise EngineBusy("1024 calls are in flight")

    served = await serve(Busy(tiny_model, []))
    status, headers, body = await served.post(CHAT, data=chat())
    assert (status, headers["Retry-After"], body["error"]["code"]) == (503, "2", "engine_busy")


async def test_a_bug_is_a_500_that_tells_nothing_of_the_prompt(
    serve: Serve, tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter" + "2"

    class Broken(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            raise ValueError(f"prompt was: {secret}")

    served = await serve(Broken(tiny_model, []))
    status, _, body = await served.post(CHAT, data=chat())
    assert status == 500
    check_shape(body)
    assert secret not in json.dumps(body) + caplog.text
    assert "ValueError" in caplog.text


async def test_a_truncated_body_ends_nothing_but_itself(served: Served) -> None:
    port = int(served.base_url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {served.token}", "Content-Length: 500"]
    writer.write("\r\n".join([*head, "", '{"messages": [']).encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    assert (await served.post(CHAT, data=chat()))[0] == 200

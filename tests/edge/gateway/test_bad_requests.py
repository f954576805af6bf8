"""What is wrong with a request is said in OpenAI's shape, and is never a 500."""

import asyncio
import gzip
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from clawloop_edge.engine.scripted import ScriptedEngine

from .conftest import Serve, Served

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "clawloop", "messages": USER, **fields}).encode()


def said(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


ASKED = {"role": "user", "content": "x"}
CORPUS: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"{}",
    b"not json",
    b'{"messages": [{"role": "user", "content": "x"}]} trailing',
    b'{"messages": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'\xef\xbb\xbf{"messages": []}',
    b"[" * 200_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"\x00" * 100,
    said(),
    said("hi"),
    said(None),
    said({}),
    said({"content": "no role"}),
    said({"role": None, "content": "x"}),
    said({"role": 1, "content": "x"}),
    said({"role": "robot", "content": "x"}),
    said({"role": "function", "name": "f", "content": "x"}),
    said({"role": "user"}),
    said({"role": "user", "content": None}),
    said({"role": "user", "content": 5}),
    said({"role": "user", "content": {"text": "x"}}),
    said({"role": "user", "content": ["x"]}),
    said({"role": "user", "content": [{"type": "text"}]}),
    said({"role": "user", "content": [{"type": "text", "text": 1}]}),
    said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}),
    said({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
    said({"role": "tool", "content": "no id"}),
    said({"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}),
    said(ASKED, {"role": "assistant", "content": "x", "tool_calls": "f"}),
    said(ASKED, {"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}),
    said(ASKED, {"role": "assistant", "content": "x", "tool_calls": [{"id": "a", "function": {"name": 1}}]}),
    said(ASKED, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]}),
    said(ASKED, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}),
    chat(messages="hi"),
    chat(messages={"role": "user"}),
    chat(model=5),
    chat(model="clawloop@latest"),
    chat(model="clawloop@77"),
    chat(n=0),
    chat(n=17),
    chat(tool_choice="required"),
    chat(tools=[tool(name="f")], tool_choice={"type": "function", "function": {"name": "g"}}),
    chat(response_format={"type": "xml"}),
    chat(top_logprobs=2),
    chat(guided_json={"type": "object"}),
    chat(stop_token_ids=[1]),
    chat(chat_template_kwargs={"date": "x"}),
    chat(n="1"),
    chat(max_tokens=0),
    chat(max_tokens=-1),
    chat(max_tokens="10"),
    chat(max_tokens=1.5),
    chat(max_completion_tokens=10**40),
    chat(temperature="hot"),
    chat(temperature=-1),
    chat(temperature=3),
    chat(temperature=True),
    chat(top_p=0),
    chat(top_p=1.1),
    chat(top_k=-2),
    chat(min_p=2),
    chat(seed="x"),
    chat(seed=2**70),
    chat(stop=5),
    chat(stop=[""]),
    chat(stop=["a"] * 17),
    chat(stream="yes"),
    chat(stream_options="usage"),
    chat(tools="look"),
    chat(tools=[{}]),
    chat(tools=[{"type": "function"}]),
    chat(tools=[tool()]),
    chat(tools=[tool(name="bad name!")]),
    chat(tools=[tool(name="f", parameters="none")]),
    chat(tools=[{"type": "custom", "custom": {"name": "f"}}]),
    chat(functions=[{"name": "f"}]),
    chat(logit_bias={"5": 1}),
    chat(presence_penalty=0.5),
    chat(frequency_penalty=0.5),
    chat(repetition_penalty=1.2),
    chat(response_format={"type": "json_schema", "json_schema": {}}),
    chat(modalities=["text", "audio"]),
    chat(audio={"voice": "x"}),
    chat(logprobs="yes"),
    chat(top_logprobs=21),
    chat(messages=[{"role": "user", "content": "word " * 80_000}]),
]


def check_shape(body: Any) -> None:
    """OpenAI's error body and nothing else."""
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


@pytest.fixture
async def served(scripted: Serve) -> Served:
    """A gateway whose engine always says the same."""
    return await scripted(lambda prompt: "Fine.")


async def test_a_corpus_of_malformed_bodies_gets_a_4xx_in_openais_shape(served: Served) -> None:
    assert len(CORPUS) >= 60
    for data in CORPUS:
        for path in (CHAT, "/v1/feedback"):
            status, _, body = await served.post(path, data=data)
            assert status in (400, 404), (status, path, data[:80])
            check_shape(body)
    assert (await served.post(CHAT, data=chat()))[0] == 200


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


async def test_a_body_over_the_limit_is_413_also_when_packed(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.", max_body_bytes=10_000)
    big = chat(padding="x" * 20_000)
    status, _, body = await served.post(CHAT, data=big)
    assert status == 413
    check_shape(body)
    status, _, body = await served.post(CHAT, data=gzip.compress(big), headers={"Content-Encoding": "gzip"})
    assert status in (400, 413)
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

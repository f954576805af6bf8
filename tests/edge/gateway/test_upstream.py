"""The gateway before other people's servers: what is kept of them, what may be learned, and how their errors arrive."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.upstream_open import open_upstream
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.gateway.source import INEXACT
from clawloop_shared.records import check_step

from ..fake_vllm import FakeVllm, PlainServer, chunk, delta, end, replies, running, says, whole
from .conftest import Serve, Served

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
Before = Callable[..., Awaitable[Served]]


@pytest.fixture
async def before(serve: Serve) -> AsyncIterator[Before]:
    """`await before(server, model=folder, **settings)` -> a gateway before this server."""
    async with AsyncExitStack() as stack:

        async def start(server: PlainServer | FakeVllm, *, model: Path | None = None, **settings: Any) -> Served:
            url = await stack.enter_async_context(running(server.app()))
            engine = await open_upstream(UpstreamSettings(url=url, **settings), folder=model)
            stack.push_async_callback(engine.close)
            return await serve(engine)

        yield start


async def ask(served: Served, **more: Any) -> Any:
    return await served.post(CHAT, {"messages": MESSAGES, "max_tokens": 20, **more})


async def test_a_plain_servers_answer_is_served_kept_and_marked_inexact(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    server.answer = whole({"content": "Hello", "reasoning_content": "hm"})
    status, headers, body = await ask(served)
    assert (status, headers["x-clawloop-trainable"]) == (200, f"no ({INEXACT})")
    assert headers["x-clawloop-policy"] == "upstream:plain@0"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": "hm",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 5
    kept = served.kept(headers["x-clawloop-step"])
    assert kept.text == "Hello"
    assert kept.step.untrainable == INEXACT
    assert kept.step.response_ids == []
    ready = await served.http.get(f"{served.base_url}/readyz")
    assert (ready.status, (await ready.json())["versions"]) == (200, [0])


async def test_a_reply_of_nothing_but_a_call_is_kept_and_continued(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    call = {"index": 0, "id": "chatcmpl-tool-1", "function": {"name": "look", "arguments": '{"a": 1}'}}
    server.answer = says(chunk(delta={"tool_calls": [call]}), end("tool_calls"))
    body: dict[str, Any] = {"model": "any", "messages": MESSAGES, "tools": [TOOL]}
    async with openai.AsyncOpenAI(**served.sdk) as client:
        chunks = [event async for event in await client.chat.completions.create(**body, stream=True)]
    found = [c for event in chunks for choice in event.choices for c in choice.delta.tool_calls or []]
    assert [(c.function.name, c.function.arguments) for c in found if c.function] == [("look", '{"a": 1}')]
    assert [choice.finish_reason for event in chunks for choice in event.choices][-1] == "tool_calls"
    first = served.kept(chunks[0].id)
    assert first.reply["tool_calls"][0]["function"]["name"] == "look"

    server.answer = says(delta("seen"), end("stop"))
    turn = [
        *MESSAGES,
        first.reply,
        {"role": "tool", "tool_call_id": first.reply["tool_calls"][0]["id"], "content": "x"},
    ]
    _, headers, _ = await ask(served, messages=turn)
    second = served.kept(headers["x-clawloop-step"])
    assert second.step.parent_id == first.step.step_id
    assert second.step.run_id == first.step.run_id


async def test_text_arrives_token_by_token_while_the_server_still_talks(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    go_on = asyncio.Event()

    async def slowly(request: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(delta("first"))
        await go_on.wait()
        await response.write(delta("second") + end("stop") + b"data: [DONE]\n\n")
        return response

    server.answer = slowly
    body = {"messages": MESSAGES, "stream": True}
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(served.base_url + CHAT, json=body, headers=auth) as reply:
        seen = b""
        while b"first" not in seen:
            seen += await asyncio.wait_for(reply.content.readany(), 5)
        assert b"second" not in seen
        go_on.set()
        rest = seen + await reply.read()
    assert rest.index(b"first") < rest.index(b"second")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("status", "seen", "code", "retry"),
    [(400, 400, "context_length_exceeded", None), (429, 503, "engine_busy", "2"), (500, 500, "engine_error", None)],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_upstream_error_has_a_status_and_the_api_s_shape(
    before: Before, status: int, seen: int, code: str, retry: str | None, *, stream: bool
) -> None:
    server = PlainServer()
    served = await before(server)
    error = {"message": "too long", "param": "messages", "code": "context_length_exceeded"}
    server.answer = replies({"error": error}, status=status)
    got, headers, body = await ask(served, stream=stream)
    assert (got, body["error"]["code"], headers.get("Retry-After")) == (seen, code, retry)
    assert "too long" in body["error"]["message"]


async def test_a_stream_that_breaks_ends_with_an_error_and_what_came_is_kept(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    server.answer = says(delta("half"), done=b"")
    auth = {"Authorization": f"Bearer {served.token}"}
    body = {"messages": MESSAGES, "stream": True}
    async with served.http.post(served.base_url + CHAT, json=body, headers=auth) as reply:
        text = await reply.text()
        step = reply.headers["x-clawloop-step"]
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert "cut off" in last["error"]["message"]
    assert served.kept(step).text == "half"


async def test_a_client_that_leaves_takes_its_upstream_call_along(before: Before) -> None:
    server = PlainServer()
    served = await before(server)

    async def never(request: Any) -> Any:
        await asyncio.Event().wait()

    server.answer = never
    call = asyncio.create_task(ask(served, stream=True))
    async with asyncio.timeout(10):
        while not server.requests:  # noqa: ASYNC110 - the server counts what came
            await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait_for(server.cancelled.wait(), 5)


async def test_steps_of_an_exact_server_are_trainable_and_spliced(
    before: Before, engine: MlxEngine, tiny_model: Path
) -> None:
    server = FakeVllm(engine)
    served = await before(server, model=tiny_model, logprobs="processed")
    body = {"messages": [{"role": "system", "content": "s"}, *MESSAGES], "tools": [TOOL], "temperature": 0.7}
    status, headers, reply = await served.post(CHAT, {**body, "max_tokens": 20})
    assert (status, headers["x-clawloop-policy"]) == (200, f"{engine.line.line_id}@0")
    step = served.kept(headers["x-clawloop-step"]).step
    scored = await engine.score(step.prompt_ids, step.response_ids, version=0, temperature=0.7)
    assert step.response_logprobs == pytest.approx(scored, abs=1e-3)
    assert headers["x-clawloop-trainable"] == "yes"
    assert step.untrainable == ""
    assert check_step(step) == step

    turn = [*body["messages"], reply["choices"][0]["message"], {"role": "user", "content": "more"}]  # type: ignore[misc]
    _, headers, _ = await served.post(CHAT, {**body, "messages": turn, "max_tokens": 5})
    prompt = served.kept(headers["x-clawloop-step"]).step.prompt_ids
    assert prompt[: len(step.prompt_ids)] == step.prompt_ids
    assert server.requests[-1]["prompt"] == prompt


async def test_a_step_with_a_logprob_missing_is_kept_and_not_trainable(
    before: Before, engine: MlxEngine, tiny_model: Path
) -> None:
    server = FakeVllm(engine)
    served = await before(server, model=tiny_model, logprobs="processed")
    server.bend = _without_logprobs
    _, headers, body = await served.post(CHAT, {"messages": MESSAGES, "max_tokens": 5, "logprobs": True})
    step = served.kept(headers["x-clawloop-step"]).step
    assert step.untrainable == "no logprob for every token"
    assert len(step.response_ids) == len(step.response_logprobs)
    assert [entry["logprob"] for entry in body["choices"][0]["logprobs"]["content"]] == [None] * len(step.response_ids)


def _without_logprobs(reply: dict[str, Any]) -> dict[str, Any]:
    reply["choices"][0]["logprobs"] = None
    return reply


async def test_raw_logprobs_are_said_to_be_no_lesson(before: Before, engine: MlxEngine, tiny_model: Path) -> None:
    served = await before(FakeVllm(engine), model=tiny_model)
    _, headers, _ = await ask(served, temperature=0.5)
    assert headers["x-clawloop-trainable"] == "no (logprobs are not those of the sampled temperature)"


async def test_a_forced_form_is_refused_by_an_exact_server_and_left_to_one_of_texts(
    before: Before, engine: MlxEngine, tiny_model: Path
) -> None:
    forced = {"response_format": {"type": "json_object"}}
    status, _, body = await ask(await before(FakeVllm(engine), model=tiny_model), **forced)
    assert status == 400
    assert "response_format" in body["error"]["message"]
    plain = PlainServer()
    plain.answer = whole({"content": "{}"})
    assert (await ask(await before(plain), **forced))[0] == 200
    assert plain.requests[0]["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -1, "completion_tokens": -1},
        {"prompt_tokens": 10**400},
        {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 9}},
    ],
)
async def test_counts_that_cannot_be_fail_no_call(before: Before, usage: dict[str, Any]) -> None:
    server = PlainServer()
    served = await before(server)
    choice = {"index": 0, "message": {"content": "fine"}, "finish_reason": "stop"}
    server.answer = replies({"choices": [choice], "usage": usage})
    status, _, body = await served.post("/v1/messages", {"messages": MESSAGES, "max_tokens": 5})
    assert status == 200, body
    assert all(count >= 0 for count in body["usage"].values())


async def test_a_character_that_a_server_cuts_in_two_fails_no_call(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    server.answer = says(delta("a \ud83d"), delta("\ude00 b"), end("stop"))
    status, headers, body = await ask(served)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "a \ufffd\ufffd b")
    assert served.kept(headers["x-clawloop-step"]).text == "a \ufffd\ufffd b"


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**70])
async def test_an_id_outside_the_vocabulary_ends_the_answer(
    before: Before, engine: MlxEngine, tiny_model: Path, token_id: int
) -> None:
    server = FakeVllm(engine)
    served = await before(server, model=tiny_model, logprobs="processed")

    def bent(reply: dict[str, Any]) -> dict[str, Any]:
        for choice in reply["choices"]:
            choice["token_ids"] = [token_id] * len(choice["token_ids"])
        return reply

    server.bend = bent
    status, _, body = await ask(served)
    assert (status, body["error"]["code"]) == (500, "engine_error")
    served.pool.submit(lambda database: None).result(10)
    assert served.pool.step_ids() == []


async def test_a_server_that_never_stops_is_ended(before: Before) -> None:
    server = PlainServer()
    served = await before(server)
    server.answer = says(*[delta("word " * 1000)] * 100, end("stop"))
    auth = {"Authorization": f"Bearer {served.token}"}
    body = {"messages": MESSAGES, "max_tokens": 20, "stream": True}
    async with served.http.post(served.base_url + CHAT, json=body, headers=auth) as reply:
        text = await reply.text()
    assert "more than it was asked for" in text
    assert text.count("word ") < 20_000

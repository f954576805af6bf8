"""Any OpenAI-compatible server: what is asked of it, how its words are read, and what becomes of its failures."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from clawloop_edge.engine.protocol import TextEngine, TextPart, TextRequest
from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.engine.tool_calls import ToolCall
from clawloop_edge.engine.upstream_http import MAX_LINE_BYTES, base_url
from clawloop_edge.engine.upstream_open import open_upstream, served_model
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.errors import EngineBusy, EngineError, EngineGone, RequestError
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Policy, Sampling

from .fake_vllm import DONE, PlainServer, chunk, delta, end, replies, running, says, whole

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SECRET = "sk-very-secret-9"


@pytest.fixture
async def plain() -> AsyncIterator[tuple[PlainServer, TextEngine]]:
    """A plain server that is running, and the engine on it."""
    server = PlainServer()
    async with running(server.app()) as url:
        engine = await opened(UpstreamSettings(url=url, read_timeout_s=5))
        yield server, engine
        await engine.close()


Plain = tuple[PlainServer, TextEngine]


async def opened(settings: UpstreamSettings, **more: Any) -> TextEngine:
    engine = await open_upstream(settings, **more)
    assert isinstance(engine, TextEngine)
    return engine


def ask(**more: Any) -> TextRequest:
    return TextRequest(**{"messages": MESSAGES, "sampling": Sampling(), "max_tokens": 50, **more})


async def heard(engine: TextEngine, request: TextRequest | None = None) -> list[TextPart]:
    generation = await engine.generate_text(request or ask())
    try:
        return [part async for part in generation]
    finally:
        await generation.aclose()


def pieces(parts: list[TextPart]) -> list[Any]:
    return [piece for part in parts for piece in part.pieces]


async def test_text_and_thoughts_arrive_in_order_with_reason_and_usage(plain: Plain) -> None:
    server, engine = plain
    thought = chunk(delta={"reasoning_content": "hm"}), chunk(delta={"reasoning": " so"})
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    server.answer = says(chunk(delta={"role": "assistant", "content": ""}), *thought, delta("a"), end("length"), last)
    generation = await engine.generate_text(ask())
    assert await generation.ready(5)
    parts = [part async for part in generation]
    assert pieces(parts) == [Reasoning("hm"), Reasoning(" so"), "a"]
    assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert generation.usage == (9, 4, 2)
    assert generation.policy == engine.policy == Policy("upstream:plain")
    assert engine.health().in_flight == 0


async def test_a_call_asks_for_what_was_wanted_and_for_nothing_else(plain: Plain) -> None:
    server, engine = plain
    await heard(engine)
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests[0] == {
        "model": "plain",
        "messages": MESSAGES,
        "temperature": 1.0,
        "max_tokens": 50,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    wanted = ask(
        sampling=Sampling(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=7),
        tools=[TOOL],
        tool_choice="look",
        tool_named=True,
        parallel_tools=False,
        schema={"type": "object"},
        schema_name="thing",
        schema_strict=False,
        stops=("X",),
        logprobs=True,
        top_logprobs=3,
        thinking=False,
    )
    await heard(engine, wanted)
    sent = server.requests[1]
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["X"],
    }
    assert (sent["tools"], sent["parallel_tool_calls"]) == ([TOOL], False)
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    form = {"name": "thing", "schema": {"type": "object"}, "strict": False}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": form}
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 3)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


async def test_a_client_that_does_not_stream_is_answered_from_a_whole_reply(plain: Plain) -> None:
    server, engine = plain
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    server.answer = whole({"content": "seen", "reasoning": "why", "tool_calls": [call]}, "tool_calls")
    generation = await engine.generate_text(ask(stream=False))
    parts = [part async for part in generation]
    assert "stream" not in server.requests[0]
    thought, text, found = pieces(parts)
    assert (thought, text, found.name, found.arguments) == (Reasoning("why"), "seen", "look", '{"a": 1}')
    assert (parts[-1].finish_reason, generation.usage) == ("stop", (7, 3, 5))


async def test_deltas_of_tool_calls_become_whole_calls_with_ids_of_ours(plain: Plain) -> None:
    server, engine = plain

    def part(index: int | None, **function: Any) -> bytes:
        call_id = function.pop("call_id", None)
        return chunk(delta={"tool_calls": [{"index": index, "id": call_id, "function": function}]})

    server.answer = says(
        delta("I look."),
        part(0, call_id="chatcmpl-tool-1", name="look", arguments=""),
        part(0, arguments='{"city": "Ō'),
        part(1, call_id="chatcmpl-tool-2", name="read", arguments="{}"),
        part(0, arguments='saka"}'),
        part(1, call_id="chatcmpl-tool-3", name="again", arguments={"b": 2}),
        part(2, call_id="t4", name="nothing"),
        end("tool_calls"),
    )
    parts = await heard(engine, ask(tools=[TOOL]))
    text, *calls = pieces(parts)
    assert text == "I look."
    assert [(call.name, call.arguments) for call in calls] == [
        ("look", '{"city": "Ōsaka"}'),
        ("read", "{}"),
        ("again", '{"b":2}'),
        ("nothing", "{}"),
    ]
    ids = {call.call_id for call in calls}
    assert len(ids) == 4
    assert all(call_id.isalnum() for call_id in ids)
    assert parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "look at it", '{"a": NaN}'])
async def test_a_malformed_tool_call_is_delivered_as_text(plain: Plain, arguments: str) -> None:
    server, engine = plain
    call = {"index": 0, "id": "x", "function": {"name": "look", "arguments": arguments}}
    server.answer = says(chunk(delta={"tool_calls": [call]}), end("tool_calls"))
    (text,) = pieces(await heard(engine, ask(tools=[TOOL])))
    assert not isinstance(text, ToolCall)
    assert json.loads(text) == {"name": "look", "arguments": arguments}


async def test_logprobs_stay_beside_their_text(plain: Plain) -> None:
    server, engine = plain
    entries: list[dict[str, Any]] = [
        {"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in "ab"
    ]
    server.answer = says(*(delta(entry["token"], logprobs={"content": [entry]}) for entry in entries), end("stop"))
    parts = await heard(engine, ask(logprobs=True))
    assert [(part.pieces, part.entries) for part in parts[:2]] == [(["a"], [entries[0]]), (["b"], [entries[1]])]


async def test_a_raw_prompt_goes_to_completions_and_its_logprobs_get_the_shape_of_a_chat(plain: Plain) -> None:
    server, engine = plain
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.25], "top_logprobs": [{"a": -0.25, "b": None}]}
    server.answer = says(
        b'data: {"choices": [{"index": 0, "text": "a", "logprobs": %s}]}\n\n' % json.dumps(logprobs).encode(),
        b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}\n\n',
    )
    parts = await heard(engine, ask(messages=[], raw=[5, 6], logprobs=True, top_logprobs=2))
    assert server.paths == ["/v1/completions"]
    assert (server.requests[0]["prompt"], server.requests[0]["logprobs"]) == ([5, 6], 2)
    assert "messages" not in server.requests[0]
    assert pieces(parts) == ["a"]
    top = [{"token": "a", "logprob": -0.25, "bytes": [97]}, {"token": "b", "logprob": None, "bytes": [98]}]
    assert parts[0].entries == [{"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": top}]


async def test_events_may_be_cut_anywhere_and_mixed_with_comments(plain: Plain) -> None:
    server, engine = plain
    data = (
        delta("gr").replace(b"\n\n", b"\r\n\r\n")
        + b": keep-alive\n\nevent: x\ndata:"
        + delta("ün 😀")[6:]
        + end("stop")
    )
    data = data.replace(b"\\u00fc", "ü".encode())
    server.answer = says(*(data[i : i + 7] for i in range(0, len(data), 7)))
    assert "".join(pieces(await heard(engine))) == "grün 😀"


async def test_chunks_that_arrive_together_are_one_part(plain: Plain) -> None:
    server, engine = plain
    server.answer = says(b"".join(delta(str(i)) for i in range(64)) + end("stop") + DONE, done=b"")
    first, last = await heard(engine)
    assert first.pieces == [str(i) for i in range(64)]
    assert last.finish_reason == "stop"


async def test_one_connection_serves_call_after_call(plain: Plain) -> None:
    server, engine = plain

    async def ending_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(delta("a") + end("stop") + DONE)
        await asyncio.sleep(0.02)
        return response

    for stream in (True, True, False):
        server.answer = ending_late if stream else whole({"content": "a"})
        assert pieces(await heard(engine, ask(stream=stream))) == ["a"]
    assert len(server.peers) == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_a_connection_that_closes_before_the_answer_is_tried_once_more(plain: Plain, times: int) -> None:
    server, engine = plain

    async def closing(request: web.Request) -> web.StreamResponse:
        if len(server.requests) > times:
            return await whole({"content": "here"})(request)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    server.answer = closing
    if times == 1:
        assert pieces(await heard(engine)) == ["here"]
    else:
        with pytest.raises(EngineGone):
            await heard(engine)
    assert len(server.requests) == 2


BROKEN = {
    "cut without a reason": says(delta("half"), done=b""),
    "no JSON": says(delta("a"), b"data: {half\n\n", end("stop")),
    "another shape": says(b'data: {"choices": 3}\n\n', end("stop")),
    "nested without end": says(b"data: " + b"[" * 100_000 + b"\n\n"),
    "an error": says(delta("a"), b'data: {"error": {"message": "boom %s", "code": 500}}\n\n' % SECRET.encode()),
    "a reply without choices": replies({"object": "chat.completion", "choices": []}),
    "a page": replies("<html>"),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_half_broken_stream_is_an_error_and_never_an_answer(plain: Plain, how: str) -> None:
    server, engine = plain
    server.answer = BROKEN[how]
    with pytest.raises(EngineError) as caught:
        await heard(engine)
    assert type(caught.value) is EngineError
    assert "half" not in str(caught.value)
    server.answer = says(delta("fine"), end("stop"))
    assert pieces(await heard(engine)) == ["fine"]
    assert engine.health().in_flight == 0


async def test_an_endless_line_is_refused(plain: Plain) -> None:
    server, engine = plain
    server.answer = says(b"data: " + b"x" * (MAX_LINE_BYTES + 100_000))
    with pytest.raises(EngineError, match="a line of more than"):
        await heard(engine)


async def test_a_stream_that_was_said_to_be_done_needs_no_reason(plain: Plain) -> None:
    server, engine = plain
    server.answer = says(delta("done"))
    assert (await heard(engine))[-1].finish_reason == "stop"


@pytest.mark.parametrize("begun", [False, True])
async def test_a_server_that_falls_silent_is_given_up(begun: bool) -> None:
    server = PlainServer()

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if begun:
            await response.prepare(request)
            await response.write(delta("a"))
        await asyncio.Event().wait()
        return response

    server.answer = silent
    async with running(server.app()) as url:
        engine = await opened(UpstreamSettings(url=url, read_timeout_s=0.2))
        with pytest.raises(EngineError, match=r"said nothing for 0\.2 s"):
            await heard(engine)
        await asyncio.wait_for(server.cancelled.wait(), 5)
        assert engine.health().alive, "it is there, and slow"
        await engine.close()


@pytest.mark.parametrize("begun", [False, True])
async def test_who_leaves_frees_the_server_at_once(plain: Plain, begun: bool) -> None:
    server, engine = plain

    async def waiting(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if begun:
            await response.prepare(request)
            await response.write(delta("a"))
        await asyncio.Event().wait()
        return response

    server.answer = waiting
    generation = await engine.generate_text(ask())
    assert await generation.ready(0.1 if not begun else 5) is begun
    assert engine.health().in_flight == 1
    await generation.aclose()
    await asyncio.wait_for(server.cancelled.wait(), 5)
    assert engine.health().in_flight == 0


REFUSED = [
    (400, {"error": {"message": "too long: 9 > 8", "param": "messages", "code": "x"}}, "too long: 9 > 8"),
    (404, {"object": "error", "message": "no such model", "code": 404}, "no such model"),
    (422, {"detail": "wrong"}, "wrong"),
    (413, [], "refuses the request"),
    (400, {"error": f"key {SECRET} " + "y" * 9000}, "key [key] yyy"),
]


@pytest.mark.parametrize(("status", "body", "words"), REFUSED)
async def test_what_the_server_refuses_is_told_with_its_words(
    tmp_path: Path, status: int, body: Any, words: str
) -> None:
    server = PlainServer()
    server.answer = replies(body, status=status, headers={"X-Secret": SECRET})
    (tmp_path / "key").write_text(f"{SECRET}\n")
    async with running(server.app()) as url:
        engine = await opened(UpstreamSettings(url=f"{url}/v1/", key_file=str(tmp_path / "key")))
        with pytest.raises(RequestError) as caught:
            await heard(engine)
        await engine.close()
    assert caught.value.status == status
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, EngineError, "check .upstream. key_file"),
        (403, EngineError, "refuses this edge's key"),
        (429, EngineBusy, "busy"),
        (503, EngineBusy, "busy"),
        (500, EngineError, "failed .500.: because"),
        (302, EngineError, "redirects"),
    ],
)
async def test_what_is_not_the_callers_fault_is_an_engines_error(
    plain: Plain, status: int, kind: type[EngineError], words: str
) -> None:
    server, engine = plain
    headers = {"Location": "http://127.0.0.1:1/elsewhere"} if status == 302 else None
    server.answer = replies({"error": {"message": "because"}}, status=status, headers=headers)
    with pytest.raises(EngineError, match=words) as caught:
        await heard(engine)
    assert type(caught.value) is kind


async def test_a_server_that_is_away_is_said_to_be_and_served_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clawloop_edge.engine.upstream_http._RETRY_S", 0.05)
    server = PlainServer()
    async with running(server.app()) as url:
        pass
    engine = await opened(UpstreamSettings(url=url, model="plain"))
    with pytest.raises(EngineGone, match=r"cannot reach the upstream server at http://127.*set \[upstream\] url"):
        await heard(engine)
    assert not engine.health().alive
    assert "cannot reach" in engine.health().detail
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(url.rsplit(":", 1)[1])).start()
    async with asyncio.timeout(10):
        while not engine.health().alive:  # noqa: ASYNC110 - only `health` says it
            await asyncio.sleep(0.02)
    assert pieces(await heard(engine)) == ["Hello", " world"]
    await engine.close()
    await runner.cleanup()


async def test_calls_in_flight_end_when_the_engine_is_closed(plain: Plain) -> None:
    server, engine = plain
    begun = asyncio.Event()

    async def waiting(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.Event().wait()
        return web.Response()

    server.answer = waiting
    call = asyncio.create_task(heard(engine))
    await begun.wait()
    await engine.close()
    with pytest.raises(EngineGone):
        await call
    with pytest.raises(EngineGone):
        await heard(engine)


async def test_prompts_are_counted_where_the_server_can(plain: Plain) -> None:
    server, engine = plain
    server.answer = replies({"count": 12, "max_model_len": 99, "tokens": []})
    assert await engine.count(ask(tools=[TOOL])) == 12
    assert server.paths == ["/tokenize"]
    assert server.requests[0] == {"model": "plain", "messages": MESSAGES, "tools": [TOOL]}
    assert await engine.count(ask(raw=[1, 2, 3])) == 3
    server.answer = replies({"detail": "Not Found"}, status=404)
    with pytest.raises(RequestError, match="cannot count"):
        await engine.count(ask())


async def test_the_model_is_the_servers_first_unless_one_is_named() -> None:
    async with running(PlainServer().app()) as url:
        assert await served_model(UpstreamSettings(url=url)) == "plain"
        assert await served_model(UpstreamSettings(url=url, model="other")) == "other"
    with pytest.raises(EngineGone):
        await open_upstream(UpstreamSettings(url=url))
    with pytest.raises(ConfigError, match="printable ASCII"):
        await open_upstream(UpstreamSettings(url=url, model="a\r\nX-Evil: 1"))


@pytest.mark.parametrize(
    "url", ["", "8000", "ftp://x/v1", "http://", "http://x/v1?key=1", "http://[", "http://x:99999"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="upstream"):
        base_url(url)


def test_an_address_is_completed_and_holds_no_password() -> None:
    assert str(base_url("http://127.0.0.1:8000/")) == "http://127.0.0.1:8000/v1"
    assert str(base_url(" https://x.example/api/v1/ ")) == "https://x.example/api/v1"
    with pytest.raises(ConfigError, match="password") as caught:
        base_url("http://me:hunter2@x/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\xfe", b"a\nb"])
async def test_a_key_file_without_a_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_bytes(content)
    with pytest.raises(ConfigError, match="key_file"):
        await open_upstream(UpstreamSettings(url="http://127.0.0.1:9", model="m", key_file=str(key)))

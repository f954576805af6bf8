"""Anthropic's messages through the real `anthropic` SDK and a real server."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.errors import EngineBusy
from clawloop_edge.gateway.app import STATS

from .conftest import Serve, Served

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER: list[Any] = [{"role": "user", "content": "What is the LICENSE?"}]
TOOL: Any = {
    "name": "look",
    "description": "Look a word up.",
    "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
THOUGHT = "<think>\nThe user asks.\n</think>\n\n"


def call(arguments: str = '{"word": "rain"}') -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'


def client(served: Served, **settings: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=served.base_url, **{"api_key": served.token, "max_retries": 0, **settings})


def ask(messages: list[Any], **fields: Any) -> dict[str, Any]:
    return {"model": "claude-any", "max_tokens": 100, "messages": messages, **fields}


async def say(
    served: Served, messages: list[Any], *, stream: bool = False, max_tokens: int = 100, **fields: Any
) -> anthropic.types.Message:
    """One call through the SDK, whole or as the SDK puts a stream together."""
    named: Any = {"model": "claude-any", "messages": messages, "max_tokens": max_tokens, **fields}
    async with client(served) as sdk:
        if not stream:
            whole: anthropic.types.Message = await sdk.messages.create(**named)
            return whole
        async with sdk.messages.stream(**named) as events:
            return await events.get_final_message()


def told(message: anthropic.types.Message) -> dict[str, Any]:
    """A reply as a client sends it back."""
    return {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]}


def results(message: anthropic.types.Message, *contents: Any) -> dict[str, Any]:
    ids = [block.id for block in message.content if block.type == "tool_use"]
    blocks = [
        {"type": "tool_result", "tool_use_id": call_id, "content": content}
        for call_id, content in zip(ids, contents, strict=True)
    ]
    return {"role": "user", "content": blocks}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each must be named like its data's type."""
    found = []
    for event in filter(None, text.split("\n\n")):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def stream_of(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    headers = {"x-api-key": served.token}
    async with served.http.post(served.base_url + MESSAGES, json={**body, "stream": True}, headers=headers) as reply:
        assert reply.content_type == "text/event-stream"
        return events_of(await reply.text())


@pytest.fixture
def thinker(random_model: Path, tmp_path: Path) -> Path:
    """The random model with a template that shows the thoughts of earlier turns."""
    folder = Path(shutil.copytree(random_model, tmp_path / "thinker"))
    template = folder / "chat_template.jinja"
    plain = "{{- '<|im_start|>assistant\\n' + text(message.content) -}}"
    thoughts = (
        "{{- '<|im_start|>assistant\\n' -}}{%- if message.reasoning_content -%}"
        "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}"
        "{{- text(message.content) -}}"
    )
    assert plain in template.read_text()
    template.write_text(template.read_text().replace(plain, thoughts))
    return folder


async def test_a_plain_call_comes_back_in_anthropics_shape(scripted: Serve) -> None:
    served = await scripted(["It is Apache."])
    async with client(served) as sdk:
        raw = await sdk.messages.with_raw_response.create(**ask(USER, system="Be brief."))
    reply = await raw.parse()
    assert [block.model_dump(exclude_none=True) for block in reply.content] == [
        {"type": "text", "text": "It is Apache."}
    ]
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "clawloop@0")
    assert raw.headers["x-clawloop-step"] == reply.id
    kept = served.kept(reply.id)
    assert kept.messages == [{"role": "system", "content": "Be brief."}, *USER]
    assert kept.reply == {"role": "assistant", "content": "It is Apache."}
    assert reply.usage.input_tokens == len(kept.step.prompt_ids)
    assert reply.usage.output_tokens == len(kept.step.response_ids)


async def test_the_synchronous_client_works_too(scripted: Serve) -> None:
    served = await scripted(["Yes.", "No."])

    def both() -> list[str]:
        with Anthropic(base_url=served.base_url, api_key=served.token) as sdk:
            whole: Any = sdk.messages.create(**ask(USER)).content[0]
            with sdk.messages.stream(**ask(USER)) as stream:
                return [whole.text, "".join(stream.text_stream)]

    assert await asyncio.to_thread(both) == ["Yes.", "No."]


async def test_a_stream_has_all_its_events_in_order(scripted: Serve, thinker: Path, serve: Serve) -> None:
    served = await serve(ScriptedEngine(thinker, [f"{THOUGHT}Let me see.\n{call()}"]))
    events = await stream_of(served, ask(USER, tools=[TOOL]))
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    call_id = starts[-1].pop("id")
    assert call_id.isalnum()
    assert starts == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "name": "look", "input": {}},
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == len(served.kept(events[0]["message"]["id"]).step.prompt_ids)
    deltas: dict[int, list[str]] = {}
    for event in events[1:-2]:
        kinds = deltas.setdefault(event["index"], [])
        kinds.append(event.get("delta", event)["type"])
    assert [list(dict.fromkeys(kinds)) for kinds in deltas.values()] == [
        ["content_block_start", "thinking_delta", "signature_delta", "content_block_stop"],
        ["content_block_start", "text_delta", "content_block_stop"],
        ["content_block_start", "input_json_delta", "content_block_stop"],
    ]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-1] == {"type": "message_stop"}


async def test_text_streams_token_by_token(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h"], delay_s=0.02)
    times = []
    async with client(served) as sdk, sdk.messages.stream(**ask(USER)) as stream:
        async for text in stream.text_stream:
            times.append(asyncio.get_running_loop().time())
            assert text
    assert times[-1] - times[0] > 0.06


async def test_a_silent_stream_is_pinged_and_the_sdk_passes_over_it(scripted: Serve) -> None:
    served = await scripted(["One.", "Two."], delay_s=0.1, headers_after_s=0, keep_alive_s=0.02)
    events = await stream_of(served, ask(USER))
    assert {"type": "ping"} in events
    assert (await say(served, USER, stream=True)).content[0].model_dump()["text"] == "Two."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arguments", ['{"word": "rain"}', '{"n":1.0,  "word":"r\\u00e9n"}', "{}"])
async def test_a_loop_of_several_tools_continues_on_the_very_tokens(
    scripted: Serve, stream: bool, arguments: str
) -> None:
    script = [f"Let me see.\n{call(arguments)}", f"{call(arguments)}\n{call()}", "It rains."]
    served = await scripted(script)
    messages, replies = list(USER), []
    for contents in (["wet"], ["dry", [{"type": "text", "text": "wet"}]], None):
        reply = await say(served, messages, stream=stream, tools=[TOOL], system="Be brief.")
        replies.append(reply)
        if contents:
            assert reply.stop_reason == "tool_use"
            back = json.loads(json.dumps(told(reply)).replace("1.0", "1"))  # as JavaScript's JSON.stringify would
            messages += [back, results(reply, *contents)]
    assert [block.type for block in replies[0].content] == ["text", "tool_use"]
    calls = [block for block in replies[1].content if block.type == "tool_use"]
    assert [block.input for block in calls] == [json.loads(arguments), {"word": "rain"}]
    assert len({block.id for block in calls}) == 2
    steps = [served.kept(reply.id).step for reply in replies]
    assert [step.parent_id for step in steps] == ["", steps[0].step_id, steps[1].step_id]
    assert len({(step.session_id, step.run_id) for step in steps}) == 1
    assert steps[2].prompt_ids[: len(steps[1].token_ids)] == steps[1].token_ids
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 2}


async def test_results_of_parallel_tools_come_in_order_and_the_text_after_them(scripted: Serve) -> None:
    served = await scripted([f"{call()}\n{call()}", "Done."])
    first = await say(served, USER, tools=[TOOL])
    answer = results(first, "wet", [])
    answer["content"][1]["is_error"] = True
    answer["content"] += [{"type": "text", "text": "and?"}, {"type": "text", "text": "well?"}]
    second = await say(served, [*USER, told(first), answer], tools=[TOOL])
    ids = [block.id for block in first.content if block.type == "tool_use"]
    assert served.kept(second.id).messages[2:] == [
        {"role": "tool", "tool_call_id": ids[0], "content": "wet"},
        {"role": "tool", "tool_call_id": ids[1], "content": "error"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}, {"type": "text", "text": "well?"}]},
    ]
    assert served.kept(second.id).step.parent_id == first.id


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_blocks_of_their_own_and_come_back_signed(serve: Serve, thinker: Path, stream: bool) -> None:
    served = await serve(ScriptedEngine(thinker, [THOUGHT + call(), f"{THOUGHT}Wet.", "Bye."]))
    fields: Any = {"stream": stream, "tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    first = await say(served, USER, **fields)
    assert first.content[0].type == "thinking"
    assert (first.content[0].thinking, bool(first.content[0].signature)) == ("The user asks.", True)
    messages = [*USER, told(first), results(first, "wet")]
    second = await say(served, messages, **fields)
    assert [block.type for block in second.content] == ["thinking", "text"]
    messages += [told(second), {"role": "user", "content": "Thanks."}]
    third = await say(served, messages, **fields)
    steps = [served.kept(reply.id).step for reply in (first, second, third)]
    assert [step.parent_id for step in steps] == ["", first.id, second.id]
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 2}


async def test_a_client_that_drops_the_thoughts_stays_in_its_session(serve: Serve, thinker: Path) -> None:
    served = await serve(ScriptedEngine(thinker, [f"{THOUGHT}Wet.", "Bye."]))
    first = await say(served, USER, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.model_dump(exclude={"signature"}, exclude_none=True) for block in first.content] == [
        {"type": "thinking", "thinking": ""},
        {"type": "text", "text": "Wet."},
    ]
    back = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, told(first)["content"][1]]}
    second = await say(served, [*USER, back, {"role": "user", "content": "Thanks."}])
    assert served.kept(second.id).step.parent_id == first.id


async def test_thoughts_that_are_not_to_be_shown_are_not_streamed(serve: Serve, thinker: Path) -> None:
    served = await serve(ScriptedEngine(thinker, [f"{THOUGHT}Wet."]))
    message = await say(served, USER, stream=True, thinking={"type": "adaptive", "display": "omitted"})
    assert [(block.type, getattr(block, "thinking", None)) for block in message.content] == [
        ("thinking", ""),
        ("text", None),
    ]


async def test_a_second_turn_of_the_real_engine_reads_the_cache(real: Served) -> None:
    first = await say(real, USER, max_tokens=20)
    more = [*USER, told(first), {"role": "user", "content": "And?"}]
    async with client(real) as sdk:
        counted = await sdk.messages.count_tokens(model="x", messages=more)
    second = await say(real, more, stream=True, max_tokens=4)
    one, two = real.kept(first.id).step, real.kept(second.id).step
    assert two.prompt_ids[: len(one.token_ids)] == one.token_ids
    usage = second.usage
    assert usage.cache_read_input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == len(two.prompt_ids) == counted.input_tokens
    assert usage.output_tokens == len(two.response_ids)
    assert two.trainable


async def test_counted_tokens_are_those_of_the_call(scripted: Serve) -> None:
    served = await scripted([call(), "Wet.", "x"])
    fields: Any = {"system": [{"type": "text", "text": "Be brief."}], "tools": [TOOL]}
    first = await say(served, USER, **fields)
    for messages in (USER, [*USER, told(first), results(first, "wet")]):
        async with client(served) as sdk:
            counted = await sdk.messages.count_tokens(
                model="claude-other", messages=messages, tool_choice={"type": "auto"}, **fields
            )
        assert counted.input_tokens == (await say(served, messages, **fields)).usage.input_tokens
    assert served.app[STATS]().kept <= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_why_a_message_ended(scripted: Serve, stream: bool) -> None:
    served = await scripted(["The LICENSE ends here", "one two three four", "The end."])
    met = await say(served, USER, stream=stream, stop_sequences=["never", "ends h"])
    assert (met.stop_reason, met.stop_sequence) == ("stop_sequence", "ends h")
    assert met.content[0].model_dump()["text"] == "The LICENSE "
    cut = await say(served, USER, stream=stream, max_tokens=2)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    done = await say(served, USER, stream=stream, stop_sequences=["never"])
    assert (done.stop_reason, done.stop_sequence) == ("end_turn", None)


async def test_an_empty_answer_has_no_blocks(scripted: Serve) -> None:
    served = await scripted(["", "", "More."])
    replies = [await say(served, USER, stream=stream) for stream in (False, True)]
    assert [(reply.content, reply.stop_reason) for reply in replies] == [([], "end_turn")] * 2
    again = await say(served, [*USER, told(replies[1]), *USER])
    assert served.kept(again.id).step.parent_id == replies[1].id


async def test_errors_are_the_sdks_own(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "x", max_body_bytes=5000)
    async with client(served) as sdk:
        with pytest.raises(anthropic.BadRequestError, match="image") as bad:
            await sdk.messages.create(**ask([{"role": "user", "content": [{"type": "image", "source": {}}]}]))
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await sdk.messages.create(**{**ask(USER), "model": "clawloop@9"})
        with pytest.raises(anthropic.RequestTooLargeError) as large:
            await sdk.messages.create(**ask([{"role": "user", "content": "x" * 6000}]))
        with pytest.raises(anthropic.PermissionDeniedError) as foreign:
            await sdk.messages.create(**ask(USER), extra_headers={"Host": "evil.example"})
    async with client(served, api_key="wrong") as sdk:
        with pytest.raises(anthropic.AuthenticationError) as denied:
            await sdk.messages.count_tokens(model="x", messages=USER)
    assert [failed.value.type for failed in (bad, unknown, large, foreign, denied)] == [
        "invalid_request_error",
        "not_found_error",
        "request_too_large",
        "permission_error",
        "authentication_error",
    ]


async def test_unknown_paths_and_methods_have_anthropics_shape(scripted: Serve) -> None:
    served = await scripted([])
    auth = {"x-api-key": served.token}
    for method, path, status, kind in (
        ("GET", MESSAGES, 405, "invalid_request_error"),
        ("PUT", COUNT, 405, "invalid_request_error"),
        ("POST", f"{MESSAGES}/batches", 404, "not_found_error"),
    ):
        async with served.http.request(method, served.base_url + path, headers=auth) as reply:
            body = await reply.json()
        assert (reply.status, body["type"], body["error"]["type"]) == (status, "error", kind)


def refusing(times: int) -> Callable[[str], str]:
    left = [EngineBusy("the queue is full; send it again later")] * times

    def script(prompt: str) -> str:
        if left:
            raise left.pop()
        return "At last."

    return script


async def test_a_busy_engine_is_overloaded_and_the_sdk_tries_again(scripted: Serve) -> None:
    served = await scripted(refusing(2), retry_after_s=0)
    async with client(served) as sdk:
        with pytest.raises(anthropic.InternalServerError) as busy:
            await sdk.messages.create(**ask(USER))
    assert (busy.value.status_code, busy.value.type) == (503, "overloaded_error")
    assert busy.value.response.headers["Retry-After"] == "0"
    async with client(served, max_retries=1) as sdk:
        reply = await sdk.messages.create(**ask(USER))
    assert reply.content[0].model_dump()["text"] == "At last."


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error_event(scripted: Serve) -> None:
    served = await scripted(["word " * 200], delay_s=0.01)
    async with client(served) as sdk, sdk.messages.stream(**ask(USER, max_tokens=300)) as stream:
        await anext(stream.text_stream)
        await served.engine.close()
        with pytest.raises(anthropic.APIStatusError, match="closed") as gone:
            await stream.until_done()
    assert gone.value.type == "overloaded_error"


STABLE = "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant.\n<!-- /openclaw:attempt:STABLE -->"
SESSION = "e1e1c412-ca07-4f78-bad8-3522583961fe"
DYNAMIC = (
    "<!-- openclaw:attempt:DYNAMIC -->\n## Temporal Context\n\n\nRuntime: agent=main | session=agent:main:a1 | "
    f"sessionId={SESSION} | host=vm | model=gwa/m | shell=bash\n<!-- /openclaw:attempt:DYNAMIC -->"
)
MARK = {"cache_control": {"type": "ephemeral"}}
RUNS = ["03f48b90d5b9b14b681ddfcd361ae78e", "456969c34831ed37437d30b30127857c"]


def internal(note: str) -> dict[str, Any]:
    text = f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n{note}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
    return {"role": "user", "content": [{"type": "text", "text": text}]}


async def turn(served: Served, *messages: Any, run: str, span: int) -> dict[str, Any]:
    """A call as OpenClaw makes it, and its reply as OpenClaw sends it back."""
    system = [{"type": "text", "text": STABLE, **MARK}, {"type": "text", "text": DYNAMIC}]
    thinking = {"type": "enabled", "budget_tokens": 2048}
    body = ask(list(messages), system=system, tools=[TOOL | MARK], thinking=thinking, stream=True)
    trace = f"00-{run}-{span:016x}-01"
    headers = {"x-api-key": served.token, "anthropic-version": "2023-06-01", "traceparent": trace}
    async with served.http.post(served.base_url + MESSAGES, json=body, headers=headers) as reply:
        assert reply.status == 200
        events = events_of(await reply.text())
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            _grow(blocks[event["index"]], event["delta"])
    return {"id": events[0]["message"]["id"], "message": {"role": "assistant", "content": blocks}}


def _grow(block: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("text", "thinking", "signature"):
        if name in delta:
            block[name] += delta[name]
    if "partial_json" in delta:
        block["input"] = json.loads(delta["partial_json"])


async def test_openclaws_calls_are_one_session_and_one_tree(serve: Serve, thinker: Path) -> None:
    served = await serve(ScriptedEngine(thinker, [THOUGHT + call('{"word":"a1"}'), f"{THOUGHT}Done.", "Two."]))
    text = "[Sun 2026-11-22 08:29 UTC] a one"
    marked = {"role": "user", "content": [{"type": "text", "text": text, **MARK}]}
    one = await turn(served, marked, internal("none"), run=RUNS[0], span=1)
    result = {"type": "tool_result", "tool_use_id": one["message"]["content"][-1]["id"], "content": "a1"}
    answered = {"role": "user", "content": [{**result, "is_error": False, **MARK}]}
    two = await turn(served, marked, one["message"], answered, internal("1 running"), run=RUNS[0], span=2)
    plain = [{"role": "user", "content": text}, one["message"], {"role": "user", "content": [result]}]
    more = {"role": "user", "content": [{"type": "text", "text": "[Sun 2026-11-22 08:30 UTC] a two", **MARK}]}
    three = await turn(served, *plain, two["message"], more, internal("none"), run=RUNS[1], span=3)
    kept = [served.kept(reply["id"]) for reply in (one, two, three)]
    assert [each.step.parent_id for each in kept] == ["", one["id"], two["id"]]
    assert [each.step.run_id for each in kept] == [RUNS[0], RUNS[0], RUNS[1]]
    assert {each.step.session_id for each in kept} == {SESSION}
    assert {(each.kind, each.app) for each in kept} == {("main", "openclaw")}
    assert served.app[STATS]().spliced == {"fresh": 1, "moved": 2}
    assert kept[0].messages[0]["content"] == f"{STABLE}\n{DYNAMIC}"


async def test_malformed_bodies_get_a_400_in_anthropics_shape(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "Fine.")
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
    corpus = [b"", b"{", b"null", b"[]", b'"x"', b"{}", deep, b'{"messages": NaN}', b"\xff"]
    corpus += [json.dumps({**ask(USER), name: 5}).encode() for name in ("messages", "system", "tools")]
    for data in corpus:
        for path in (MESSAGES, COUNT):
            status, _, body = await served.post(path, data=data)
            assert (status, body.get("type")) == (400, "error"), data[:80]
            assert (set(body), set(body["error"])) == ({"type", "error"}, {"type", "message"})
    long = ask([{"role": "user", "content": "a b " * 20_000}])
    status, _, body = await served.post(MESSAGES, long)
    assert (status, str(served.engine.tokenizer.context_length) in body["error"]["message"]) == (400, True)

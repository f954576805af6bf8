"""Responses through the real `openai` SDK and a real server."""

import asyncio
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import STATS
from clawloop_edge.gateway.call import Delta, Head
from clawloop_edge.gateway.responses_items import text_entries
from clawloop_edge.gateway.responses_writer import ResponsesWriter

from .conftest import Serve, Served

PATH = "/v1/responses"
ASKED = "What is the LICENSE?"
LOOK: Any = {
    "type": "function",
    "name": "look",
    "description": "Look a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    "strict": True,
}
THOUGHT = "<think>\nA word is asked for.\n</think>\n\n"


@cache
def any_event() -> TypeAdapter[Any]:
    return TypeAdapter(ResponseStreamEvent)


def call(word: str) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {{"word": "{word}"}}}}\n</tool_call>'


def result(item: Any, text: str = "wet") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": item["call_id"], "output": text}


def asked(text: str = ASKED) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
async def thinker(tiny_model: Path, tmp_path: Path, serve: Serve) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Like `scripted`, for a model whose chat template shows it its earlier thoughts."""
    folder = tmp_path / "thinker"
    shutil.copytree(tiny_model, folder)
    template, said = folder / "chat_template.jinja", "'<|im_start|>assistant\\n' + text(message.content)"
    shown = "('<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content else '')"
    before = template.read_text()
    template.write_text(before.replace(said, f"'<|im_start|>assistant\\n' + {shown} + text(message.content)"))
    assert template.read_text() != before
    engines: list[ScriptedEngine] = []

    async def start(script: list[str]) -> Served:
        engines.append(ScriptedEngine(folder, script))
        return await serve(engines[-1])

    yield start
    for engine in engines:
        await engine.close()


async def events_of(served: Served, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the SDK's strict type and numbered without a gap."""
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(served.base_url + PATH, json={**body, "stream": True}, headers=auth) as reply:
        assert reply.status == 200, await reply.text()
        assert reply.content_type == "text/event-stream"
        blocks = [block.split("\n") for block in (await reply.text()).split("\n\n") if block]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        any_event().validate_python(event)
    return events


async def answer(served: Served, *, stream: bool, **body: Any) -> dict[str, Any]:
    """The response object, however it was delivered."""
    if stream:
        whole: dict[str, Any] = (await events_of(served, **body))[-1]["response"]
        return whole
    status, _, reply = await served.post(PATH, body)
    assert status == 200, reply
    Response.model_validate(reply)
    return dict(reply)


async def test_a_plain_call_comes_back_as_a_response(scripted: Serve) -> None:
    served = await scripted(["It is Apache."])
    async with AsyncOpenAI(**served.sdk) as client:
        raw = await client.responses.with_raw_response.create(
            model="clawloop",
            input=ASKED,
            instructions="Be brief.",
            metadata={"a": "b"},
            max_output_tokens=50,
            store=True,
        )
    reply = raw.parse()
    assert (reply.output_text, reply.status, reply.object) == ("It is Apache.", "completed", "response")
    assert (reply.model, reply.instructions, reply.metadata) == ("clawloop@0", "Be brief.", {"a": "b"})
    assert (reply.max_output_tokens, reply.temperature, reply.top_p) == (50, 1.0, 1.0)
    assert (reply.tools, reply.tool_choice, reply.parallel_tool_calls) == ([], "auto", True)
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.output_tokens_details.reasoning_tokens == 0
    assert raw.headers["x-clawloop-step"] == reply.id
    assert reply.id.startswith("resp-")
    kept = served.kept(reply.id)
    assert kept.messages == [{"role": "system", "content": "Be brief."}, asked()]
    assert (len(kept.step.prompt_ids), len(kept.step.response_ids)) == (
        reply.usage.input_tokens,
        reply.usage.output_tokens,
    )
    Response.model_validate(json.loads(raw.content))


async def test_a_stream_has_every_event_in_order_and_the_same_text(scripted: Serve) -> None:
    served = await scripted(["one two three"])
    events = await events_of(served, input=ASKED)
    kinds = [event["type"] for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4:-4] == ["response.output_text.delta"] * len(deltas)
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 2
    assert "".join(deltas) == events[-4]["text"] == "one two three"
    (item,) = events[-1]["response"]["output"]
    assert item == events[-2]["item"]
    assert item["content"] == [{"type": "output_text", "text": "one two three", "annotations": [], "logprobs": []}]
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["id"] == events[-1]["response"]["id"]


async def test_tokens_arrive_one_by_one(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h"], delay_s=0.02)
    loop = asyncio.get_running_loop()
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.responses.create(model="x", input=ASKED, stream=True)
        times = [loop.time() async for event in stream if event.type == "response.output_text.delta"]
    assert times[-1] - times[0] > 0.06


async def test_the_synchronous_client_and_its_stream_helper_work_too(scripted: Serve) -> None:
    served = await scripted(["Yes.", f"Well.\n{call('rain')}"])

    def ask() -> Any:
        with OpenAI(**served.sdk) as client:
            plain = client.responses.create(model="any-name", input=ASKED)
            with client.responses.stream(model="any-name", input=ASKED, tools=[LOOK]) as stream:
                texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
                return plain.output_text, texts[-1], stream.get_final_response()

    plain, text, final = await asyncio.to_thread(ask)
    assert (plain, text, final.output_text) == ("Yes.", "Well.", "Well.")
    assert final.output[1].parsed_arguments == {"word": "rain"}


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_text_and_parallel_calls_are_items_of_their_own(scripted: Serve, stream: bool) -> None:
    served = await scripted([f"{THOUGHT}Let me see.\n{call('rain')}\n{call('snow')}"])
    reply = await answer(served, stream=stream, input=ASKED, tools=[LOOK], reasoning={"effort": "low"})
    thought, said, rain, snow = reply["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "A word is asked for."}]
    assert (said["type"], said["content"][0]["text"]) == ("message", "Let me see.")
    assert [c["arguments"] for c in (rain, snow)] == ['{"word": "rain"}', '{"word": "snow"}']
    assert [item["id"][:3] for item in reply["output"]] == ["rs_", "msg", "fc_", "fc_"]
    assert len({item["id"] for item in reply["output"]}) == 4
    assert rain["call_id"].isalnum()
    kept = served.kept(reply["id"]).reply
    assert [c["id"] for c in kept["tool_calls"]] == [rain["call_id"], snow["call_id"]]
    thoughts = reply["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert thoughts == len(served.engine.tokenizer.encode("<think>\nA word is asked for."))
    assert reply["status"] == "completed"
    assert (reply["tools"], reply["reasoning"]["effort"]) == ([LOOK], "low")


async def test_a_thought_and_a_call_are_streamed_as_their_own_events(scripted: Serve) -> None:
    served = await scripted([f"{THOUGHT}{call('rain')}\nDone."])
    events = await events_of(served, input=ASKED, tools=[LOOK])
    thoughts = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert len(thoughts) > 2
    assert "".join(thoughts) == "A word is asked for."
    (arguments,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert (arguments["name"], arguments["arguments"], arguments["output_index"]) == ("look", '{"word": "rain"}', 1)
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "function_call", "message"]


async def test_the_sdks_own_snapshot_of_a_stream_has_all_items(scripted: Serve) -> None:
    served = await scripted([f"{THOUGHT}{call('rain')}"])
    async with (
        AsyncOpenAI(**served.sdk) as client,
        client.responses.stream(model="x", input=ASKED, tools=[LOOK]) as stream,
    ):
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "function_call"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_loop_of_several_turns_is_one_tree_on_the_sampled_ids(scripted: Serve, stream: bool) -> None:
    served = await scripted([f"Let me see.\n{call('rain')}\n{call('snow')}", call("hail"), "It is wet.", "Bye."])
    history: list[Any] = [asked()]
    replies = []
    for question in (None, None, None, "And now?"):
        if question:
            history.append(asked(question))
        replies.append(await answer(served, stream=stream, input=history, tools=[LOOK], instructions="Be kind."))
        history += replies[-1]["output"]
        history += [result(item) for item in replies[-1]["output"] if item["type"] == "function_call"]
    steps = [served.kept(reply["id"]).step for reply in replies]
    assert [step.parent_id for step in steps] == ["", *[step.step_id for step in steps[:-1]]]
    assert len({step.session_id for step in steps}) == 1
    assert len({step.run_id for step in steps[:3]}) == 1
    for parent, child in itertools.pairwise(steps):
        assert child.prompt_ids[: len(parent.token_ids)] == parent.token_ids
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 3}


async def test_calls_that_a_client_sends_back_one_by_one_with_their_outputs_are_one_answer_again(
    scripted: Serve,
) -> None:
    served = await scripted([f"{call('rain')}\n{call('snow')}", "Wet."])
    one = await answer(served, stream=False, input=ASKED, tools=[LOOK])
    rain, snow = one["output"]
    two = await answer(
        served, stream=False, input=[asked(), rain, result(rain, "a"), snow, result(snow, "b")], tools=[LOOK]
    )
    kept = served.kept(two["id"])
    assert kept.step.parent_id == one["id"]
    assert [message["role"] for message in kept.messages] == ["user", "assistant", "tool", "tool"]
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 1}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_model_reads_its_own_thoughts_whether_a_client_keeps_them_or_not(
    thinker: Callable[..., Awaitable[Served]], stream: bool, keeps: bool
) -> None:
    served = await thinker([f"{THOUGHT}Let me see.\n{call('rain')}", f"{THOUGHT}Wet."])
    one = await answer(served, stream=stream, input=ASKED, tools=[LOOK])
    items = [item for item in one["output"] if keeps or item["type"] != "reasoning"]
    two = await answer(served, stream=stream, input=[asked(), *items, result(items[-1])], tools=[LOOK])
    first, second = served.kept(one["id"]).step, served.kept(two["id"]).step
    assert (second.parent_id, second.session_id, second.run_id) == (first.step_id, first.session_id, first.run_id)
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 1}
    assert second.prompt_ids[: len(first.token_ids)] == first.token_ids


MARKED = (
    "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant.\n<!-- /openclaw:attempt:STABLE -->\n"
    "Runtime: agent=main | session=agent:main:c1 | sessionId=0ff06c96-3aed-4c8a-8b8f-64a47518987f | host=vm"
)
INTERNAL = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nActive exec sessions:\n{}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"


def typed(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


async def test_openclaws_requests_are_one_session_of_its_own_name(scripted: Serve) -> None:
    """Its shape: no item ids, thoughts without their text, an ephemeral message that moves to the end."""
    served = await scripted([call("rain"), "Wet.", "Bye."])
    fields = {
        "prompt_cache_key": "0ff06c96-3aed-4c8a-8b8f-64a47518987f:0",
        "max_output_tokens": 100,
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "tools": [LOOK],
    }
    top, first = typed("developer", MARKED), typed("user", "[Sun 2026-11-22 08:29 UTC] one")
    one = await answer(served, stream=True, input=[top, first, typed("user", INTERNAL.format("none"))], **fields)
    called = {key: one["output"][0][key] for key in ("type", "call_id", "name", "arguments")}
    empty = {"type": "reasoning", "summary": []}
    loop = [empty, called, result(called)]
    history = [top, first, typed("user", INTERNAL.format("none")), *loop]
    two = await answer(served, stream=True, input=history, **fields)
    said = {key: two["output"][0][key] for key in ("type", "role", "content")}
    later = [typed("user", "[Sun 2026-11-22 08:30 UTC] two"), typed("user", INTERNAL.format("1 running"))]
    three = await answer(served, stream=True, input=[top, first, *loop, empty, said, *later], **fields)
    kept = [served.kept(reply["id"]) for reply in (one, two, three)]
    assert {k.step.session_id for k in kept} == {"0ff06c96-3aed-4c8a-8b8f-64a47518987f"}
    assert [k.step.parent_id for k in kept] == ["", one["id"], two["id"]]
    assert {(k.kind, k.app) for k in kept} == {("main", "openclaw")}
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 1, "moved": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_is_incomplete(scripted: Serve, stream: bool) -> None:
    served = await scripted(["word " * 50, f"{THOUGHT}x"])
    reply = await answer(served, stream=stream, input=ASKED, max_output_tokens=4)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete"
    assert reply["usage"]["output_tokens"] == 4
    thought = await answer(served, stream=stream, input=ASKED, max_output_tokens=4)
    assert [(item["type"], item["status"]) for item in thought["output"]] == [("reasoning", "incomplete")]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_says_nothing_has_an_empty_message(scripted: Serve, stream: bool) -> None:
    served = await scripted(["", "Yes."])
    one = await answer(served, stream=stream, input=ASKED)
    assert [item["content"][0]["text"] for item in one["output"]] == [""]
    two = await answer(served, stream=stream, input=[asked(), *one["output"], asked("Well?")])
    assert served.kept(two["id"]).step.parent_id == one["id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_the_text_come_if_they_are_asked_for(scripted: Serve, stream: bool) -> None:
    served = await scripted([f"{THOUGHT}It rains."])
    reply = await answer(served, stream=stream, input=ASKED, include=["message.output_text.logprobs"])
    entries = reply["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "It rains."
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == b"It rains."


async def test_logprobs_of_a_real_model_are_those_that_are_kept(real: Served) -> None:
    body = {"input": ASKED, "max_output_tokens": 12, "include": ["message.output_text.logprobs"], "temperature": 0.9}
    events = await events_of(real, **body)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    step = real.kept(events[0]["response"]["id"]).step
    sampled = [entry["logprob"] for event in deltas for entry in event["logprobs"]]
    assert len(sampled) >= len(deltas) > 0
    assert sampled == step.response_logprobs[: len(sampled)]
    assert step.trainable


def test_a_part_of_a_character_has_no_bytes_and_waits_for_its_text() -> None:
    def entry(token: str, data: list[int] | None) -> dict[str, Any]:
        return {"token": token, "logprob": -0.5, "bytes": data}

    writer = ResponsesWriter(Head(step_id="resp-A", created_s=0, model="m", fingerprint="f"), asked={}, logprobs=True)
    half = {**entry("\ufffd", None), "top_logprobs": [entry("a", [97]), entry("\ufffd", None)]}
    rest = {**entry("\ufffd", None), "top_logprobs": []}
    assert writer.delta(Delta(0, [], [half], [1])) == b""
    event = json.loads(writer.delta(Delta(0, ["é"], [rest], [2])).split(b"data: ")[-1])
    assert [shown["bytes"] for shown in event["logprobs"]] == [[], []]
    assert [shown["bytes"] for shown in event["logprobs"][0]["top_logprobs"]] == [[97], []]


def test_logprobs_are_those_of_the_tokens_that_make_up_the_text() -> None:
    entries = [{"token": token} for token in ("<think>", "Hm", "</think>", "\n\n", "Hm", " hm", "<|im_end|>")]
    assert text_entries(entries, "Hm hm") == entries[4:6]
    assert text_entries(entries, "something else") == entries
    assert text_entries(entries, "") == entries


class Weather(BaseModel):
    wet: bool


async def test_an_answer_by_schema_is_parsed(scripted: Serve) -> None:
    served = await scripted(['{"wet": true}', '{"wet": false}'])
    async with AsyncOpenAI(**served.sdk) as client:
        reply = await client.responses.parse(model="x", input=ASKED, text_format=Weather)
        assert reply.output_parsed == Weather(wet=True)
        async with client.responses.stream(model="x", input=ASKED, text_format=Weather) as stream:
            assert (await stream.get_final_response()).output_parsed == Weather(wet=False)
    assert served.kept(reply.id).step.untrainable == "not sampled from the model"


async def test_an_error_before_the_first_token_has_a_status(scripted: Serve) -> None:
    served = await scripted(["x"])
    async with AsyncOpenAI(**served.sdk, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=r"context is \d+ tokens"):
            await client.responses.create(model="x", input="word " * 40_000, stream=True)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="clawloop@7", input=ASKED)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp-unknown")
        await served.engine.close()
        with pytest.raises(openai.InternalServerError) as caught:
            await client.responses.create(model="x", input=ASKED, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_gone")


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(scripted: Serve) -> None:
    served = await scripted(["word " * 200], delay_s=0.01)
    seen: list[Any] = []

    async def read(stream: Any) -> None:
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                await served.engine.close()

    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.responses.create(model="x", input=ASKED, stream=True)
        with pytest.raises(openai.APIError, match="closed") as caught:
            await read(stream)
    assert caught.value.code == "engine_gone"
    failed = seen[-1]
    assert (failed.type, failed.response.status, failed.response.error.code) == (
        "response.failed",
        "failed",
        "server_error",
    )
    assert failed.response.output[0].status == "incomplete"
    assert served.kept(failed.response.id).step.untrainable == "the engine stopped"


async def test_a_client_that_goes_away_cancels_and_the_part_is_kept(scripted: Serve) -> None:
    served = await scripted(["word " * 400], delay_s=0.01)
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.responses.create(model="x", input=ASKED, stream=True)
        async for event in stream:
            if event.type == "response.created":
                step_id = event.response.id
            if event.type == "response.output_text.delta":
                break
        await stream.close()
    for _ in range(500):
        if served.app[STATS]().kept:
            break
        await asyncio.sleep(0.01)
    kept = served.kept(step_id)
    assert kept.step.untrainable == "cancelled"
    assert kept.text.startswith("word")

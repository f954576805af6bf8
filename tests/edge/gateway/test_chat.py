"""Chat completions through the real `openai` SDK and a real server."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from clawloop_edge.gateway.app import DRAIN, STATS
from clawloop_shared.records import Channel, Target, check_step

from .conftest import Serve, Served

USER: list[Any] = [{"role": "user", "content": "What is the LICENSE?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"word": "rain"}}\n</tool_call>'


async def test_a_plain_call_comes_back_in_openais_shape(scripted: Serve) -> None:
    served = await scripted(["It is Apache."])
    async with AsyncOpenAI(**served.sdk) as client:
        raw = await client.chat.completions.with_raw_response.create(model="clawloop", messages=USER)
    reply = raw.parse()
    assert reply.choices[0].message.content == "It is Apache."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion"
    assert reply.model == "clawloop@0"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert raw.headers["x-clawloop-step"] == reply.id
    assert raw.headers["x-clawloop-policy"] == "scripted@0"
    assert raw.headers["x-clawloop-trainable"] == "no (not sampled from the model)"
    kept = served.kept(reply.id)
    assert kept.text == "It is Apache.<|im_end|>"
    assert kept.messages == USER
    assert kept.reply == {"role": "assistant", "content": "It is Apache."}
    assert len(kept.step.prompt_ids) == reply.usage.prompt_tokens


async def test_the_synchronous_client_works_too(scripted: Serve) -> None:
    served = await scripted(["Yes.", "No."])

    def call() -> list[Any]:
        with OpenAI(**served.sdk) as client:
            plain = client.chat.completions.create(model="any-name", messages=USER)
            stream = client.chat.completions.create(model="any-name", messages=USER, stream=True)
            return [plain.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)]

    assert await asyncio.to_thread(call) == ["Yes.", "No."]


async def test_a_stream_has_role_deltas_finish_reason_usage_and_done(scripted: Serve) -> None:
    served = await scripted(["one two three"])
    body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(f"{served.base_url}/v1/chat/completions", json=body, headers=auth) as reply:
        assert reply.content_type == "text/event-stream"
        lines = [line for line in (await reply.text()).split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len(chunks) > 4
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "one two three"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(served.kept(chunks[0]["id"]).step.response_ids)


async def test_tokens_arrive_one_by_one(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h"], delay_s=0.02)
    loop = asyncio.get_running_loop()
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
        times = [loop.time() async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert times[-1] - times[0] > 0.06


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_round_trip_is_one_run_of_one_session(scripted: Serve, stream: bool) -> None:
    served = await scripted([f"Let me see.\n{CALL}", "It rains."])
    async with AsyncOpenAI(**served.sdk) as client:
        first = await _assistant(client, USER, stream=stream)
        assert first["finish_reason"] == "tool_calls"
        message = first["message"]
        assert message["content"] == "Let me see."
        (call,) = message["tool_calls"]
        assert call["id"].isalnum()
        assert call["function"] == {"name": "look", "arguments": '{"word": "rain"}'}
        result = {"role": "tool", "tool_call_id": call["id"], "content": "wet"}
        second = await _assistant(client, [*USER, message, result], stream=stream)
        assert second["message"]["content"] == "It rains."
    one, two = served.kept(first["id"]).step, served.kept(second["id"]).step
    assert two.parent_id == one.step_id
    assert (two.session_id, two.run_id) == (one.session_id, one.run_id)
    assert two.prompt_ids[: len(one.token_ids)] == one.token_ids
    assert served.app[STATS]().spliced == {"fresh": 1, "prefix": 1}


async def _assistant(client: AsyncOpenAI, messages: list[Any], *, stream: bool) -> dict[str, Any]:
    if not stream:
        reply = await client.chat.completions.create(model="clawloop", messages=messages, tools=[TOOL])
        choice = reply.choices[0]
        return {"id": reply.id, "message": choice.message.to_dict(), "finish_reason": choice.finish_reason}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    reason, step_id = None, ""
    calls: dict[int, Any] = {}
    async for chunk in await client.chat.completions.create(
        model="clawloop", messages=messages, tools=[TOOL], stream=True
    ):
        step_id, part = chunk.id, chunk.choices[0]
        message["content"] += part.delta.content or ""
        for call in part.delta.tool_calls or []:
            calls[call.index] = call.model_dump(exclude={"index"}, exclude_none=True)
        reason = part.finish_reason or reason
    if calls:
        message["tool_calls"] = list(calls.values())
    return {"id": step_id, "message": message, "finish_reason": reason}


async def test_a_new_user_turn_is_a_new_run_of_the_same_session(scripted: Serve) -> None:
    served = await scripted(["First.", "Second."])
    _, _, one = await served.post("/v1/chat/completions", {"messages": USER})
    more = [*USER, one["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    _, _, two = await served.post("/v1/chat/completions", {"messages": more})
    first, second = served.kept(one["id"]).step, served.kept(two["id"]).step
    assert second.session_id == first.session_id
    assert second.run_id != first.run_id


async def test_equal_conversations_side_by_side_are_kept_apart_by_their_tool_call_ids(scripted: Serve) -> None:
    served = await scripted([CALL] * 4 + ["Done."] * 4)
    firsts = [(await served.post("/v1/chat/completions", {"messages": USER, "tools": [TOOL]}))[2] for _ in range(4)]
    for first in reversed(firsts):
        message = first["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "wet"}
        body = {"messages": [*USER, message, result], "tools": [TOOL]}
        _, _, second = await served.post("/v1/chat/completions", body)
        assert served.kept(second["id"]).step.parent_id == first["id"]
    assert len({served.kept(first["id"]).step.session_id for first in firsts}) == 4


async def test_a_restarted_gateway_finds_the_session_in_the_pool(scripted: Serve) -> None:
    before = await scripted([CALL])
    _, _, one = await before.post("/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
    before.kept(one["id"])
    after = await scripted(["Wet."])
    message = one["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "wet"}
    _, _, two = await after.post("/v1/chat/completions", {"messages": [*USER, message, result], "tools": [TOOL]})
    first, second = after.kept(one["id"]).step, after.kept(two["id"]).step
    assert (second.parent_id, second.session_id, second.run_id) == (first.step_id, first.session_id, first.run_id)
    assert second.prompt_ids[: len(first.token_ids)] == first.token_ids


async def test_recorded_ids_are_those_sampled_and_decode_to_what_was_delivered(real: Served) -> None:
    async with AsyncOpenAI(**real.sdk) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="clawloop", messages=USER, max_tokens=24, temperature=0.9, logprobs=True
        )
        reply = raw.parse()
        assert raw.headers["x-clawloop-trainable"] == "yes"
    step = check_step(real.kept(reply.id).step)
    assert real.engine.tokenizer.visible(step.response_ids) == reply.choices[0].message.content
    assert reply.choices[0].logprobs is not None
    assert [t.logprob for t in reply.choices[0].logprobs.content or []] == step.response_logprobs
    scored = await real.engine.score(step.prompt_ids, step.response_ids, version=0, temperature=0.9)
    assert max(abs(a - b) for a, b in zip(scored, step.response_logprobs, strict=True)) < 1e-3
    assert step.policy.line == real.engine.line.line_id


async def test_streamed_and_whole_answers_are_the_same(real: Served) -> None:
    body = {"messages": USER, "max_tokens": 40, "temperature": 0}
    _, headers, whole = await real.post("/v1/chat/completions", body)
    assert headers["x-clawloop-trainable"] == "no (temperature 0)"
    async with AsyncOpenAI(**real.sdk) as client:
        stream = await client.chat.completions.create(
            model="x", messages=USER, max_tokens=40, temperature=0, stream=True, logprobs=True
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert [e.logprob for e in entries] == real.kept(chunks[0].id).step.response_logprobs


async def test_choices_have_seeds_of_their_own_and_are_kept_with_them(real: Served) -> None:
    body = {"messages": USER, "max_tokens": 8, "seed": 2**63 - 1}
    _, headers, _ = await real.post("/v1/chat/completions", {**body, "n": 2})
    steps = [real.kept(step_id).step for step_id in headers["x-clawloop-step"].split(",")]
    assert [step.sampling.seed for step in steps] == [2**63 - 1, -(2**63)]
    _, headers, _ = await real.post("/v1/chat/completions", {**body, "seed": steps[1].sampling.seed})
    assert real.kept(headers["x-clawloop-step"]).step.response_ids == steps[1].response_ids


async def test_a_second_turn_continues_on_the_sampled_ids(real: Served) -> None:
    body = {"messages": USER, "max_tokens": 20, "seed": 7}
    _, _, one = await real.post("/v1/chat/completions", body)
    more = [*USER, one["choices"][0]["message"], {"role": "user", "content": "And?"}]
    _, _, two = await real.post("/v1/chat/completions", {"messages": more, "max_tokens": 4})
    first, second = real.kept(one["id"]).step, real.kept(two["id"]).step
    assert second.parent_id == first.step_id
    assert second.prompt_ids[: len(first.token_ids)] == first.token_ids
    assert first.sampling.seed == 7
    assert two["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"top_p": 0.9}, "truncating sampler"),
        ({"top_k": 5}, "truncating sampler"),
        ({"temperature": 0}, "temperature 0"),
    ],
)
async def test_what_cannot_be_learned_from_says_why(real: Served, field: dict[str, Any], reason: str) -> None:
    _, headers, reply = await real.post("/v1/chat/completions", {"messages": USER, "max_tokens": 2, **field})
    assert headers["x-clawloop-trainable"] == f"no ({reason})"
    assert real.kept(reply["id"]).step.untrainable == reason


async def test_a_client_that_goes_away_cancels_and_the_part_is_kept(scripted: Serve) -> None:
    served = await scripted(["word " * 200], delay_s=0.01)
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
        chunks = [await anext(stream), await anext(stream)]
        await stream.close()
    await _until(lambda: served.engine.health().in_flight == 0 and served.app[STATS]().in_flight == 0)
    step = served.kept(chunks[0].id).step
    assert step.untrainable == "cancelled"
    assert 0 < len(step.response_ids) < 200


async def test_a_client_that_goes_away_from_a_whole_answer_cancels_too(scripted: Serve) -> None:
    served = await scripted(["word " * 500], delay_s=0.01)
    async with AsyncOpenAI(**served.sdk, timeout=0.2, max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="x", messages=USER)
    await _until(lambda: served.engine.health().in_flight == 0 and served.app[STATS]().in_flight == 0)


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition is in the server, which has no event to wait for
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_the_answer_and_are_not_delivered(scripted: Serve, stream: bool) -> None:
    served = await scripted(["The LICENSE ends here and goes on"])
    async with AsyncOpenAI(**served.sdk) as client:
        if stream:
            chunks = [
                c
                async for c in await client.chat.completions.create(
                    model="x", messages=USER, stop=["ends h"], stream=True
                )
            ]
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            step_id, reason = chunks[-1].id, chunks[-1].choices[0].finish_reason
        else:
            reply = await client.chat.completions.create(model="x", messages=USER, stop=["never", "ends h"])
            text, step_id, reason = reply.choices[0].message.content or "", reply.id, reply.choices[0].finish_reason
    assert (text, reason) == ("The LICENSE ", "stop")
    assert served.kept(step_id).text.startswith("The LICENSE ends h")


async def test_max_tokens_ends_with_length(scripted: Serve) -> None:
    served = await scripted(["one two three four five six"])
    _, _, reply = await served.post("/v1/chat/completions", {"messages": USER, "max_completion_tokens": 3})
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 3


async def test_a_pinned_version_is_served_and_an_unknown_one_is_404(real: Served) -> None:
    _, headers, _ = await real.post("/v1/chat/completions", {"messages": USER, "max_tokens": 1, "model": "clawloop@0"})
    assert headers["x-clawloop-policy"].endswith("@0")
    for name in ("clawloop@9", "clawloop@new"):
        status, _, body = await real.post("/v1/chat/completions", {"messages": USER, "model": name})
        assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_incognito_keeps_nothing(scripted: Serve) -> None:
    served = await scripted(["Secret."])
    headers = {"X-Clawloop-Incognito": "1"}
    status, replied, reply = await served.post("/v1/chat/completions", {"messages": USER}, headers=headers)
    assert (status, replied["x-clawloop-trainable"]) == (200, "no (incognito)")
    served.pool.submit(lambda database: None).result(10)
    assert served.pool.get_step(reply["id"]) is None
    assert served.app[STATS]().remembered_steps == 0


async def test_session_channel_and_trace_come_from_headers(scripted: Serve) -> None:
    served = await scripted(["A.", "B."])
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {
        "X-Clawloop-Session": "my session 1",
        "X-Clawloop-Channel": "val",
        "traceparent": f"00-{trace}-b7ad6b7169203331-01",
    }
    ids = [(await served.post("/v1/chat/completions", {"messages": USER}, headers=headers))[2]["id"] for _ in "ab"]
    for step_id in ids:
        step = served.kept(step_id).step
        assert (step.session_id, step.run_id, step.channel) == (served.id_of("my session 1"), trace, Channel.VAL)
        assert "my session" not in step.session_id


async def test_models_are_listed(scripted: Serve) -> None:
    served = await scripted([])
    async with AsyncOpenAI(**served.sdk) as client:
        assert [m.id async for m in client.models.list()] == ["clawloop", "clawloop@0"]
        assert (await client.models.retrieve("clawloop")).owned_by == "clawloop"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("clawloop@4")


async def test_a_closed_engine_is_503_and_not_ready(scripted: Serve) -> None:
    served = await scripted(["x"])
    async with served.http.get(f"{served.base_url}/readyz") as reply:
        assert reply.status == 200
    await served.engine.close()
    status, _, body = await served.post("/v1/chat/completions", {"messages": USER})
    assert (status, body["error"]["code"]) == (503, "engine_gone")
    for path, wanted in (("/readyz", 503), ("/healthz", 200)):
        async with served.http.get(served.base_url + path) as reply:
            assert reply.status == wanted


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(scripted: Serve) -> None:
    served = await scripted(["word " * 200], delay_s=0.01)
    async with AsyncOpenAI(**served.sdk) as client:
        stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
        first = await anext(stream)
        await anext(stream)
        await served.engine.close()
        with pytest.raises(openai.APIError, match="closed"):
            async for _ in stream:
                pass
    assert served.kept(first.id).step.untrainable == "the engine stopped"


async def test_draining_finishes_what_runs_and_refuses_the_rest(scripted: Serve) -> None:
    served = await scripted(["word " * 20], delay_s=0.01)
    running = asyncio.create_task(served.post("/v1/chat/completions", {"messages": USER}))
    await _until(lambda: served.app[STATS]().in_flight == 1)
    draining = asyncio.create_task(served.app[DRAIN]())
    await _until(lambda: served.app[DRAIN].draining)
    status, headers, _ = await served.post("/v1/chat/completions", {"messages": USER})
    assert (status, "Retry-After" in headers) == (503, True)
    assert (await running)[0] == 200
    assert await draining


async def test_a_pool_that_fails_never_fails_a_call(scripted: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = await scripted(["One.", "Two."])
    served.pool.close()
    for _ in range(2):
        status, _, reply = await served.post("/v1/chat/completions", {"messages": USER})
        assert (status, reply["choices"][0]["finish_reason"]) == (200, "stop")
    assert served.app[STATS]().keep_failures == 2
    assert [r.getMessage() for r in caplog.records] == ["steps that could not be kept so far: 1; the latest: PoolError"]


async def test_feedback_is_stored_with_the_step_that_was_just_answered(scripted: Serve) -> None:
    served = await scripted(["Good."])
    _, _, reply = await served.post("/v1/chat/completions", {"messages": USER})
    body = {"step_id": reply["id"], "value": 0.5, "comment": "fine", "source": "user"}
    status, _, answer = await served.post("/v1/feedback", body)
    assert (status, answer["stored"]) == (200, True)
    kept = served.pool.get_step(reply["id"])
    assert kept is not None
    (signal,) = served.pool.signals([kept.step])
    assert (signal.target, signal.value, signal.comment) == (Target.STEP, 0.5, "fine")
    for name, target in (("trace_id", kept.step.run_id), ("session_id", kept.step.session_id)):
        assert (await served.post("/v1/feedback", {name: target, "value": -1}))[0] == 200
    assert len(served.pool.signals([kept.step])) == 3
    again = {"step_id": reply["id"], "value": 1}
    for key, count in (("a", 4), ("a", 4), ("b", 5)):
        assert (await served.post("/v1/feedback", again, headers={"Idempotency-Key": key}))[0] == 200
        assert len(served.pool.signals([kept.step])) == count


async def test_feedback_on_what_is_not_known_is_404_and_bad_values_are_400(scripted: Serve) -> None:
    served = await scripted([])
    status, _, body = await served.post("/v1/feedback", {"step_id": "chatcmpl-unknown", "value": 1})
    assert (status, body["error"]["param"]) == (404, "step_id")
    wrong: list[Any] = [
        {"value": 1},
        {"step_id": "a", "session_id": "b", "value": 1},
        {"step_id": "a"},
        {"step_id": "a", "value": 1.5},
        {"step_id": "a", "value": "good"},
        {"step_id": "a", "value": True},
        {"step_id": "a", "value": 1, "weight": 0},
        {"step_id": "", "value": 1},
        {"step_id": "a", "value": 1, "source": "a b"},
        [],
    ]
    for bad in wrong:
        status, _, body = await served.post("/v1/feedback", bad)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error"), bad


async def test_a_call_is_answered_even_if_an_earlier_step_cannot_be_opened(scripted: Any) -> None:
    first = await scripted(["Hello."])
    asked = [{"role": "user", "content": "hi"}]
    _, _, body = await first.post("/v1/chat/completions", {"messages": asked})
    first.kept(body["id"])
    first.pool.submit(lambda database: database.execute("DELETE FROM keys WHERE scope LIKE 'session/%'")).result(10)
    restarted = await scripted(["Still here."])
    history = [*asked, body["choices"][0]["message"], {"role": "user", "content": "and now?"}]
    status, _, body = await restarted.post("/v1/chat/completions", {"messages": history})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "Still here."

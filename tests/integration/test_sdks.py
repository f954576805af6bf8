"""The official `openai` and `anthropic` SDKs against real edges: one with a model, one that says what it is told.

Each scenario is told to all APIs that know it. The last tests look at what was kept of all the others.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from demoworld import world

from .sdk_apis import ALL, CHAT, COMPLETIONS, MESSAGES, RESPONSES, TALKING, Answer, Api, Ask
from .sdk_edges import Door, breaking, real_edge, scripted_edge, until
from .sdk_scenes import (
    ASKED,
    MISTAKES,
    NAMES,
    SCRIPT,
    TOOLS,
    arguments,
    check_talk,
    cue,
    mistaken,
    play,
    repeatable,
)


class Answered(BaseModel):
    """What the model is made to say."""

    colour: Literal["red", "blue"]
    sure: bool


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Door]]:
    """Both edges, started side by side."""
    folder = tmp_path_factory.mktemp("sdks")
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        managers = [real_edge(folder), scripted_edge(folder, list(SCRIPT.values()) * 100)]
        real, scripted = threads.map(stack.enter_context, managers)
        yield real, scripted


@pytest.fixture
async def real(doors: tuple[Door, Door]) -> Door:
    await doors[0].idle()
    return doors[0]


@pytest.fixture
def scripted(doors: tuple[Door, Door]) -> Door:
    return doors[1]


# Answers, whole and streamed.


@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_all_ways_of_one_sdk_give_the_same_answer(real: Door, api: Api) -> None:
    ask = repeatable(api)
    async with real.client(api.sdk) as client:
        first, second = await real.whole(api, client, ask), await real.streamed(api, client, ask)

    def synchronously() -> tuple[Answer, str]:
        with real.sync_client(api.sdk) as client:
            create = api.resource(client).create
            whole = real.noted(api.read(create(**api.body(ask))))
            return whole, "".join(map(api.delta, create(**api.body(ask), stream=True)))

    third, streamed = await asyncio.to_thread(synchronously)
    assert {first.text, second.text, third.text} == {streamed}
    assert streamed
    usages = {(answer.prompt_tokens, answer.completion_tokens, answer.reason) for answer in (first, second, third)}
    assert len(usages) == 1
    assert first.reason in api.reasons.values()
    assert first.prompt_tokens > 3
    assert len({first.step_id, second.step_id, third.step_id}) == 3
    assert real.trainable[first.step_id] == real.trainable[second.step_id]


@pytest.mark.parametrize("api", [CHAT, RESPONSES, COMPLETIONS], ids=repr)
async def test_another_seed_gives_another_answer(real: Door, api: Api) -> None:
    async with real.client(api.sdk) as client:
        texts = [
            (await real.whole(api, client, Ask(history=api.user(ASKED), temperature=2, seed=seed))).text
            for seed in (1, 2, 2)
        ]
    assert texts[0] != texts[1] == texts[2]


@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_text_arrives_while_the_engine_still_samples(real: Door, api: Api) -> None:
    async with real.client(api.sdk) as client:
        stream = await real.open(api, client, api.endless(20_000))
        texts: list[str] = []
        async for event in stream:
            if text := api.delta(event):
                texts.append(text)
                assert real.in_flight() == 1
            if len(texts) == 20:
                break
        await stream.close()
    assert max(map(len, texts)) < 12, "several tokens at once"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_an_answer_of_too_many_tokens_says_that_it_was_cut(real: Door, api: Api, stream: bool) -> None:
    async with real.client(api.sdk) as client:
        answer = await real.ask(api, client, api.endless(5), stream=stream)
    assert answer.reason == api.reasons["length"]
    assert answer.completion_tokens == 5
    assert answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_a_stop_string_ends_the_answer_before_it(scripted: Door, api: Api, stream: bool) -> None:
    await cue(scripted, "words")
    async with scripted.client(api.sdk) as client:
        ask = Ask(history=api.user(ASKED), stops=("never", "three"))
        answer = await scripted.ask(api, client, ask, stream=stream)
    assert answer.text == "one two "
    assert answer.reason == api.reasons["stop string"]


@pytest.mark.parametrize("api", [CHAT, COMPLETIONS], ids=repr)
async def test_two_choices_of_one_call_are_two_answers(real: Door, api: Api) -> None:
    ask = Ask(history=api.user(ASKED), temperature=2, seed=3)
    async with real.client(api.sdk) as client:
        reply = await api.resource(client).create(**api.body(ask), n=2)
        texts: dict[int, str] = {}
        ends: dict[int, str] = {}
        async for event in await real.open(api, client, ask, n=2):
            for choice in event.choices:
                one = event.model_copy(update={"choices": [choice]})
                texts[choice.index] = texts.get(choice.index, "") + api.delta(one)
                ends[choice.index] = choice.finish_reason or ends.get(choice.index, "")
    whole = {choice.index: choice.text if api is COMPLETIONS else choice.message.content for choice in reply.choices}
    assert whole == texts
    assert whole[0] != whole[1]
    assert ends == {choice.index: choice.finish_reason for choice in reply.choices}
    real.choices |= {reply.id: whole[0], f"{reply.id}-1": whole[1]}


async def test_logprobs_come_with_the_likeliest_tokens(real: Door) -> None:
    user = {
        api: Ask(history=api.user(ASKED), temperature=0.2, seed=11, max_tokens=8)
        for api in (CHAT, RESPONSES, COMPLETIONS)
    }
    async with real.client(openai) as client:
        chat = await client.chat.completions.create(**CHAT.body(user[CHAT]), logprobs=True, top_logprobs=3)
        logged = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
        response = await client.responses.create(**RESPONSES.body(user[RESPONSES]), **logged)
        legacy = await client.completions.create(**COMPLETIONS.body(user[COMPLETIONS]), logprobs=3)
    entries, shown = chat.choices[0].logprobs.content, response.output[0].content[0].logprobs
    told = legacy.choices[0].logprobs
    assert "".join(entry.token for entry in shown) == response.output_text
    assert "".join(told.tokens).startswith(legacy.choices[0].text)
    for entry in [*entries, *shown]:
        top = [other.logprob for other in entry.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert entry.logprob <= top[0] <= 0
        assert {other.token: other.logprob for other in entry.top_logprobs}.get(entry.token, entry.logprob) == (
            entry.logprob
        )
    for token, logprob, likeliest in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(likeliest) - 3 in (0, 1)  # OpenAI's own adds the sampled token if it is not among them
        assert likeliest[token] == logprob
    for answer in (CHAT.read(chat), RESPONSES.read(response), COMPLETIONS.read(legacy)):
        real.noted(answer)
    real.logprobs |= {
        chat.id: [entry.logprob for entry in entries],
        response.id: [entry.logprob for entry in shown],
        legacy.id: told.token_logprobs,
    }


async def test_models_are_listed_and_found(real: Door) -> None:
    async with real.client(openai) as client:
        names = [model.id async for model in client.models.list()]
        assert (await client.models.retrieve("clawloop@0")).id == "clawloop@0"
        with pytest.raises(openai.NotFoundError, match="version 99 is"):
            await client.models.retrieve("clawloop@99")
    async with real.client(anthropic) as client:
        assert [model.id async for model in await client.models.list()] == names
        assert (await client.models.retrieve("clawloop")).id == "clawloop"
    assert names == ["clawloop", "clawloop@0"]


async def test_counted_tokens_are_those_of_the_call(real: Door) -> None:
    ask = Ask(history=MESSAGES.user(ASKED), system=world.SYSTEM, tools=TOOLS, max_tokens=4)
    body = {name: value for name, value in MESSAGES.body(ask).items() if name != "max_tokens"}
    async with real.client(anthropic) as client:
        counted = await client.messages.count_tokens(**body)
        answer = await real.whole(MESSAGES, client, ask)
    assert counted.input_tokens == answer.prompt_tokens


# Tools and schemas.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", TALKING, ids=repr)
async def test_an_agent_calls_tools_until_it_can_answer(real: Door, api: Api, stream: bool) -> None:
    async with real.client(api.sdk) as client:
        turns = await play(real, api, client, stream=stream)
    for answers in turns:
        assert [answer.reason for answer in answers[:-1]] == [api.reasons["calls"]] * (len(answers) - 1)
        assert answers[-1].reason == api.reasons["stop"]
        assert answers[-1].text
    assert {call.name for answer in turns[0] for call in answer.calls} & NAMES
    assert {real.trainable[answer.step_id] for answers in turns for answer in answers} == {"yes"}
    real.talks.append(turns)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", TALKING, ids=repr)
async def test_thoughts_text_and_parallel_calls_come_apart_and_go_on_as_one_run(
    scripted: Door, api: Api, stream: bool
) -> None:
    user = api.user(ASKED)
    async with scripted.client(api.sdk) as client:
        await cue(scripted, "calls")
        first = await scripted.ask(api, client, Ask(history=user, tools=TOOLS, max_tokens=200), stream=stream)
        more = [*user, *first.turn, *api.results(first.calls, ["Mira", "Jon"])]
        await cue(scripted, "words")
        second = await scripted.ask(api, client, Ask(history=more, tools=TOOLS), stream=stream)
        await cue(scripted, "calls")
        single = Ask(history=user, tools=TOOLS, max_tokens=200, one_call=True)
        alone = await scripted.ask(api, client, single, stream=stream)
    assert (first.thoughts, first.text, first.reason) == ("Two cities.", "Let me look.", api.reasons["calls"])
    assert [(call.name, arguments(call)) for call in first.calls] == [
        ("atlas", {"city": "Oslo"}),
        ("atlas", {"city": "Lima"}),
    ]
    assert len({call.call_id for call in first.calls}) == 2
    assert all(call.call_id.isalnum() for call in first.calls)
    assert second.text == "one two three four"
    assert [arguments(call) for call in alone.calls] == [{"city": "Oslo"}]
    scripted.talks.append([[first, second]])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", TALKING, ids=repr)
async def test_a_call_that_cannot_be_read_is_delivered_as_text(scripted: Door, api: Api, stream: bool) -> None:
    await cue(scripted, "broken")
    async with scripted.client(api.sdk) as client:
        ask = Ask(history=api.user(ASKED), tools=TOOLS, max_tokens=200)
        answer = await scripted.ask(api, client, ask, stream=stream)
    assert answer.text == SCRIPT["broken"]
    assert answer.calls == ()
    assert answer.reason == api.reasons["stop"]


@pytest.mark.parametrize("api", TALKING, ids=repr)
async def test_tools_are_called_as_the_client_chooses(real: Door, api: Api) -> None:
    ask = Ask(history=api.user(ASKED), system=world.SYSTEM, tools=TOOLS, temperature=0.2, max_tokens=200)
    async with real.client(api.sdk) as client:
        for choice, stream in itertools.product(("required", "delta"), (False, True)):
            chosen = replace(ask, choice=choice, one_call=choice == "required")
            answer = await real.ask(api, client, chosen, stream=stream)
            names = {call.name for call in answer.calls}
            assert all(arguments(call).keys() == {"city"} for call in answer.calls)
            assert names == {"delta"} if choice == "delta" else names <= NAMES
            assert len(answer.calls) == 1 or choice == "delta"
            assert answer.reason == api.reasons["calls"]
            assert real.trainable[answer.step_id] == "no (constrained decoding)"
        free = await real.whole(api, client, replace(ask, choice="none"))
    assert not free.calls
    assert real.trainable[free.step_id] == "yes"


@pytest.mark.parametrize("api", TALKING, ids=repr)
async def test_an_answer_by_schema_is_parsed_by_the_sdk(real: Door, api: Api) -> None:
    ask, form = Ask(history=api.user("Red or blue?")), {api.form: Answered}
    async with real.client(api.sdk) as client:
        whole = await api.resource(client).parse(**api.body(ask), **form)
        streamed = await api.collected(client, ask, **form)
    for reply in (whole, streamed):
        assert isinstance(api.parsed(reply), Answered)
        assert real.noted(api.read(reply)).reason == api.reasons["stop"]


# What goes wrong.


@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_a_wrong_key_is_refused_by_name(real: Door, api: Api) -> None:
    async with real.client(api.sdk, api_key="guessed") as client:
        with pytest.raises(api.sdk.AuthenticationError, match="token file"):
            await real.whole(api, client, repeatable(api))


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_mistakes_are_the_sdks_own_errors_and_say_what_is_wrong(real: Door, api: Api, mistake: str) -> None:
    if api is COMPLETIONS and mistake == "picture":
        api = CHAT  # a prompt of text has no place for one
    name, status, words = MISTAKES[mistake]
    ask = mistaken(api, mistake)
    async with real.client(api.sdk) as client:
        for stream in (False, True):
            with pytest.raises(getattr(api.sdk, name), match=words) as error:
                await api.resource(client).create(**api.body(ask), stream=stream)
            assert error.value.status_code == status


async def test_a_busy_edge_says_when_to_come_back_and_each_sdk_does(real: Door) -> None:
    async with AsyncExitStack() as stack:
        plain = {sdk: await stack.enter_async_context(real.client(sdk)) for sdk in (openai, anthropic)}
        patient = {sdk: client.with_options(max_retries=10) for sdk, client in plain.items()}
        held = [await real.open(CHAT, plain[openai], CHAT.endless(20_000), n=16) for _ in range(2)]
        await until(lambda: real.in_flight() == 32)
        for api in ALL:
            with pytest.raises(api.sdk.InternalServerError, match="32 calls are in flight") as error:
                await real.whole(api, plain[api.sdk], repeatable(api))
            assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "1")
        before = len(real.seen)
        calls = [asyncio.create_task(real.whole(api, patient[api.sdk], repeatable(api))) for api in ALL]
        await until(lambda: len(real.seen) - before >= len(ALL))
        for stream in held:
            await stream.close()
        assert all(answer.text for answer in await asyncio.gather(*calls))
    for path in {head.path for head in real.seen[before:]}:
        refused, *_, served = (head for head in real.seen[before:] if head.path == path)
        assert (refused.status, refused.retry, served.status) == (503, 0, 200)
        assert served.retry > 0
        assert served.at_s - refused.at_s >= 1


@pytest.mark.parametrize("cut_after_answer", [False, True])
async def test_a_call_whose_connection_breaks_is_sent_again_and_is_one_step(real: Door, cut_after_answer: bool) -> None:
    async def broken(api: Api) -> None:
        key = {"Idempotency-Key": f"broken-{api}-{cut_after_answer}"}
        async with (
            breaking(real.part.port, cut_after_answer=cut_after_answer) as port,
            real.client(api.sdk, port=port, max_retries=2, default_headers=key) as client,
        ):
            answer = await real.whole(api, client, repeatable(api))
        assert answer.text
        (head,) = (seen for seen in real.seen if seen.headers.get("x-clawloop-step") == answer.step_id)
        assert head.retry == 1
        assert ("x-clawloop-replayed" in head.headers) == cut_after_answer

    await asyncio.gather(*map(broken, ALL))


@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_the_same_idempotency_key_is_one_step(real: Door, api: Api) -> None:
    async with real.client(api.sdk) as client:
        for stream in (False, True):
            again = client.with_options(default_headers={"Idempotency-Key": f"{api}-{stream}"})
            ask = Ask(history=api.user(ASKED), temperature=1)
            first, second = await asyncio.gather(*(real.ask(api, again, ask, stream=stream) for _ in range(2)))
            third = await real.ask(api, again, ask, stream=stream)
            assert first == second == third
            assert real.seen[-1].headers["x-clawloop-replayed"] == "1"
            with pytest.raises(api.sdk.BadRequestError, match="another body"):
                await real.ask(api, again, Ask(history=api.user("Else?")), stream=stream)


# Clients that go away.


@pytest.mark.parametrize("way", ["break", "close the client"])
@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_a_client_that_leaves_a_stream_frees_the_engine(real: Door, api: Api, way: str) -> None:
    deltas, step_id = 0, ""
    async with real.client(api.sdk) as client:
        stream = await real.open(api, client, api.endless(20_000))
        async for event in stream:
            step_id = step_id or api.step_id(event)
            deltas += bool(api.delta(event))
            if deltas == 3:
                break
        assert real.in_flight() == 1
        if way == "break":
            await stream.close()
        else:
            await client.close()
        await real.idle()
    real.left.append(step_id)


@pytest.mark.parametrize("api", ALL, ids=repr)
async def test_a_client_that_gives_up_a_whole_answer_frees_the_engine(real: Door, api: Api) -> None:
    async with real.client(api.sdk) as client:
        call = asyncio.create_task(real.whole(api, client, api.endless(20_000)))
        await until(lambda: real.in_flight() == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await real.idle()
        with pytest.raises(api.sdk.APITimeoutError):
            await real.whole(api, client.with_options(timeout=0.2), api.endless(20_000))
        await real.idle()


@pytest.mark.parametrize("sdk", [openai, anthropic], ids=["openai", "anthropic"])
async def test_twenty_streams_at_once_get_each_their_own_answer(real: Door, sdk: Any) -> None:
    apis = [api for api in ALL if api.sdk is sdk]

    async def one(client: Any, number: int) -> str:
        api = apis[number % len(apis)]
        forced = {"const": f"number {number}"} if api is not COMPLETIONS else None
        answer = await real.streamed(api, client, Ask(history=api.user(f"{number}?"), schema=forced))
        assert answer.text == json.dumps(f"number {number}") if forced else answer.completion_tokens
        return answer.step_id

    async with real.client(sdk) as client:
        assert len(set(await asyncio.gather(*(one(client, number) for number in range(20))))) == 20


# What is left of it all.


@pytest.mark.parametrize("which", ["real", "scripted"])
def test_everything_that_was_given_is_kept_as_it_was_given(doors: tuple[Door, Door], which: str) -> None:
    door = doors[which == "scripted"]
    assert door.given
    kept = door.explain(*door.given, *door.choices, *door.left)
    for step_id, answer in door.given.items():
        step = kept[step_id]
        assert (step["prompt_tokens"], step["response_tokens"]) == (answer.prompt_tokens, answer.completion_tokens)
        assert (step["reply"]["content"] or "") == answer.text
        assert [call["id"] for call in step["reply"].get("tool_calls", [])] == [call.call_id for call in answer.calls]
        assert door.trainable[step_id] == ("yes" if step["trainable"] else f"no ({step['untrainable']})")
        logprobs = door.logprobs.get(step_id, [])
        assert step["response_logprobs"][: len(logprobs)] == logprobs
    for step_id, text in door.choices.items():
        assert (kept[step_id]["reply"]["content"], kept[step_id]["trainable"]) == (text, True)
        assert door.trainable[step_id] == "yes"
    for step_id in door.left:
        step = kept[step_id]
        assert (step["finish_reason"], step["trainable"]) == ("cancelled", False)
        assert 3 <= step["response_tokens"] < 20_000
    if which == "scripted":
        assert {door.trainable[step_id] for step_id in door.given} == {"no (not sampled from the model)"}
    for talk in door.talks:
        check_talk(talk, kept)


async def test_an_edge_that_is_stopped_finishes_its_stream_first(real: Door) -> None:
    process = real.part.process
    assert process is not None
    async with real.client(openai) as client, real.client(anthropic) as other:
        stream = await real.open(CHAT, client, CHAT.endless(400))
        first = await anext(stream)
        process.terminate()
        await until(lambda: _refuses(real))
        with pytest.raises(anthropic.InternalServerError, match="shutting down"):
            await real.whole(MESSAGES, other, repeatable(MESSAGES))
        chunks = [first, *[chunk async for chunk in stream]]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(20) == 0
    step = real.explain(first.id)[first.id]
    assert (step["finish_reason"], step["response_tokens"]) == ("length", 400)


def _refuses(door: Door) -> bool:
    """Whether the edge takes no new calls."""
    try:
        return door.in_flight() < 0
    except OSError:
        return True

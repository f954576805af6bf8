"""Claw-R1's agents unchanged: the calls that its clients make, through httpx and the real `openai` SDK."""

import asyncio
import base64
import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI, NotFoundError

from clawloop_edge.gateway import trajectory_store
from clawloop_edge.gateway.trajectory_chat import accepted
from clawloop_edge.gateway.trajectory_store import Facts, TrajectoryStore
from clawloop_edge.pool.store import Pool
from clawloop_shared.records import Channel

from .conftest import TOKEN, Serve, Served
from .rollouts import agent, assembled, begin, chat, client, post, steps_of, url

CALL = '<tool_call>\n{"name": "check_answer", "arguments": {"answer": "4"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "check_answer",
        "parameters": {"type": "object", "properties": {"answer": {"type": "string"}}},
    },
}
ASKED: list[Any] = [{"role": "user", "content": "2+2?"}]


async def test_an_offline_rollout_of_a_group_lands_in_its_channel_with_its_reward(scripted: Serve) -> None:
    served = await scripted([CALL, "It is 4.", CALL, "It is 4."])
    names = []
    for _ in range(2):
        name, base_url = await begin(served)
        assert base_url == f"{served.base_url}/{name}/1/v1"
        base = base_url.rsplit("/", 2)[0] + "/row-7/v1"
        facts = {"channel": "val", "metadata": {"uid": "row-7", "reward_model": {"ground_truth": "4"}}}
        assert (await post(f"{base}/register_trajectory", facts)).json() == {"status": "ok"}
        first = (await chat(base, ASKED, tools=[TOOL])).parse()
        message = first.choices[0].message
        assert message.content == CALL
        assert json.loads(message.tool_calls[0].function.arguments) == {"answer": "4"}
        history = [*ASKED, {"role": "assistant", "content": message.content}, {"role": "tool", "content": "Correct!"}]
        second = await chat(base, history, tools=[TOOL])
        assert second.headers["x-clawloop-trajectory-step"] == "1"
        done = (await post(f"{base}/complete_trajectory", {"reward": 1.0})).json()
        assert done == {"status": "ok", "steps": 2, "reward": 1.0, "channel": "val"}
        one, two = steps_of(served, name)
        assert (one.step_id, two.step_id) == (first.id, second.parse().id)
        assert two.prompt_ids[: len(one.token_ids)] == one.token_ids
        assert (one.session_id, one.run_id, two.session_id, two.run_id) == (name,) * 4
        assert two.parent_id == one.step_id
        assert one.group_id == two.group_id == "row-7"
        names.append(name)
    found = assembled(served, *names)
    assert [(t.trajectory_id, t.channel, t.reward, t.group_id, len(t.steps)) for t in found] == [
        (name, Channel.VAL, 1.0, "row-7", 2) for name in names
    ]


async def test_an_agent_that_returns_text_and_calls_does_not_show_the_call_twice(scripted: Serve) -> None:
    served = await scripted([CALL, "It is 4."])
    name, base = await begin(served)
    message = (await chat(base, ASKED, tools=[TOOL])).parse().choices[0].message.to_dict()
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Correct!"}
    await chat(base, [*ASKED, message, result], tools=[TOOL])
    one, two = steps_of(served, name)
    assert two.prompt_ids[: len(one.token_ids)] == one.token_ids
    assert served.engine.tokenizer.decode(two.prompt_ids).count('{"answer": "4"}') == 1


async def test_an_agent_that_goes_back_to_an_earlier_answer_continues_that_one(scripted: Serve) -> None:
    served = await scripted([CALL, "No.", "It is 4."])
    name, base = await begin(served)
    for _ in range(2):
        await chat(base, ASKED, tools=[TOOL])
    history = [*ASKED, {"role": "assistant", "content": CALL}, {"role": "tool", "content": "Correct!"}]
    await chat(base, history, tools=[TOOL])
    first, _, third = steps_of(served, name)
    assert third.parent_id == first.step_id


async def test_a_stream_on_a_trajectory_has_the_raw_text_and_the_calls(scripted: Serve) -> None:
    served = await scripted([f"Let me see.\n{CALL}"])
    _, base = await begin(served)
    async with agent(base) as sdk:
        stream = await sdk.chat.completions.create(model="default", messages=ASKED, tools=[TOOL], stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == f"Let me see.\n{CALL}"
    made = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert [function.name for function in made if function] == ["check_answer"]


async def test_ordinary_calls_stay_as_openai_has_them(scripted: Serve) -> None:
    served = await scripted([CALL])
    async with AsyncOpenAI(**served.sdk) as sdk:
        reply = await sdk.chat.completions.create(model="m", messages=ASKED, tools=[TOOL])
    assert reply.choices[0].message.content is None
    kept = served.kept(reply.id)
    assert (kept.step.trajectory_id, kept.step.group_id) == ("", "")


async def test_completing_without_a_reward_and_twice_makes_no_signal(scripted: Serve) -> None:
    served = await scripted(["a"])
    name, base = await begin(served)
    await chat(base, ASKED)
    for _ in range(2):
        assert (await post(f"{base}/complete_trajectory")).status_code == 200
    assert served.pool.signals(steps_of(served, name)) == []


async def test_the_same_reward_again_is_one_signal_and_another_one_is_a_later_word(scripted: Serve) -> None:
    served = await scripted(["a"])
    name, base = await begin(served)
    await chat(base, ASKED)
    for reward in (1.0, 1.0, 0.5, 0.5, 1.0):
        assert (await post(f"{base}/complete_trajectory", {"reward": reward})).status_code == 200
        await asyncio.sleep(0.002)  # a later word has a later time, in milliseconds
    assert [signal.value for signal in served.pool.signals(steps_of(served, name))] == [1.0, 0.5, 1.0]
    assert [trajectory.reward for trajectory in assembled(served, name)] == [1.0]


async def test_sessions_from_init_are_separate_and_an_abandoned_one_holds_nobody_up(scripted: Serve) -> None:
    served = await scripted(["a"] * 6)
    begun = [await begin(served) for _ in range(3)]
    for _ in range(2):
        for _, base in begun:
            await chat(base, ASKED)
    for _, base in begun[1:]:
        await post(f"{base}/complete_trajectory", {"reward": 1.0})
    sessions = {name: {step.session_id for step in steps_of(served, name)} for name, _ in begun}
    assert sessions == {name: {name} for name, _ in begun}
    found = assembled(served, *(name for name, _ in begun))
    assert [(t.trajectory_id, t.group_id) for t in found] == [(name, "") for name, _ in begun[1:]]


async def test_fifty_trajectories_at_once_keep_apart(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "odd" if prompt.count("task 1") else "even")

    async def rollout(number: int) -> tuple[str, int]:
        name, base_url = await begin(served)
        base = base_url.rsplit("/", 2)[0] + f"/row-{number % 5}/v1"
        messages: list[Any] = [{"role": "user", "content": f"task {number}"}]
        for _ in range(3):
            reply = (await chat(base, messages)).parse().choices[0].message
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": "again"}]
        done = await post(f"{base}/complete_trajectory", {"reward": number / 50})
        assert done.json()["steps"] == 3
        return name, number

    rolled = await asyncio.gather(*(rollout(number) for number in range(50)))
    found = {t.trajectory_id: t for t in assembled(served, *(name for name, _ in rolled))}
    assert len(found) == 50
    for name, number in rolled:
        assert (found[name].reward, found[name].group_id) == (number / 50, f"row-{number % 5}")
        assert f"task {number}<" in served.engine.tokenizer.decode(found[name].steps[0].prompt_ids)


async def test_older_clients_and_documented_urls_work(scripted: Serve) -> None:
    served = await scripted(["a"] * 4)
    name, base_url = await begin(served)
    base = base_url.removesuffix("/v1")
    await chat(f"{base}/v1", ASKED)
    await chat(base, ASKED)
    await chat(f"{base_url}/v1", ASKED)
    assert (await post(f"{base}/v1/trajectory/complete")).status_code == 200
    early = await post(url(served, f"/complete_trajectory/{name}"), {"reward": 0.5, "channel": "train"})
    assert early.json() == {"status": "ok", "steps": 3, "reward": 0.5, "channel": "train"}
    other, _ = await begin(served)
    named = await post(f"{served.base_url}/register_trajectory", {"trajectory_uid": other, "channel": "val"})
    assert named.status_code == 200
    await chat(f"{served.base_url}/{other}/g/v1", ASKED)
    assert [step.channel for step in steps_of(served, other)] == [Channel.VAL]
    assert (await post(f"{base}/v1/unknown_verb")).status_code == 404


async def test_ids_that_a_client_makes_itself_need_the_token_every_time(scripted: Serve) -> None:
    served = await scripted(["a", "b"])
    own = f"{served.base_url}/{uuid.uuid4()}/{uuid.uuid4()}"
    with pytest.raises(NotFoundError):
        await chat(own, ASKED)
    async with agent(own, TOKEN) as sdk:
        await sdk.chat.completions.create(model="default", messages=ASKED)
    with pytest.raises(NotFoundError):
        await chat(own, ASKED)
    assert (await post(f"{own}/complete_trajectory", {"reward": 1})).status_code == 404
    basic = own.replace("http://", f"http://any:{TOKEN}@")
    assert (await post(f"{basic}/complete_trajectory", {"reward": 1})).json()["steps"] == 1


async def test_a_trajectorys_id_opens_nothing_else(scripted: Serve) -> None:
    served = await scripted([])
    name, _ = await begin(served)
    other = uuid.uuid4().hex
    for verb in ("register_trajectory", "complete_trajectory", "chat/completions"):
        for headers in ({}, {"Authorization": "Bearer not-needed"}, {"Authorization": f"Bearer {name}"}):
            reply = await post(f"{served.base_url}/{other}/1/v1/{verb}", {}, headers=headers)
            assert reply.status_code == 404, verb
            assert reply.json()["detail"] == reply.json()["error"]["message"]
            assert other not in reply.text
    for path in ("/init_trajectory", "/generate", "/submit_steps", "/compute_reward", "/v1/chat/completions"):
        reply = await post(served.base_url + path, {}, headers={"Authorization": f"Bearer {name}"})
        assert reply.status_code == 401, path
        assert "WWW-Authenticate" not in reply.headers


@pytest.mark.parametrize("credential", ["", "Basic", "Basic !", "Basic ÿ", f"Basic {TOKEN}", "Basic dDo="])
async def test_basic_without_the_token_is_refused(scripted: Serve, credential: str) -> None:
    served = await scripted([])
    headers = {"Authorization": credential.encode("latin-1")}
    assert (await post(f"{served.base_url}/init_trajectory", headers=headers)).status_code == 401


async def test_basic_with_the_token_is_taken_everywhere(scripted: Serve) -> None:
    served = await scripted(["a"])
    basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
    async with client(headers={"Authorization": f"Basic {basic}"}) as http:
        assert (await http.get(f"{served.base_url}/v1/models")).status_code == 200
        body = {"messages": ASKED}
        assert (await http.post(f"{served.base_url}/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("complete_trajectory", b'{"reward": 2}', 400),
        ("complete_trajectory", b'{"reward": NaN}', 400),
        ("complete_trajectory", b'{"reward": "x"}', 400),
        ("complete_trajectory", b'{"reward": true}', 400),
        ("complete_trajectory", b'{"reward": -1.01}', 400),
        ("complete_trajectory", b'{"channel": "test"}', 400),
        ("complete_trajectory", b"{", 400),
        ("complete_trajectory", b'{"reward": -1, "more": 1}', 200),
        ("register_trajectory", b"", 200),
        ("register_trajectory", b"[]", 400),
        ("register_trajectory", b'"x"', 400),
        ("register_trajectory", b'{"channel": "test"}', 400),
        ("register_trajectory", b'{"channel": {}}', 400),
        ("register_trajectory", b'{"metadata": 5}', 400),
        ("register_trajectory", b'{"metadata": {"a": [1180591620717411303424, null, -1e300]}}', 200),
        ("register_trajectory", b'{"metadata": {"a": "' + b"x" * 70_000 + b'"}}', 400),
        ("chat/completions", b"[]", 400),
        ("chat/completions", b'{"messages": [{"content": "x"}]}', 400),
        ("chat/completions", b'{"messages": [{"role": "assistant", "tool_calls": 5}, {"role": "tool"}]}', 400),
    ],
)
async def test_wrong_bodies_are_refused(scripted: Serve, verb: str, body: bytes, status: int) -> None:
    served = await scripted([])
    _, base = await begin(served)
    assert (await post(f"{base}/{verb}", content=body)).status_code == status


async def test_paths_that_are_wrong_are_refused(scripted: Serve) -> None:
    served = await scripted([])
    name, _ = await begin(served)
    async with client() as http:
        assert (await http.put(url(served, f"/{name}/1/v1/complete_trajectory"))).status_code == 405
    long = f"{served.base_url}/{name}/{'g' * 201}/v1"
    assert (await post(f"{long}/register_trajectory")).status_code == 400
    assert (await post(f"{served.base_url}/{name}/%0A/v1/register_trajectory")).status_code == 400
    assert (await post(url(served, f"/{'t' * 201}/g/v1/register_trajectory"))).status_code == 400
    for odd in ("%FF", "%00", "..", "%2F", "%ED%A0%80", "%E2%80%AE"):
        assert (await post(f"{served.base_url}/{odd}/g/v1/complete_trajectory")).status_code in (400, 401, 404)
        assert (await post(url(served, f"/{odd}/g/v1/complete_trajectory"))).status_code in (400, 404)


async def test_channel_and_group_do_not_change_under_steps(scripted: Serve) -> None:
    served = await scripted(["a", "b", "c"])
    name, base = await begin(served)
    assert (await post(f"{base}/register_trajectory", {"channel": "val"})).status_code == 200
    await chat(base, ASKED, extra_headers={"X-Clawloop-Channel": "train"})
    assert (await post(f"{base}/register_trajectory", {"channel": "train"})).status_code == 409
    assert (await post(f"{base}/register_trajectory", {"channel": "val"})).status_code == 200
    await chat(base.replace("/1/v1", "/g/v1"), ASKED)
    await chat(base.replace("/1/v1", "/h/v1"), ASKED)
    assert (await post(base.replace("/1/v1", "/h/v1") + "/register_trajectory")).status_code == 409
    assert [step.group_id for step in steps_of(served, name)] == ["", "", ""]
    assert {step.channel for step in steps_of(served, name)} == {Channel.VAL}
    done = await post(f"{base}/complete_trajectory", {"reward": 1.0, "channel": "train"})
    assert done.json()["channel"] == "val"
    assert [(t.channel, t.reward) for t in assembled(served, name)] == [(Channel.VAL, 1.0)]


async def test_a_reward_for_a_trajectory_without_steps_is_no_signal(scripted: Serve) -> None:
    served = await scripted([])
    _, base = await begin(served)
    done = await post(f"{base}/complete_trajectory", {"reward": 0.0})
    assert (done.status_code, done.json()["steps"]) == (200, 0)


async def test_a_restart_continues_the_step_index_the_channel_and_the_reward(scripted: Serve) -> None:
    before = await scripted(["one"])
    name, base = await begin(before)
    await post(f"{base}/register_trajectory", {"channel": "val"})
    first = (await chat(base, ASKED)).parse()
    assert len(steps_of(before, name)) == 1
    after = await scripted(["two", "three"])
    moved = base.replace(before.base_url, after.base_url)
    history = [*ASKED, {"role": "assistant", "content": first.choices[0].message.content}, *ASKED]
    second = await chat(moved, history)
    assert second.headers["x-clawloop-trajectory-step"] == "1"
    assert (await post(f"{moved}/complete_trajectory", {"reward": 1.0})).json()["steps"] == 2
    one, two = steps_of(after, name)
    assert two.prompt_ids[: len(one.token_ids)] == one.token_ids
    assert [(t.channel, len(t.steps), t.reward) for t in assembled(after, name)] == [(Channel.VAL, 2, 1.0)]
    late = await chat(moved, ASKED)
    assert late.headers["x-clawloop-trajectory-step"] == "2"
    assert after.pool.verify().ok


async def test_a_call_after_completion_is_served_kept_and_not_learned_from(real: Served) -> None:
    name, base = await begin(real)
    first = await chat(base, ASKED, max_tokens=4)
    assert first.headers["x-clawloop-trainable"] == "yes"
    await post(f"{base}/complete_trajectory", {"reward": 1.0})
    late = await chat(base, ASKED, max_tokens=4)
    assert late.headers["x-clawloop-trainable"] == "no (trajectory complete)"
    one, two = steps_of(real, name)
    assert (one.untrainable, two.untrainable) == ("", "trajectory complete")
    assert one.finish_reason in ("stop", "length")


async def test_completion_waits_for_a_call_that_streams(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h"], delay_s=0.02)
    name, base = await begin(served)
    async with agent(base) as sdk:
        stream = await sdk.chat.completions.create(model="default", messages=ASKED, stream=True)
        await anext(stream)
        done = asyncio.create_task(post(f"{base}/complete_trajectory", {"reward": 1.0}))
        async for _ in stream:
            pass
    assert (await done).json()["steps"] == 1
    (trajectory,) = assembled(served, name)
    assert [step.finish_reason for step in trajectory.steps] == ["stop"]


async def test_calls_side_by_side_are_numbered_as_they_came(scripted: Serve) -> None:
    served = await scripted(["a b c d e f", "x"], delay_s=0.01)
    name, base = await begin(served)
    async with agent(base) as sdk:
        slow = await sdk.chat.completions.create(model="default", messages=ASKED, stream=True)
        first = await anext(slow)
        fast = await chat(base, ASKED)
        async for _ in slow:
            pass
    assert fast.headers["x-clawloop-trajectory-step"] == "1"
    assert [step.step_id for step in steps_of(served, name)] == [first.id, fast.parse().id]


async def test_choices_of_one_call_have_numbers_of_their_own(scripted: Serve) -> None:
    served = await scripted(["a", "b", "c"])
    name, base = await begin(served)
    await chat(base, ASKED, n=2)
    assert (await chat(base, ASKED)).headers["x-clawloop-trajectory-step"] == "2"
    assert len(steps_of(served, name)) == 3


async def test_an_incognito_call_leaves_nothing(scripted: Serve) -> None:
    served = await scripted(["a"])
    name, base = await begin(served)
    hidden = await chat(base, ASKED, extra_headers={"X-Clawloop-Incognito": "1"})
    assert "x-clawloop-trajectory-step" not in hidden.headers
    assert (await post(f"{base}/complete_trajectory", {"reward": 1.0})).json()["steps"] == 0
    assert steps_of(served, name) == []


async def test_readiness_has_the_documented_names(scripted: Serve) -> None:
    served = await scripted([])
    async with client() as http:
        assert (await http.get(f"{served.base_url}/ready")).json()["status"] == "ready"
        assert (await http.get(f"{served.base_url}/health")).json() == {"status": "ok"}


async def test_ids_token_and_content_are_in_no_log_and_no_metric(
    scripted: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "clawloop_edge")
    served = await scripted(["zebra"])
    name, base = await begin(served)
    await chat(base, [{"role": "user", "content": "giraffe"}])
    await post(f"{base}/complete_trajectory", {"reward": 5})
    async with client() as http:
        page = (await http.get(url(served, "/metrics"))).text
    assert 'path="/{trajectory}/{group}/v1/chat/completions"' in page
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("clawloop"))
    for secret in (name, TOKEN, "zebra", "giraffe"):
        assert secret not in page
        assert secret not in ours


async def test_no_two_steps_of_a_trajectory_have_one_time_even_if_the_clock_goes_back(pool: Pool) -> None:
    store = TrajectoryStore(pool)
    entry = await store.create("t", minted=False, now_ms=5)
    seats = [
        store.seat(entry, group_id="", channel=Channel.TRAIN, count=1, now_ms=now_ms)
        for now_ms in (1000, 1000, 999, 1001)
    ]
    assert [(seat.index, seat.created_ms) for seat in seats] == [(0, 1000), (1, 1001), (2, 1002), (3, 1003)]
    again = await TrajectoryStore(pool).find("t")
    assert again is not None
    assert (again.row.next_index, again.row.last_ms) == (4, 1003)


async def test_a_trajectory_that_no_call_used_is_forgotten_after_a_week(pool: Pool) -> None:
    store = TrajectoryStore(pool)
    week_ms = 7 * 86_400_000
    unused = await store.create("unused", minted=True, now_ms=0)
    await asyncio.wrap_future(store.update(unused, metadata={"a": 1}, facts=Facts(group_id="g")))
    used = await store.create("used", minted=True, now_ms=0)
    store.seat(used, group_id="", channel=Channel.TRAIN, count=1, now_ms=0)
    await store.create("new", minted=True, now_ms=week_ms + 1)
    later = TrajectoryStore(pool)
    found = {name: await later.find(name) is not None for name in ("unused", "used", "new")}
    assert found == {"unused": False, "used": True, "new": True}
    assert pool.verify().ok


def test_tool_messages_get_the_id_of_the_call_at_their_place() -> None:
    calls = [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "g"}}]
    told: list[Any] = [
        {"role": "assistant", "content": "x", "tool_calls": calls},
        *({"role": "tool", "content": str(i)} for i in "12"),
    ]
    assert [message.get("tool_call_id") for message in accepted(told, "<tool_call>")] == [None, "a", "b"]
    assert accepted(told, "<tool_call>")[0] == told[0]
    raw: list[Any] = [{"role": "assistant", "content": CALL, "tool_calls": calls}, {"role": "tool", "content": "1"}]
    assert "tool_calls" not in accepted(raw, "<tool_call>")[0]


async def test_a_trajectory_whose_body_is_slow_to_come_is_not_forgotten_meanwhile(
    scripted: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_store, "_CACHED", 1)
    served = await scripted(["a", "b", "c"])
    name, base = await begin(served)
    await chat(base, ASKED)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        entered.set()
        await go_on.wait()
        yield b"}"

    completing = asyncio.create_task(served.http.post(f"{base}/complete_trajectory", data=slowly()))
    await entered.wait()
    await asyncio.sleep(0.1)  # the server has the head of the request, and waits for its end
    await begin(served)
    second = await chat(base, ASKED)
    go_on.set()
    assert (await completing).status == 200
    third = await chat(base, ASKED)
    told = [reply.headers["x-clawloop-trajectory-step"] for reply in (second, third)]
    query = "SELECT next_index, completed FROM trajectories WHERE trajectory_id = ?"
    row = served.pool.submit(lambda database: database.conn.execute(query, (name,)).fetchone()).result(10)
    assert (told, row) == (["1", "2"], (3, 1))


@pytest.mark.parametrize("when", ["remembered", "in the pool"])
async def test_a_call_that_names_no_session_does_not_get_into_a_trajectory_that_began_alike(
    scripted: Serve, when: str
) -> None:
    served = await scripted(["The same.", "More."])
    name, base = await begin(served)
    await chat(base, ASKED)
    assert len(steps_of(served, name)) == 1
    other = served if when == "remembered" else await scripted(["More."])
    told = [*ASKED, {"role": "assistant", "content": "The same."}, {"role": "user", "content": "mine alone"}]
    _, _, body = await other.post("/v1/chat/completions", {"messages": told})
    step = other.kept(body["id"]).step
    assert step.session_id != name
    assert step.parent_id == ""

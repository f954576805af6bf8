"""A request that is sent again under its key is one step, while it runs, after it, and after a restart."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from clawloop_edge.gateway.call import Call, Head, Usage
from clawloop_edge.gateway.idempotency import REPLAYED, Answered, Attempt, Retries, retry_key
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import StorageError
from clawloop_shared.records import Sampling, Step

from .conftest import Serve, Served
from .rollouts import begin, client, post, steps_of

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


async def ask(served: Served, body: Any = None, *, key: str = "k1", path: str = CHAT, **headers: str) -> httpx.Response:
    auth = {"Authorization": f"Bearer {served.token}", "Idempotency-Key": key, **headers}
    return await post(served.base_url + path, BODY if body is None else body, headers=auth)


async def running(served: Served) -> None:
    """Wait until the engine has a call."""
    async with asyncio.timeout(5):
        while not served.engine.health().in_flight:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.002)


def kept(served: Served) -> list[Step]:
    served.pool.submit(lambda database: None).result(10)
    return [found.step for name in served.pool.step_ids() if (found := served.pool.get_step(name))]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**BODY, "tools": [TOOL], "seed": 5}),
        (CHAT, {**BODY, "tools": [TOOL], "stream": True, "stream_options": {"include_usage": True}}),
        (CHAT, {**BODY, "n": 3}),
        (CHAT, {**BODY, "logprobs": True, "stop": ["m"]}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 100}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 100, "stream": True}),
        ("/v1/messages", {**BODY, "max_tokens": 100}),
        ("/v1/responses", {"model": "m", "input": "hi"}),
    ],
)
async def test_the_same_request_again_is_one_step_with_the_same_answer(
    scripted: Serve, path: str, body: dict[str, Any]
) -> None:
    served = await scripted([f"Hm.\n{CALL}"] * 4)
    first = await ask(served, body, path=path)
    assert first.status_code == 200, first.text
    again = await ask(served, body, path=path)
    assert len(kept(served)) == body.get("n", 1)
    restarted = await scripted([])
    later = await ask(restarted, body, path=path)
    assert REPLAYED not in first.headers
    for reply in (again, later):
        assert reply.headers[REPLAYED] == "1"
        for name in ("x-clawloop-step", "x-clawloop-policy", "x-clawloop-trainable", "content-type"):
            assert reply.headers[name].split(";")[0] == first.headers[name].split(";")[0]
        if not body.get("stream") and path != "/v1/responses":
            assert reply.json() == first.json()
    assert len(kept(served)) == body.get("n", 1)


async def test_a_stream_again_brings_the_same_text_calls_and_id(scripted: Serve) -> None:
    served = await scripted([f"Hm.\n{CALL}"])
    told = []
    async with AsyncOpenAI(**served.sdk, http_client=DefaultAsyncHttpxClient(verify=False)) as sdk:
        for _ in range(2):
            stream: Any = await sdk.chat.completions.create(
                **BODY, tools=[TOOL], stream=True, extra_headers={"Idempotency-Key": "k"}
            )
            chunks = [chunk async for chunk in stream]
            deltas = [chunk.choices[0].delta for chunk in chunks]
            calls = [call for delta in deltas for call in delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
            text = "".join(delta.content or "" for delta in deltas)
            told.append((chunks[0].id, text, calls[0].id, calls[0].function.arguments, reason))
    assert told[0] == told[1]
    assert told[0][1] == "Hm."


async def test_while_the_first_runs_the_others_wait_for_it(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h"], delay_s=0.02)
    replies = await asyncio.gather(*(ask(served) for _ in range(10)))
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert sorted(reply.headers.get(REPLAYED, "0") for reply in replies) == ["0", *["1"] * 9]
    assert len(kept(served)) == 1


@pytest.mark.parametrize("when", ["running", "over", "restarted"])
async def test_the_same_key_with_another_body_is_refused(scripted: Serve, when: str) -> None:
    served = await scripted(["a b c d"], delay_s=0.05 if when == "running" else 0)
    first = asyncio.create_task(ask(served))
    await (running(served) if when == "running" else first)
    if when == "restarted":
        assert len(kept(served)) == 1
    second = await scripted(["never said"]) if when == "restarted" else served
    other = await ask(second, {**BODY, "seed": 1})
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert (await first).status_code == 200


async def test_a_failed_attempt_does_not_count(scripted: Serve) -> None:
    served = await scripted([])
    assert (await ask(served)).status_code == 500
    assert kept(served) == []
    mended = await scripted(["fine"])
    reply = await ask(mended)
    assert (reply.status_code, reply.headers.get(REPLAYED)) == (200, None)


async def test_after_a_cancelled_attempt_the_retry_is_served_anew(scripted: Serve) -> None:
    served = await scripted(["a b c d e f g h i j", "fine"], delay_s=0.02)
    first = asyncio.create_task(ask(served))
    await running(served)
    second = asyncio.create_task(ask(served))
    await asyncio.sleep(0.05)
    first.cancel()
    reply = await second
    assert (reply.json()["choices"][0]["message"]["content"], reply.headers.get(REPLAYED)) == ("fine", None)
    assert (await ask(served)).json() == reply.json()
    assert [step.finish_reason for step in kept(served)] == ["cancelled", "stop"]


async def test_an_answer_of_which_one_choice_was_cancelled_answers_no_retry(scripted: Serve) -> None:
    served = await scripted(["a", "b", "c d e f g h i j k l m n o p"] * 2, delay_s=0.02)
    first = asyncio.create_task(ask(served, {**BODY, "n": 3}))
    async with asyncio.timeout(5):
        while served.engine.health().in_flight != 1:  # noqa: ASYNC110 - two of the three are over
            await asyncio.sleep(0.002)
    first.cancel()
    reply = await ask(served, {**BODY, "n": 3})
    assert REPLAYED not in reply.headers
    assert [choice["finish_reason"] for choice in reply.json()["choices"]] == ["stop"] * 3
    assert sorted(step.finish_reason for step in kept(served)) == ["cancelled", *["stop"] * 5]


async def test_a_pool_that_cannot_be_read_fails_no_call(scripted: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = await scripted(["fine"])

    def unreadable(*given: object, **more: object) -> list[str]:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(served.pool, "find_steps_by", unreadable)
    assert (await ask(served)).status_code == 200


async def test_keys_of_other_scopes_are_other_keys(scripted: Serve) -> None:
    served = await scripted(["a"] * 4)
    sessions = [await ask(served, **{"X-Clawloop-Session": name}) for name in ("one", "two")]
    urls = [(await begin(served))[1] for _ in range(2)]
    own = [await post(f"{base}/chat/completions", BODY, headers={"Idempotency-Key": "k1"}) for base in urls]
    assert len({reply.json()["id"] for reply in [*sessions, *own]}) == 4


async def test_an_incognito_call_is_joined_only_while_it_runs(scripted: Serve) -> None:
    served = await scripted(["a b c d", "e"], delay_s=0.02)
    hidden = {"X-Clawloop-Incognito": "1"}
    one, two = await asyncio.gather(ask(served, **hidden), ask(served, **hidden))
    assert one.json() == two.json()
    assert REPLAYED not in (await ask(served, **hidden)).headers
    assert kept(served) == []


@pytest.mark.parametrize("key", ["", "x" * 201, "t\tb", "ü"])
async def test_a_key_that_is_none_is_refused(scripted: Serve, key: str) -> None:
    served = await scripted([])
    headers = [(b"Authorization", f"Bearer {served.token}".encode()), (b"Idempotency-Key", key.encode())]
    async with client() as http:
        reply = await http.post(served.base_url + CHAT, json=BODY, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_header")


async def test_what_an_sdk_calls_a_retry_of_a_trajectorys_call_is_one_step(scripted: Serve) -> None:
    served = await scripted(["a", "b", "c"])
    name, base = await begin(served)

    async def attempt(count: int, body: Any = BODY) -> Any:
        reply = await post(f"{base}/chat/completions", body, headers={"x-stainless-retry-count": str(count)})
        return reply.json()["id"]

    first = await attempt(0)
    assert await attempt(1) == first
    sampled_again = await attempt(0)
    assert sampled_again != first
    assert await attempt(2) == sampled_again
    assert await attempt(1, {**BODY, "seed": 5}) not in (first, sampled_again)
    assert len(steps_of(served, name)) == 3


async def test_a_retry_in_a_trajectory_is_told_the_same_number_even_after_a_restart(scripted: Serve) -> None:
    served = await scripted(["a", "b"])
    _, base = await begin(served)
    keyed = {"headers": {"Idempotency-Key": "k"}}
    await post(f"{base}/chat/completions", BODY)
    first = await post(f"{base}/chat/completions", BODY, **keyed)
    served.pool.submit(lambda database: None).result(10)
    restarted = await scripted([])
    for address in (base, base.replace(served.base_url, restarted.base_url)):
        again = await post(f"{address}/chat/completions", BODY, **keyed)
        assert again.headers[REPLAYED] == "1"
        assert again.headers["x-clawloop-trajectory-step"] == first.headers["x-clawloop-trajectory-step"] == "1"


@pytest.mark.parametrize("count", ["\u00b2", "9" * 5000, "-1", "1.0", ""])
async def test_a_retry_count_that_is_none_is_passed_over(scripted: Serve, count: str) -> None:
    served = await scripted(["a"])
    _, base = await begin(served)
    headers = [(b"x-stainless-retry-count", count.encode())]
    async with client() as http:
        reply = await http.post(f"{base}/chat/completions", json=BODY, headers=headers)
    assert reply.status_code == 200, reply.text


async def test_what_is_answered_and_on_disk_is_not_held_in_memory(pool: Pool) -> None:
    retries = Retries(pool, clock_ms=lambda: 0)
    call = Call(messages=[], sampling=Sampling(), max_tokens=1)
    head = Head(step_id="a", created_s=0, model="m", fingerprint="f")
    answered = Answered(head=head, replies=[], usage=Usage(prompt=0, completion=0), headers={})
    for number in range(50):
        for headers in ({"Idempotency-Key": str(number)}, {"x-stainless-retry-count": "0"}):
            key = retry_key(headers, str(number).encode(), scope="a", implied=True)
            assert key is not None
            attempt = await retries.begin(key, call)
            assert isinstance(attempt, Attempt)
            written = pool.submit(lambda database: None)
            attempt.give(answered, [written])
            written.result(10)
    assert len(retries) <= 1


def test_a_key_names_its_scope_and_its_body() -> None:
    one = retry_key({"Idempotency-Key": "k"}, b"{}", scope="a")
    assert one is not None
    assert one == retry_key({"Idempotency-Key": "k"}, b"{}", scope="a")
    for other in (
        retry_key({"Idempotency-Key": "l"}, b"{}", scope="a"),
        retry_key({"Idempotency-Key": "k"}, b"{}", scope="b"),
    ):
        assert other is not None
        assert other.name != one.name
    assert retry_key({}, b"{}", scope="a") is None
    assert retry_key({"x-stainless-retry-count": "1"}, b"{}", scope="a") is None

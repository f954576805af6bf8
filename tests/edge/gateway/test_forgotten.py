"""A conversation that goes on in a forgotten session is answered and not kept, and memory holds nothing of it."""

from typing import Any

import pytest

from clawloop_edge.gateway.app import DROPPER, STATS
from clawloop_edge.gateway.idempotency import HEADER, REPLAYED

from .conftest import Serve, Served

PATH = "/v1/chat/completions"
FORGOTTEN = "no (forgotten)"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


async def ask(served: Served, *messages: Any, **headers: str) -> tuple[str, str, str]:
    """(step id, why it is trainable or not, session or nothing) of a call."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    status, replied, body = await served.post(PATH, {"messages": list(messages)}, headers=names)
    assert status == 200, body
    served.pool.submit(lambda database: None).result(10)
    kept = served.pool.get_step(body["id"])
    return body["id"], replied["x-clawloop-trainable"], kept.step.session_id if kept else ""


async def forget(served: Served, *sessions: str, drop: bool = True) -> None:
    """Forget as any process may, and have the gateway follow it."""
    session_ids = [served.id_of(name) for name in sessions]
    served.pool.submit(lambda database: served.pool.forgetting.forget(database, session_ids)).result(10)
    if drop:
        await served.app[DROPPER]()


async def test_a_conversation_without_a_name_goes_on_unkept_until_a_new_one_begins(scripted: Serve) -> None:
    served = await scripted(["one", "two", "three", "four", "five", "new"])
    _, _, session = await ask(served, user("a"))
    history = [user("a"), said("one"), user("b")]
    assert (await ask(served, *history))[2] == session
    assert served.app[STATS]().remembered_steps == 2
    await forget(served, session)
    assert served.app[STATS]().remembered_steps == 0
    for reply in ("two", "three", "four"):
        history += [said(reply), user("and then?")]
        assert (await ask(served, *history))[1:] == (FORGOTTEN, "")
    assert served.pool.stats().steps == 0
    _, trainable, fresh = await ask(served, user("something else"))
    assert trainable != FORGOTTEN
    assert fresh not in ("", session)


async def test_it_stays_forgotten_after_a_restart(scripted: Serve) -> None:
    served = await scripted(["one"])
    _, _, session = await ask(served, user("a"))
    await forget(served, session)
    again = await scripted(["two", "three"])
    assert (await ask(again, user("a"), said("one"), user("b")))[1:] == (FORGOTTEN, "")
    assert (await ask(again, user("a")))[2] != "", "what was never answered is nobody's history"


@pytest.mark.parametrize("name", ["X_Clawloop_Session", "X_Session_Affinity"])
async def test_a_named_session_goes_on_unkept_whatever_it_says(scripted: Serve, name: str) -> None:
    served = await scripted(["one", "two", "three"])
    await ask(served, user("a"), **{name: "mine"})
    await forget(served, "mine")
    assert (await ask(served, user("quite another thing"), **{name: "mine"}))[1:] == (FORGOTTEN, "")
    assert (await ask(served, user("a"), **{name: "another"}))[2] == served.id_of("another")


async def test_before_the_gateway_has_noticed_nothing_is_kept_either(scripted: Serve) -> None:
    served = await scripted(["one", "two"])
    _, _, session = await ask(served, user("a"))
    await forget(served, session, drop=False)
    assert (await ask(served, user("a"), said("one"), user("b")))[2] == ""
    assert served.pool.verify().problems == []


async def test_an_equal_conversation_that_lives_goes_on(scripted: Serve) -> None:
    served = await scripted(["hi", "hi", "more", "more"])
    await ask(served, user("hello"), X_Clawloop_Session="gone")
    await ask(served, user("hello"), X_Clawloop_Session="here")
    await forget(served, "gone")
    history = [user("hello"), said("hi"), user("go on")]
    assert (await ask(served, *history, X_Clawloop_Session="here"))[2] == served.id_of("here")
    again = await scripted(["more"])
    assert (await ask(again, *history))[2] == again.id_of("here"), "found in the pool"


async def test_a_branch_that_was_forgotten_does_not_come_back_on_one_that_lives(scripted: Serve) -> None:
    served = await scripted(["hi", "hi", "secret", "more"])
    await ask(served, user("hello"), X_Clawloop_Session="here")
    await ask(served, user("hello"), X_Clawloop_Session="gone")
    await ask(served, user("hello"), said("hi"), user("tell"), X_Clawloop_Session="gone")
    await forget(served, "gone")
    whole = [user("hello"), said("hi"), user("tell"), said("secret"), user("again")]
    assert (await ask(served, *whole))[1:] == (FORGOTTEN, "")


async def test_feedback_on_a_forgotten_step_finds_nothing(scripted: Serve) -> None:
    served = await scripted(["one"])
    step_id, _, session = await ask(served, user("a"))
    await forget(served, session)
    status, _, _ = await served.post("/v1/feedback", {"step_id": step_id, "value": 1})
    assert status == 404
    assert served.pool.stats().signals == 0


async def test_an_answer_that_was_forgotten_is_not_given_again(scripted: Serve) -> None:
    served = await scripted(["one", "two"])
    headers = {HEADER: "key-1"}
    _, _, first = await served.post(PATH, {"messages": [user("a")]}, headers=headers)
    session = served.kept(first["id"]).step.session_id
    await forget(served, session)
    _, replied, second = await served.post(PATH, {"messages": [user("a")]}, headers=headers)
    assert REPLAYED not in replied
    assert second["choices"][0]["message"]["content"] == "two"


async def test_a_forgotten_trajectory_is_unknown_and_one_that_goes_on_is_not_kept(scripted: Serve) -> None:
    served = await scripted(["a", "b", "c"])
    _, _, minted = await served.post("/init_trajectory", {})
    path = f"/{minted['trajectory_uid']}/1{PATH}"
    assert (await served.post(path, {"messages": [user("x")]}))[0] == 200
    named = f"/mine/1{PATH}"
    assert (await served.post(named, {"messages": [user("x")]}))[0] == 200
    await forget(served, minted["trajectory_uid"], "mine")
    async with served.http.post(served.base_url + path, json={"messages": [user("y")]}) as reply:
        assert reply.status == 404
    status, replied, _ = await served.post(named, {"messages": [user("y")]})
    assert (status, replied["x-clawloop-trainable"]) == (200, FORGOTTEN)
    reward = await served.post("/mine/1/v1/complete_trajectory", {"reward": 1})
    assert (reward[0], reward[2]["steps"]) == (200, 0)
    with served.pool.read() as database:
        for table in ("trajectories", "steps", "sessions"):
            assert database.table(table).count == 0
    assert served.pool.verify().problems == []


async def test_what_was_generated_and_not_submitted_goes_with_any_forgetting(real: Served) -> None:
    body = {"prompt_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2}}
    status, _, drawn = await real.post("/generate", body)
    assert status == 200
    with real.pool.read() as database:
        assert database.table("draws").count == 1
    await forget(real, "any")
    with real.pool.read() as database:
        assert database.table("draws").count == 0
        assert database.conn.execute("SELECT count(*) FROM keys WHERE scope GLOB 'loose/*'").fetchone()[0] == 0
    step = {"prompt_ids": [1, 2, 3], "response_ids": drawn["token_ids"], "trajectory_uid": "t", "step_index": 0}
    status, _, _ = await real.post("/submit_steps", {"steps": [step]})
    assert status == 200
    (kept,) = real.pool.session_steps(real.id_of("t"))
    assert kept.step.untrainable == "not sampled here"
    assert real.pool.verify().problems == []


async def test_the_engines_memory_of_prompts_goes(real: Served) -> None:
    _, _, body = await real.post(PATH, {"messages": [user("a long enough question")], "max_tokens": 2})
    assert real.engine.health().cache_bytes > 0
    await forget(real, real.kept(body["id"]).step.session_id)
    assert real.engine.health().cache_bytes == 0

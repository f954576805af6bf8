"""Requests of OpenClaw's shape: sessions, runs, kinds and trees come out right, with affinity headers and without."""

import itertools
import json
from typing import Any

import pytest

from clawloop_edge.gateway.app import STATS
from clawloop_shared.records import Step

from .conftest import Serve, Served

SESSION = "1c81d855-87ad-47af-a3eb-27ce146f0982"
SYSTEM = {
    "role": "system",
    "content": "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant.\n<!-- /openclaw:attempt:STABLE -->\n"
    "<!-- openclaw:attempt:DYNAMIC -->\nDate: 2026-11-22\n<!-- /openclaw:attempt:DYNAMIC -->",
}
CALL = '<tool_call>\n{"name": "exec", "arguments": {"command": "echo c2"}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": {"type": "object"}}}
    for name in ("exec", "read")
]
_spans = itertools.count(1)


def internal(note: str = "none") -> dict[str, Any]:
    text = f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nActive exec sessions:\n{note}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def user(text: str, *, first: bool = False, session: str = SESSION, key: str = "agent:main:c1") -> dict[str, Any]:
    runtime = f"\n\nRuntime: agent=main | session={key} | sessionId={session} | host=vm | model=gw/m | shell=bash"
    return {"role": "user", "content": f"[Sun 2026-11-22 08:28 UTC] {text}{runtime if first else ''}"}


def replayed(body: dict[str, Any]) -> dict[str, Any]:
    """A reply as OpenClaw sends it back: no text beside calls, arguments without spaces, ids of letters and digits."""
    message = body["choices"][0]["message"]
    if not message.get("tool_calls"):
        return {"role": "assistant", "content": message["content"]}
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(json.loads(call["function"]["arguments"]), separators=(",", ":"))
        function = dict(call["function"], arguments=arguments)
        calls.append(dict(call, id="".join(filter(str.isalnum, call["id"])), function=function))
    return {"role": "assistant", "content": None, "tool_calls": calls}


async def ask(served: Served, *messages: Any, run: str = "", affinity: bool = False, **fields: Any) -> tuple[Any, Step]:
    headers = {"User-Agent": "OpenAI/JS 7.15.0"}
    if run:
        headers["traceparent"] = f"00-{run}-{next(_spans):016x}-01"
    if affinity:
        headers |= {"session_id": f"{SESSION}:0", "x-session-affinity": f"{SESSION}:0"}
    body = {"model": "m", "messages": list(messages), **fields}
    status, _, reply = await served.post("/v1/chat/completions", body, headers=headers)
    assert status == 200, reply
    return reply, served.kept(reply["id"]).step


RUNS = ["a118152cf2a8aea2e346352d3f289a11", "b218152cf2a8aea2e346352d3f289a12", "c318152cf2a8aea2e346352d3f289a13"]


@pytest.mark.parametrize("affinity", [True, False])
@pytest.mark.parametrize("traced", [True, False])
async def test_two_turns_and_a_tool_loop_are_one_session_and_one_tree(
    scripted: Serve, affinity: bool, traced: bool
) -> None:
    served = await scripted(["Hello.", CALL, "Done: c2.", "Bye."])
    runs = RUNS if traced else ["", "", ""]

    async def turn(*messages: Any, run: str) -> tuple[Any, Step]:
        return await ask(served, SYSTEM, *messages, run=run, affinity=affinity, tools=TOOLS, max_tokens=100)

    history = [user("first c", first=True)]
    one, first = await turn(*history, internal(), run=runs[0])
    history += [replayed(one), user("c two")]
    two, second = await turn(*history, internal("1 running"), run=runs[1])
    assert two["choices"][0]["finish_reason"] == "tool_calls"
    answer = {"role": "tool", "content": "c2", "tool_call_id": replayed(two)["tool_calls"][0]["id"]}
    history += [replayed(two), answer]
    three, third = await turn(*history, internal("none"), run=runs[1])
    history += [replayed(three), user("bye")]
    _, fourth = await turn(*history, internal("other"), run=runs[2])

    steps = [first, second, third, fourth]
    assert {step.session_id for step in steps} == {SESSION}
    assert [step.parent_id for step in steps] == ["", first.step_id, second.step_id, third.step_id]
    assert second.run_id == third.run_id
    assert len({step.run_id for step in steps}) == 3
    if traced:
        assert [step.run_id for step in steps] == [RUNS[0], RUNS[1], RUNS[1], RUNS[2]]
    kept = [served.kept(step.step_id) for step in steps]
    assert {(k.kind, k.app) for k in kept} == {("main", "openclaw")}
    assert served.app[STATS]().spliced == {"fresh": 1, "moved": 3}
    for before, after in itertools.combinations(steps, 2):
        assert _holds(after.prompt_ids, before.response_ids)
    for step in steps:
        assert served.engine.tokenizer.encode(served.engine.tokenizer.decode(step.prompt_ids)) == step.prompt_ids
    (summary,) = served.pool.sessions()
    assert (summary.session_id, summary.steps, summary.app) == (SESSION, 4, "openclaw")


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids) - len(part) + 1))


async def test_a_title_request_is_a_side_request_of_its_own(scripted: Serve) -> None:
    served = await scripted(["Trip to Norway", "Hello."])
    system = {"role": "system", "content": "Generate a concise session title (3-6 words) from the first message."}
    _, title = await ask(served, system, {"role": "user", "content": "Plan a trip"}, max_completion_tokens=4096)
    _, main = await ask(served, SYSTEM, user("Plan a trip", first=True), internal(), tools=TOOLS)
    assert served.kept(title.step_id).kind == "title"
    assert title.session_id != main.session_id
    assert (served.kept(main.step_id).kind, main.parent_id) == ("main", "")


SUMMARY = {"role": "system", "content": "You are a context summarization assistant. Sum up."}
HEARTBEAT = user("Follow the heartbeat monitor scratch context when provided.")
SIDES: list[tuple[list[Any], list[Any], str]] = [
    ([SUMMARY, user("x")], [], "compaction"),
    ([SYSTEM, user("hi", first=True), HEARTBEAT], TOOLS, "heartbeat"),
    ([SYSTEM, user("[Subagent Context] You are running as a subagent", first=True)], TOOLS, "subagent"),
    ([SYSTEM, user("go", first=True, key="agent:main:subagent:1234")], TOOLS, "subagent"),
    ([SYSTEM, user("A background task completed. Use this result to reply.", first=True)], TOOLS, "background"),
    ([{"role": "system", "content": "Something new"}, user("hm", first=True)], [], "unknown"),
    ([SYSTEM, user("no tools allowed here", first=True)], [], "unknown"),
    ([SYSTEM, user("an ordinary turn", first=True)], TOOLS, "main"),
]


@pytest.mark.parametrize(("messages", "tools", "kind"), SIDES)
async def test_side_requests_are_told_by_content_and_are_not_learned_from(
    real: Served, messages: list[Any], tools: list[Any], kind: str
) -> None:
    body = {"messages": [*messages, internal()] if tools else messages, "max_tokens": 2}
    if tools:
        body["tools"] = tools
    _, headers, reply = await real.post("/v1/chat/completions", body)
    kept = real.kept(reply["id"])
    assert kept.kind == kind
    wanted = {"main": "yes", "unknown": "no (unknown traffic)"}.get(kind, f"no (side request: {kind})")
    assert headers["x-clawloop-trainable"] == wanted
    assert kept.step.trainable is (kind == "main")


async def test_a_retry_and_what_follows_stay_in_one_tree(scripted: Serve) -> None:
    served = await scripted(["One.", "Two.", "Three."])
    _, first = await ask(served, SYSTEM, user("start", first=True), internal(), run=RUNS[0], tools=TOOLS)
    framed = user("start", first=True)
    framed["content"] = framed["content"].replace(
        "start",
        "[Queued user message from a previous active turn; preserved as context only.]\nstart\n\n"
        "Continue the current task from the existing transcript, preserving completed work. Do not restart.",
    )
    retry, second = await ask(served, SYSTEM, framed, internal(), run=RUNS[0], tools=TOOLS)
    messages = [SYSTEM, user("start", first=True), replayed(retry), user("more"), internal()]
    _, third = await ask(served, *messages, run=RUNS[1], tools=TOOLS)
    assert first.run_id == second.run_id
    assert second.parent_id == first.step_id
    assert third.parent_id == second.step_id
    assert len({step.session_id for step in (first, second, third)}) == 1


async def test_after_a_compaction_the_session_goes_on_from_its_last_step(scripted: Serve) -> None:
    served = await scripted(["One.", "Two.", "Three."])
    one, first = await ask(served, SYSTEM, user("start", first=True), internal(), run=RUNS[0], tools=TOOLS)
    runtime = user("", first=True)["content"].split("\n\n")[1]
    texts = ["The conversation history before this point was compacted", runtime]
    summary: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
    two, second = await ask(served, SYSTEM, summary, user("go on"), internal(), run=RUNS[1], tools=TOOLS)
    merged = {"role": "user", "content": [*summary["content"], {"type": "text", "text": "go on"}]}
    _, third = await ask(served, SYSTEM, merged, replayed(two), user("more"), internal(), run=RUNS[2], tools=TOOLS)
    assert [step.session_id for step in (first, second, third)] == [SESSION] * 3
    assert [second.parent_id, third.parent_id] == [first.step_id, second.step_id]
    assert one["choices"][0]["message"]["content"] == "One."


async def test_a_tool_loop_survives_a_restart_of_the_gateway(scripted: Serve) -> None:
    before = await scripted([CALL])
    one, first = await ask(before, SYSTEM, user("go", first=True), internal("a"), tools=TOOLS)
    after = await scripted(["Done."])
    answer = {"role": "tool", "content": "c2", "tool_call_id": replayed(one)["tool_calls"][0]["id"]}
    messages = [SYSTEM, user("go", first=True), replayed(one), answer, internal("b")]
    _, second = await ask(after, *messages, tools=TOOLS)
    assert (second.parent_id, second.run_id) == (first.step_id, first.run_id)
    assert _holds(second.prompt_ids, first.response_ids)
    assert json.loads(replayed(one)["tool_calls"][0]["function"]["arguments"]) == {"command": "echo c2"}

"""Requests recorded from OpenClaw 2026.9.6 on its three APIs: session, run, kind and tree come out right.

`captures/` holds them with long texts cut and tools by name. The gateway's own converters are tested elsewhere.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.sessions import tree
from clawloop_edge.sessions.classify import Kind, Traffic, classify
from clawloop_edge.sessions.identity import identify
from clawloop_edge.sessions.memory import StepMemory
from clawloop_edge.sessions.tracker import Link, Placement, Tracker
from clawloop_shared.records import Policy, Sampling, Step

Json = dict[str, Any]
CAPTURES = {path.stem: json.loads(path.read_text()) for path in Path(__file__).with_name("captures").glob("*.json")}
FAILED = {"10-retry-first"}
"""calls that got no answer"""


def messages_of(body: Json) -> list[Json]:
    """The request's messages in the form of chat completions."""
    if "input" in body:
        return [message for item in body["input"] for message in _of_item(item)]
    if "system" in body:
        return [
            {"role": "system", "content": body["system"]},
            *(m for raw in body["messages"] for m in _of_blocks(raw)),
        ]
    found: list[Json] = body["messages"]
    return found


def _of_item(item: Json) -> list[Json]:
    match item["type"]:
        case "message":
            return [{"role": item["role"], "content": item["content"]}]
        case "function_call":
            return [_call(item["call_id"], item["name"], item["arguments"])]
        case "function_call_output":
            return [{"role": "tool", "content": item["output"]}]
    return []


def _of_blocks(raw: Json) -> list[Json]:
    if isinstance(raw["content"], str):
        return [raw]
    found = [{"role": "tool", "content": b["content"]} for b in raw["content"] if b["type"] == "tool_result"]
    found += [_call(b["id"], b["name"], json.dumps(b["input"])) for b in raw["content"] if b["type"] == "tool_use"]
    texts = [b for b in raw["content"] if b["type"] == "text"]
    return [*found, {"role": raw["role"], "content": texts}] if texts else found


def _call(call_id: str, name: str, arguments: str) -> Json:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "function": function}]}


def told(name: str) -> tuple[list[Json], Traffic]:
    capture = CAPTURES[name]
    messages = messages_of(capture["body"])
    agent = capture["headers"].get("user-agent", "")
    return messages, classify(messages, tools=bool(capture["body"].get("tools")), user_agent=agent)


async def placed(tracker: Tracker, name: str) -> Placement:
    messages, traffic = told(name)
    key = CAPTURES[name]["body"].get("prompt_cache_key", "")
    identity = identify(CAPTURES[name]["headers"], prompt_cache_key=key, runtime=traffic.runtime)
    return await tracker.place(messages, identity=identity, traffic=traffic)


def answered(name: str, number: int) -> Json:
    """What the model said to a capture: the first assistant message that a later one of its session has more."""
    mine = [m for m in told(name)[0] if m["role"] == "assistant"]
    later = sorted(
        (other for other in CAPTURES if CAPTURES[other]["seq"] > CAPTURES[name]["seq"]),
        key=lambda other: int(CAPTURES[other]["seq"]),
    )
    for other in later:
        theirs = [m for m in told(other)[0] if m["role"] == "assistant"]
        same = SESSIONS.get(other) == SESSIONS.get(name) and [*map(_said, theirs[: len(mine)])] == [*map(_said, mine)]
        if same and len(theirs) > len(mine):
            return theirs[len(mine)]
    return {"role": "assistant", "content": f"answer {number}"}


def _said(message: Json) -> bytes:
    return tree.reply_hash(b"", message)


def new_tracker() -> Tracker:
    memory = StepMemory(max_entries=100, max_bytes=1 << 20)
    return Tracker(memory, find_kept=lambda chain, session: None, decode=lambda ids: "")


def keep(tracker: Tracker, place: Placement, *, name: str, number: int) -> None:
    step = Step(
        step_id=name,
        session_id=place.session_id,
        run_id=place.run_id,
        parent_id=place.parent_id,
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.1],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=number,
    )
    tracker.remember(place, step, reply=answered(name, number), prompt_text="p", text="r")


S01, S02, S03 = (
    "689902cf-84c5-43f0-a682-9ead3b62e882",
    "1c81d855-87ad-47af-a3eb-27ce146f0982",
    "39c40423-8beb-4611-870b-872fc6df2021",
)
S04, S05, S06 = (
    "8ab2f4c9-8f69-4c5e-9002-5cf2303e57bc",
    "0ff06c96-3aed-4c8a-8b8f-64a47518987f",
    "e1e1c412-ca07-4f78-bad8-3522583961fe",
)
S10, S11 = "6dd8b43b-d967-419b-ba49-8eb7a3691b3f", "60cb1566-8219-446b-9e3d-903fbc175bcd"
S18, S20 = "ebd0a9e3-91ba-4cfa-8aec-0b28dd6e05fd", "abd51852-490d-4586-8b32-46dc55497cd2"
OWN = ""
"""a session that no other request belongs to"""
# name: session, kind, parent, link
EXPECTED: dict[str, tuple[str, Kind, str, Link]] = {
    "01-chat-first-turn-local": (S01, Kind.MAIN, "", Link.NONE),
    "02-chat-affinity-compat-1": (S02, Kind.MAIN, "", Link.NONE),
    "02-chat-affinity-compat-2": (S02, Kind.MAIN, "02-chat-affinity-compat-1", Link.CHAIN),
    "02-chat-affinity-compat-3": (S02, Kind.MAIN, "02-chat-affinity-compat-2", Link.CHAIN),
    "03-chat-reasoning-replay-1": (S03, Kind.MAIN, "", Link.NONE),
    "03-chat-reasoning-replay-2": (S03, Kind.MAIN, "03-chat-reasoning-replay-1", Link.CHAIN),
    "03-chat-reasoning-replay-3": (S03, Kind.MAIN, "03-chat-reasoning-replay-2", Link.CHAIN),
    "03-chat-reasoning-replay-4": (S03, Kind.MAIN, "03-chat-reasoning-replay-3", Link.CHAIN),
    "04-chat-thinkingFormat-deepseek-1": (S04, Kind.MAIN, "", Link.NONE),
    "04-chat-thinkingFormat-deepseek-2": (S04, Kind.MAIN, "04-chat-thinkingFormat-deepseek-1", Link.CHAIN),
    "04-chat-thinkingFormat-deepseek-3": (S04, Kind.MAIN, "04-chat-thinkingFormat-deepseek-2", Link.CHAIN),
    "05-responses-1": (S05, Kind.MAIN, "", Link.NONE),
    "05-responses-2": (S05, Kind.MAIN, "05-responses-1", Link.CHAIN),
    "05-responses-3": (S05, Kind.MAIN, "05-responses-2", Link.CHAIN),
    "06-anthropic-1": (S06, Kind.MAIN, "", Link.NONE),
    "06-anthropic-2": (S06, Kind.MAIN, "06-anthropic-1", Link.CHAIN),
    "06-anthropic-3": (S06, Kind.MAIN, "06-anthropic-2", Link.CHAIN),
    "10-retry-first": (S10, Kind.MAIN, "", Link.NONE),
    "10-retry-second": (S10, Kind.MAIN, "", Link.NONE),
    "11-after-timeout-retry": (S11, Kind.MAIN, "", Link.NONE),
    "14-title-request": (OWN, Kind.TITLE, "", Link.NONE),
    "18-dashboard-turn": (S18, Kind.MAIN, "", Link.NONE),
    "12-heartbeat-with-reaction-event": (S18, Kind.HEARTBEAT, "18-dashboard-turn", Link.CHAIN),
    "13-after-heartbeat": (S18, Kind.MAIN, "12-heartbeat-with-reaction-event", Link.CHAIN),
    "15-compaction-request": (OWN, Kind.COMPACTION, "", Link.NONE),
    "16-after-compaction": (S18, Kind.MAIN, "13-after-heartbeat", Link.SESSION),
    "17-next-after-compaction": (S18, Kind.MAIN, "16-after-compaction", Link.CHAIN),
    "20-plugin-headers": (S20, Kind.MAIN, "", Link.NONE),
}
SESSIONS = {name: expected[0] or name for name, expected in EXPECTED.items()}
RUN = {name: CAPTURES[name]["headers"].get("traceparent", "-").split("-")[1] for name in CAPTURES}


def test_every_capture_has_its_expectation() -> None:
    assert EXPECTED.keys() == CAPTURES.keys()


async def walk(change: Callable[[str, int], bool]) -> dict[str, Placement]:
    """Place all captures in the order in which they were recorded; those that `change` tells so are remembered."""
    tracker, found = new_tracker(), {}
    for number, name in enumerate(sorted(CAPTURES, key=lambda name: int(CAPTURES[name]["seq"]))):
        found[name] = await placed(tracker, name)
        if change(name, number):
            keep(tracker, found[name], name=name, number=number)
    return found


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_capture_lands_in_its_session_run_and_tree(name: str) -> None:
    found = await walk(lambda name, number: name not in FAILED)
    place, (session_id, kind, parent, link) = found[name], EXPECTED[name]
    assert (place.kind, place.app) == (kind, "openclaw")
    assert (place.parent_id, place.link) == (parent, link)
    if session_id == OWN:
        assert [other for other in found if found[other].session_id == place.session_id] == [name]
    else:
        assert place.session_id == session_id
    assert place.run_id == RUN[name] or not RUN[name]
    assert not place.incognito


async def test_each_session_is_one_tree() -> None:
    found = await walk(lambda name, number: name not in FAILED)
    for session_id, names in itertools.groupby(sorted(EXPECTED, key=SESSIONS.__getitem__), SESSIONS.__getitem__):
        kept = [name for name in names if name not in FAILED]
        roots = [name for name in kept if not found[name].parent_id]
        assert len(roots) == 1, session_id
        assert {found[name].parent_id for name in kept} - {""} <= set(kept)


async def test_an_attempt_whose_answer_was_cut_and_its_retry_are_one_run_and_one_tree() -> None:
    found = await walk(lambda name, number: True)
    first, second = found["10-retry-first"], found["10-retry-second"]
    assert (second.session_id, second.run_id) == (first.session_id, first.run_id)
    assert (second.parent_id, second.link) == ("10-retry-first", Link.SESSION)
    assert second.chain == first.chain, "the rewritten text is the same conversation"


async def test_what_was_interrupted_goes_on_from_the_text_that_was_typed() -> None:
    tracker = new_tracker()
    place = await placed(tracker, "11-after-timeout-retry")
    typed = {"role": "user", "content": "H [[hang 25 1]]"}
    assert place.chain == tree.chain(tree.turns_of([typed]))[-1]


async def test_a_reset_begins_a_new_branch_of_its_session() -> None:
    tracker = new_tracker()
    names = [f"02-chat-affinity-compat-{n}" for n in (1, 2, 3)]
    for number, name in enumerate(names):
        keep(tracker, await placed(tracker, name), name=name, number=number)
    messages, traffic = told(names[0])
    headers = {"session_id": f"{S02}:1"}
    fresh = [messages[0], {"role": "user", "content": "another thing"}, messages[2]]
    place = await tracker.place(fresh, identity=identify(headers), traffic=traffic)
    assert (place.session_id, place.parent_id, place.link) == (S02, names[2], Link.SESSION)
    assert place.run_id not in RUN.values()

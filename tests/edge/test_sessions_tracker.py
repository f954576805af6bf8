"""The tracker with a real pool: restarts, traces through several conversations, what is incognito, and any order."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.sessions.classify import Kind, Traffic
from clawloop_edge.sessions.identity import Identity
from clawloop_edge.sessions.kept import KeptSteps
from clawloop_edge.sessions.memory import StepMemory
from clawloop_edge.sessions.tracker import REPLY_INDEX, Link, Placement, Tracker
from clawloop_shared.records import Policy, Sampling, Step

Json = dict[str, Any]
MAIN = Traffic(Kind.MAIN, "app")
COMPACTION = Traffic(Kind.COMPACTION, "openclaw")
TRACE, OTHER = "0af7651916cd43dd8448eb211c80319c", "1af7651916cd43dd8448eb211c80319d"
SYSTEM = {"role": "system", "content": "be good"}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str, *, call: str = "") -> Json:
    if not call:
        return {"role": "assistant", "content": text}
    function = {"name": "look", "arguments": "{}"}
    return {"role": "assistant", "content": text, "tool_calls": [{"id": call, "function": function}]}


class Edge:
    """A tracker before a pool, and what a gateway does with the two."""

    def __init__(self, pool: Pool | None) -> None:
        self.pool = pool
        self.steps = itertools.count()
        self.restart()

    def restart(self) -> None:
        memory = StepMemory(max_entries=1000, max_bytes=1 << 24)
        if self.pool is None:
            self.tracker = Tracker(memory, find_kept=lambda chain, session: None, decode=str)
            return
        kept = KeptSteps(self.pool)
        self.tracker = Tracker(
            memory,
            find_kept=kept.by_reply,
            find_last=kept.last_main,
            find_run=kept.of_run,
            decode=lambda ids: "".join(map(chr, ids)),
        )

    async def place(self, *messages: Json, traffic: Traffic = MAIN, peek: bool = False, **names: Any) -> Placement:
        return await self.tracker.place(messages, identity=Identity(**names), traffic=traffic, peek=peek)

    async def call(self, *messages: Json, reply: Json, traffic: Traffic = MAIN, **names: Any) -> tuple[str, Placement]:
        """A call that is answered and kept; the step's id and where it was put."""
        placed = await self.place(*messages, traffic=traffic, **names)
        return self.keep(placed, messages, reply=reply), placed

    def keep(self, placed: Placement, messages: tuple[Json, ...], *, reply: Json) -> str:
        step_id = f"step-{next(self.steps):04}"
        text = reply["content"] or "x"
        step = Step(
            step_id=step_id,
            session_id=placed.session_id,
            run_id=placed.run_id,
            parent_id=placed.parent_id,
            prompt_ids=[ord("p")],
            response_ids=list(map(ord, text)),
            response_logprobs=[-0.1] * len(text),
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=1,
        )
        chain = self.tracker.remember(placed, step, reply=reply, prompt_text="p", text=text)
        if self.pool is not None:
            kept = KeptStep(
                step=step,
                messages=list(messages),
                reply=reply,
                kind=placed.kind.value,
                started_ms=1,
                finished_ms=2,
            )
            self.pool.keep_step(kept, index={REPLY_INDEX: chain}).result(10)
        return step_id


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.open(tmp_path / "pool", KnownKey.of(os.urandom(32)), writer=True) as opened:
        yield opened


@pytest.fixture
def edge(pool: Pool) -> Edge:
    return Edge(pool)


# Restarts


async def test_a_traces_next_call_lands_in_its_session_after_a_restart(edge: Edge) -> None:
    first, placed = await edge.call(SYSTEM, user("go"), reply=said("", call="call1"), trace_id=TRACE)
    edge.restart()
    history = [SYSTEM, user("go"), said("", call="call1"), {"role": "tool", "content": "ok"}]
    _, again = await edge.call(*history, reply=said("done"), trace_id=TRACE)
    assert (again.session_id, again.run_id, again.parent_id) == (placed.session_id, TRACE, first)
    assert again.link is Link.CHAIN


async def test_a_retry_without_history_finds_its_session_after_a_restart(edge: Edge) -> None:
    first, placed = await edge.call(SYSTEM, user("go"), reply=said("cut"), trace_id=TRACE)
    edge.restart()
    retry = await edge.place(SYSTEM, user("go"), trace_id=TRACE)
    assert (retry.session_id, retry.parent_id, retry.link) == (placed.session_id, first, Link.SESSION)
    other = await edge.place(SYSTEM, user("something else"), trace_id=TRACE)
    assert (other.session_id != placed.session_id, other.parent_id) == (True, "")


async def test_after_a_restart_a_rewritten_history_hangs_on_the_sessions_last_main_step(edge: Edge) -> None:
    _, placed = await edge.call(user("one"), reply=said("1"), session_id="s")
    last, _ = await edge.call(user("one"), said("1"), user("two"), reply=said("2"), session_id="s")
    await edge.call(user("sum up"), reply=said("short"), traffic=COMPACTION, session_id="s")
    await edge.call(user("one"), reply=said("not mine"), session_id="other")
    edge.restart()
    summary = user("The conversation history before this point was compacted into the following summary: x")
    found = await edge.place(summary, said("9"), user("three"), session_id="s")
    assert (found.parent_id, found.link, found.session_id) == (last, Link.SESSION, "s")
    assert found.parent is not None
    assert found.parent.sampled.text == "p2"
    assert found.run_id != placed.run_id


async def test_a_pool_that_fails_fails_no_call(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise PoolError("secret words")

    def wrong(*_: Any) -> Any:
        return 1 / 0

    memory = StepMemory(max_entries=9, max_bytes=1 << 20)
    for error in (broken, wrong):
        tracker = Tracker(memory, find_kept=error, find_last=error, find_run=error, decode=str)
        identity = Identity(session_id="s", trace_id=TRACE)
        placed = await tracker.place([user("a"), said("b"), user("c")], identity=identity, traffic=MAIN)
        assert (placed.session_id, placed.run_id, placed.parent) == ("s", TRACE, None)
    assert len(caplog.records) == 2
    assert "secret" not in caplog.text


async def test_what_memory_knows_is_not_asked_of_the_pool(pool: Pool) -> None:
    edge = Edge(pool)
    await edge.call(user("go"), reply=said("1"), session_id="s")
    pool.close()
    found = await edge.place(user("go"), said("1"), user("more"), session_id="s")
    fallback = await edge.place(user("new"), session_id="s")
    assert (found.link, fallback.link) == (Link.CHAIN, Link.SESSION)


# Several conversations at once


async def test_equal_conversations_of_two_sessions_stay_apart(edge: Edge) -> None:
    ones = [(await edge.call(user("hi"), reply=said("hello"), session_id=name))[0] for name in "ab"]
    twos = [
        (await edge.call(user("hi"), said("hello"), user("more"), reply=said("ok"), session_id=name))[1]
        for name in "ab"
    ]
    assert [placed.parent_id for placed in twos] == ones
    edge.restart()
    history = [user("hi"), said("hello"), user("more"), said("ok"), user("end")]
    for name, one in zip("ba", reversed(ones), strict=True):
        found = await edge.place(*history, session_id=name)
        assert found.session_id == name
        assert found.parent is not None
        assert edge.pool is not None
        step = edge.pool.get_step(found.parent.step_id)
        assert step is not None
        assert step.step.parent_id == one


@pytest.mark.parametrize("restarted", [False, True])
async def test_two_sub_agents_of_one_trace_are_two_sessions(edge: Edge, restarted: bool) -> None:
    tasks = ["find the cat", "find the dog"]
    first = [await edge.call(SYSTEM, user(t), reply=said("", call=f"c{t[-3:]}"), trace_id=TRACE) for t in tasks]
    assert first[0][1].session_id != first[1][1].session_id
    if restarted:
        edge.restart()
    for task, (step_id, placed) in zip(tasks, first, strict=True):
        history = [SYSTEM, user(task), said("", call=f"c{task[-3:]}"), {"role": "tool", "content": "there"}]
        found = await edge.place(*history, trace_id=TRACE)
        assert (found.session_id, found.parent_id) == (placed.session_id, step_id)
        assert found.run_id == placed.run_id == TRACE
        retried = await edge.place(SYSTEM, user(task), trace_id=TRACE)
        assert retried.session_id == placed.session_id


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_trace_chooses_among_conversations_that_are_equal_word_for_word(edge: Edge, restarted: bool) -> None:
    steps = {trace: await edge.call(user("hi"), reply=said("hello"), trace_id=trace) for trace in (TRACE, OTHER)}
    if restarted:
        edge.restart()
    for trace, (step_id, placed) in steps.items():
        found = await edge.place(user("hi"), said("hello"), user("more"), trace_id=trace)
        assert (found.session_id, found.parent_id) == (placed.session_id, step_id)


async def test_a_request_about_a_conversation_is_of_the_traces_only_session(edge: Edge) -> None:
    _, placed = await edge.call(user("go"), reply=said("1"), trace_id=TRACE)
    about = await edge.place(user("<conversation>go</conversation>"), traffic=COMPACTION, trace_id=TRACE)
    assert about.session_id == placed.session_id
    await edge.call(user("another"), reply=said("1"), trace_id=TRACE)
    unclear = await edge.place(user("<conversation>go</conversation>"), traffic=COMPACTION, trace_id=TRACE)
    assert unclear.session_id != placed.session_id


async def test_a_tool_call_is_known_where_its_history_was_rewritten(edge: Edge) -> None:
    step_id, placed = await edge.call(user("go"), reply=said("", call="call1"))
    tool = {"role": "tool", "content": "ok"}
    found = await edge.place(user("summary of go"), said("", call="call1"), tool)
    assert (found.session_id, found.parent_id, found.link) == (placed.session_id, step_id, Link.CALL)
    assert (found.reply_index, found.run_id) == (1, placed.run_id)


async def test_a_call_that_is_only_counted_leaves_no_trace(edge: Edge) -> None:
    one, _ = await edge.call(user("hi"), reply=said("hello"))
    two, _ = await edge.call(user("hi"), reply=said("hello"))
    history = [user("hi"), said("hello"), user("more")]
    assert [(await edge.place(*history, peek=True)).parent_id for _ in range(2)] == [two, two]
    hidden = await edge.place(*history, peek=True, incognito=True, trace_id=TRACE)
    assert hidden.incognito
    assert [(await edge.place(*history)).parent_id for _ in range(2)] == [two, one]
    assert not (await edge.place(*history)).incognito


# Incognito


async def test_what_continues_an_incognito_call_is_incognito_too(edge: Edge) -> None:
    before, _ = await edge.call(user("one"), reply=said("1"), session_id="s")
    secret = [user("one"), said("1"), user("secret")]
    hidden = await edge.place(*secret, session_id="s", incognito=True)
    assert hidden.incognito
    for later in ([], [said("psst"), user("more")], [said("psst"), user("more"), said("so"), user("end")]):
        placed = await edge.place(*secret, *later, session_id="s")
        assert (placed.incognito, placed.parent_id) == (True, before)
    fork = await edge.place(user("one"), said("1"), user("in the open"), session_id="s")
    assert not fork.incognito
    assert not (await edge.place(user("secret"), session_id="t")).incognito


async def test_an_incognito_message_without_an_answer_stays_hidden_when_it_is_merged(edge: Edge) -> None:
    await edge.place(user("one"), user("secret"), incognito=True)
    merged = {"role": "user", "content": [{"type": "text", "text": text} for text in ("one", "secret", "more")]}
    assert (await edge.place(merged)).incognito
    assert (await edge.place(user("one"), user("secret"), user("more"), said("x"), user("y"))).incognito
    assert not (await edge.place(user("one"), user("more"))).incognito


async def test_a_session_with_something_hidden_tells_no_summary_of_it(edge: Edge) -> None:
    await edge.call(user("one"), reply=said("1"), session_id="s")
    await edge.place(user("one"), said("1"), user("secret"), session_id="s", incognito=True)
    about = await edge.place(user("<conversation>secret</conversation>"), traffic=COMPACTION, session_id="s")
    after = await edge.place(user("summary: secret"), user("go on"), session_id="s")
    later = await edge.place(user("summary: secret"), user("go on"), said("2"), user("and"), session_id="s")
    assert (about.incognito, after.incognito, later.incognito) == (True, True, True)


async def test_a_request_about_an_incognito_turn_is_known_by_its_trace(edge: Edge) -> None:
    await edge.place(user("secret"), trace_id=TRACE, incognito=True)
    about = user("<conversation>secret</conversation>")
    assert not (await edge.place(about, traffic=COMPACTION, trace_id=OTHER)).incognito
    assert (await edge.place(about, traffic=COMPACTION, trace_id=TRACE)).incognito


# Any order


class Conversation:
    """One agent's view: its history, and the names it sends."""

    def __init__(self, names: dict[str, Any], first: str) -> None:
        self.names, self.history = names, [user(first)]


names = st.sampled_from([{}, {"session_id": "s"}, {"session_id": "t"}, {"trace_id": TRACE}, {"trace_id": OTHER}])
words = st.sampled_from(["a", "b"])
moves = st.tuples(st.sampled_from(["turn", "tool", "retry", "fork", "cut"]), st.integers(0, 3), words, words)


@given(st.lists(st.tuples(names, words), min_size=4, max_size=4), st.lists(moves, min_size=1, max_size=25))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_no_order_of_calls_links_a_step_to_one_whose_conversation_it_does_not_continue(
    begun: list[tuple[dict[str, Any], str]], order: list[tuple[str, int, str, str]]
) -> None:
    edge = Edge(None)
    talks = [Conversation(*start) for start in begun]
    done: dict[str, tuple[list[Json], Placement]] = {}
    for number, (move, which, word, answer) in enumerate(order):
        talk = talks[which]
        if move == "fork":
            talk.history = [*talk.history[: 2 * (len(talk.history) // 4)], user(word)]
        elif move == "cut":
            talk.history = [user(f"summary {word}"), *talk.history[-2:]]
        reply = said(answer, call=f"call{number}" if move == "tool" else "")
        step_id, placed = await edge.call(*talk.history, reply=reply, **talk.names)
        check(placed, talk, done)
        done[step_id] = ([*talk.history, reply], placed)
        if move != "retry":
            follows = {"role": "tool", "content": word} if move == "tool" else user(word)
            talk.history = [*talk.history, reply, follows]


def check(placed: Placement, talk: Conversation, done: dict[str, tuple[list[Json], Placement]]) -> None:
    if "session_id" in talk.names:
        assert placed.session_id == talk.names["session_id"]
    if placed.parent is None:
        assert placed.link is Link.NONE
        return
    before, of = done[placed.parent_id]
    assert of.session_id == placed.session_id
    if placed.link is Link.CHAIN:
        assert form(before) == form(talk.history[: placed.reply_index + 1])
    elif placed.link is Link.CALL:
        assert before[-1]["tool_calls"][0]["id"] == talk.history[placed.reply_index]["tool_calls"][0]["id"]
    else:
        assert (placed.link, placed.reply_index) == (Link.SESSION, -1)


def form(messages: list[Json]) -> list[tuple[str, str, bool]]:
    """Messages as the property sees them: equal users in a row are told apart by their number of lines."""
    joined: list[tuple[str, str, bool]] = []
    for message in messages:
        here = (message["role"], message["content"], bool(message.get("tool_calls")))
        if joined and here[0] == joined[-1][0] == "user":
            here = ("user", f"{joined.pop()[1]}\n{here[1]}", False)
        joined.append(here)
    return joined


# Speed

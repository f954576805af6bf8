"""The pure middle of sessions: normal form, chains, splicing, names, memory."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.errors import RequestError
from clawloop_edge.sessions import openclaw, tree
from clawloop_edge.sessions.classify import Kind, classify
from clawloop_edge.sessions.identity import identify, trace_id
from clawloop_edge.sessions.memory import Known, StepMemory, known_ids
from clawloop_edge.sessions.splice import How, Sampled, common_length, splice
from clawloop_shared.records import Channel

TRACE = "0af7651916cd43dd8448eb211c80319c"
RUNTIME = "Runtime: agent=main | session=agent:main:s1 | sessionId=1c81d855-87ad-47af-a3eb-27ce146f0982 | host=vm"


def call(arguments: str, *, call_id: str = "call_1") -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def last_hash(*messages: dict[str, Any]) -> bytes:
    return tree.chain(tree.turns_of(messages))[-1]


USER = {"role": "user", "content": "hello"}
SAME: list[tuple[Any, Any]] = [
    (USER, {"role": "user", "content": [{"type": "text", "text": "hello"}]}),
    (USER, {"role": "user", "content": f"[Sun 2026-11-22 08:19 UTC] hello\n\n{RUNTIME}"}),
    (USER, {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": RUNTIME}]}),
    ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": " a\n", "refusal": None}),
    ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "<think>b</think>a"}),
    (call('{"a": 1, "b": 2}'), call('{"b":2,"a":1}', call_id="call9")),
    (call('{"a": 1}'), dict(call('{"a": 1}'), content="")),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_messages_that_clients_rewrite_are_the_same(one: Any, other: Any) -> None:
    assert last_hash(one) == last_hash(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (USER, {"role": "assistant", "content": "hello"}),
        (USER, {"role": "user", "content": "hello!"}),
        (call('{"a": 1}'), call('{"a": 2}')),
        (call('{"a": 1}'), call("{broken")),
        ({"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}),
    ],
)
def test_messages_that_say_something_else_are_not_the_same(one: Any, other: Any) -> None:
    assert last_hash(one) != last_hash(other)


def test_system_prompts_and_ephemeral_context_are_left_out_and_user_messages_joined() -> None:
    ephemeral = {"role": "user", "content": f"{openclaw.INTERNAL_CONTEXT}\nx"}
    system = {"role": "system", "content": "be good"}
    joined = {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "again"}]}
    again = {"role": "user", "content": "[Sun 2026-11-22 08:19 UTC] again"}
    assert last_hash(system, USER, again, ephemeral) == last_hash(joined)
    turns = tree.turns_of([system, USER, ephemeral, {"role": "assistant", "content": "ok"}])
    assert [(turn.role, turn.index) for turn in turns] == [("user", 1), ("assistant", 3)]


def test_a_reply_is_found_again_by_the_chain_of_the_next_request() -> None:
    prompt = tree.chain(tree.turns_of([USER]))[-1]
    reply = call('{"word": "rain"}')
    following = tree.chain(tree.turns_of([USER, reply, {"role": "tool", "content": "wet"}]))
    assert tree.reply_hash(prompt, reply) == following[1]


def test_names_come_in_order() -> None:
    headers = {"X-Clawloop-Session": "mine", "session_id": "abc:3"}
    assert identify(headers, prompt_cache_key="k:1", runtime=RUNTIME).session_id == "mine"
    assert identify({"session_id": "abc:3"}, prompt_cache_key="k:1", runtime=RUNTIME).session_id == "abc"
    assert identify({"x-session-affinity": "abc:0"}).session_id == "abc"
    assert identify({}, prompt_cache_key="k:1", runtime=RUNTIME).session_id == "k"
    assert identify({}, runtime=RUNTIME).session_id == "1c81d855-87ad-47af-a3eb-27ce146f0982"
    assert identify({}).session_id == ""


def test_own_headers_are_checked_and_default() -> None:
    assert identify({}).channel is Channel.TRAIN
    assert identify({"X-Clawloop-Channel": "val", "X-Clawloop-Incognito": "1"}).incognito
    for headers in ({"X-Clawloop-Session": "\x00"}, {"X-Clawloop-Channel": "x"}, {"X-Clawloop-Incognito": "2"}):
        with pytest.raises(RequestError):
            identify(headers)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"01-{TRACE}-b7ad6b7169203331-01-more", TRACE),
        (f"ff-{TRACE}-b7ad6b7169203331-01", ""),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", ""),
        ("", ""),
    ],
)
def test_trace_ids_follow_the_w3c_form(header: str, wanted: str) -> None:
    assert trace_id(header) == wanted


def test_plain_agents_have_a_main_line_and_the_name_of_their_library() -> None:
    traffic = classify([USER], tools=False, user_agent="AsyncOpenAI/Python 3.54.0")
    assert (traffic.kind, traffic.app) == (Kind.MAIN, "asyncopenai/python")
    assert classify([USER], tools=False).app == "unknown"


class LetterCodec:
    """One id a character, but `ab` is one id, so that encoding again differs from what was sampled."""

    eos_ids = frozenset({ord("|")})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for letter in text:
            if letter == "b" and ids and ids[-1] == ord("a"):
                ids[-1] = 1000
            else:
                ids.append(ord(letter))
        return ids

    def decode(self, ids: Any) -> str:
        return "".join("ab" if i == 1000 else chr(i) for i in ids)


CODEC = LetterCodec()


def sampled(prompt: str, reply_ids: list[int]) -> Sampled:
    ids = CODEC.encode(prompt)
    return Sampled(prompt + CODEC.decode(reply_ids), ids + reply_ids, len(prompt), len(ids))


REPLY = [ord("a"), ord("b"), ord("|")]


def test_a_prompt_that_starts_with_its_parent_keeps_the_parents_ids() -> None:
    parent = sampled("q|", REPLY)
    found = splice("q|ab|ab", CODEC, parent=parent)
    assert found.ids == [ord("q"), ord("|"), *REPLY, 1000]
    assert (found.how, found.reused) == (How.PREFIX, 5)


def test_a_reply_behind_a_message_that_moved_keeps_its_ids() -> None:
    parent = sampled("s|u|old|", REPLY)
    text = "s|u|ab|tab|new|"
    found = splice(text, CODEC, parent=parent, reply_at=lambda: 4)
    assert found.how is How.MOVED
    assert CODEC.decode(found.ids) == text
    assert found.ids[4:7] == REPLY
    assert found.reused == 7
    assert found.ids[8] == 1000


def test_a_rewritten_history_is_encoded_again() -> None:
    parent = sampled("q|", REPLY)
    assert splice("other|", CODEC, parent=parent).how is How.ENCODED
    assert splice("q|xx|", CODEC, parent=parent, reply_at=lambda: 2).how is How.ENCODED
    assert splice("q|", CODEC).how is How.FRESH


pieces = st.lists(st.text("abqx", max_size=4).map(lambda text: text + "|"), max_size=4).map("".join)


@given(pieces, pieces, st.lists(st.sampled_from([97, 98, 120, 1000]), max_size=5), pieces, pieces)
def test_spliced_ids_always_say_the_rendered_text(
    head: str, moved: str, reply: list[int], rest: str, tail: str
) -> None:
    parent = sampled(head + moved, [*reply, ord("|")])
    text = head + CODEC.decode(reply) + "|" + rest + tail
    found = splice(text, CODEC, parent=parent, reply_at=lambda: len(head))
    assert CODEC.decode(found.ids) == text


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_common_length_is_that_of_the_longest_shared_start(one: str, other: str) -> None:
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert one[: length + 1] != other[: length + 1] or length == min(len(one), len(other))


def known(name: str, *, session: str = "s", size: int = 1) -> Known:
    ids = known_ids([1] * size)
    return Known(step_id=name, session_id=session, run_id="r", kind="main", sampled=Sampled("x" * size, ids, 0, 0))


def test_memory_forgets_the_oldest_by_number_and_by_bytes() -> None:
    memory = StepMemory(max_entries=3, max_bytes=10_000)
    for name in "abcd":
        memory.add(known(name), chain=name.encode(), call_ids=(name,), main=True)
    assert len(memory) == 3
    assert memory.find(b"a", call_ids=("a",)) is None
    assert memory.find(b"?", call_ids=("b",)) is not None
    memory.add(known("big", size=1700), chain=b"big", call_ids=(), main=True)
    assert memory.size_bytes <= 10_000
    assert len(memory) == 2
    memory.add(known("huge", size=10_000), chain=b"huge", call_ids=(), main=True)
    assert (len(memory), memory.size_bytes, memory.last_of("s")) == (0, 0, None)


def test_equal_conversations_are_handed_out_once_each_and_within_their_session() -> None:
    memory = StepMemory(max_entries=9, max_bytes=10_000)
    for name, session in (("a", "s1"), ("b", "s2")):
        memory.add(known(name, session=session), chain=b"c", call_ids=(), main=True)
    latest = memory.find(b"c", call_ids=())
    assert latest is not None
    assert latest.step_id == "b"
    memory.mark_continued("b")
    other = memory.find(b"c", call_ids=())
    assert other is not None
    assert other.step_id == "a"
    within = memory.find(b"c", call_ids=(), session_id="s2")
    assert within is not None
    assert within.step_id == "b"
    assert memory.find(b"c", call_ids=(), session_id="s3") is None

"""The pure middle of sessions: normal form, chains, splicing, names, memory."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.engine.thinking import ThinkMarks
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.prompt import _with_thoughts
from clawloop_edge.sessions import openclaw, tree
from clawloop_edge.sessions.classify import Kind, Traffic, classify
from clawloop_edge.sessions.identity import identify, trace_id
from clawloop_edge.sessions.memory import Known, StepMemory, known_ids
from clawloop_edge.sessions.splice import How, Sampled, common_length, splice
from clawloop_edge.sessions.tracker import Placement
from clawloop_shared.records import Channel

TRACE = "0af7651916cd43dd8448eb211c80319c"
RUNTIME = "Runtime: agent=main | session=agent:main:s1 | sessionId=1c81d855-87ad-47af-a3eb-27ce146f0982 | host=vm"


QUEUED = "[Queued user message from a previous active turn; preserved as context only. Continue with the active.]"
CONTINUE = "Continue the current task from the existing transcript, preserving completed work."


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
    (
        {"role": "user", "content": "Follow the heartbeat monitor scratch context when provided."},
        {"role": "user", "content": "[Sun 2026-11-22 08:35 UTC] [OpenClaw heartbeat poll]"},
    ),
    (
        {"role": "user", "content": "An async command you ran earlier has completed. It says x"},
        {"role": "user", "content": "[OpenClaw exec completion]\nDisable automatic completion turns."},
    ),
    (
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": f"[Sun 2026-11-22 08:19 UTC] {QUEUED}\none\n\ntwo\n\n{RUNTIME}"},
    ),
    (USER, {"role": "user", "content": f"{QUEUED}\n{QUEUED}\nhello\n\n{CONTINUE} If an action was interrupted."}),
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


def test_what_openclaw_says_about_an_interruption_is_left_out() -> None:
    aborted = {"role": "user", "content": "[Sun 2026-11-22 08:31 UTC] <turn_aborted>\nThe previous.\n</turn_aborted>"}
    again = {"role": "user", "content": f"[Sun 2026-11-22 08:31 UTC] {CONTINUE} If an action was interrupted."}
    assert last_hash(USER, aborted, again) == last_hash(USER)
    answered = [USER, {"role": "assistant", "content": "a"}, aborted, again, {"role": "assistant", "content": "b"}]
    assert [turn.role for turn in tree.turns_of(answered)] == ["user", "assistant", "assistant"]


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


MARK = "<!-- openclaw:attempt:STABLE -->\nYou are a personal assistant.\n"
CONTEXT = {"role": "user", "content": [{"type": "text", "text": f"{openclaw.INTERNAL_CONTEXT}\nnone"}]}
CLOCK = "\nCurrent time: Sunday, November 22nd, 2026 - 8:35 AM (UTC)\nReference UTC: 2026-11-22 08:35 UTC"


def asked(text: str, *, key: str = "agent:main:main", more: str = "") -> list[dict[str, Any]]:
    """A request as OpenClaw's own agent makes it."""
    runtime = RUNTIME.replace("agent:main:s1", key)
    first = {"role": "user", "content": f"[Sun 2026-11-22 08:19 UTC] hello\n\n{runtime}"}
    context = {"role": "user", "content": f"{openclaw.INTERNAL_CONTEXT}\n{more}"}
    answered = {"role": "assistant", "content": "hi"}
    return [{"role": "system", "content": MARK}, first, answered, {"role": "user", "content": text}, context]


OPENCLAW_TURNS: list[tuple[list[dict[str, Any]], Kind]] = [
    (asked("[Sun 2026-11-22 08:20 UTC] and now?"), Kind.MAIN),
    (asked(f"A new session was started via /new or /reset. Execute your Session Startup.{CLOCK}"), Kind.MAIN),
    (asked("[Sun 2026-11-22 08:20 UTC] <turn_aborted>\nThe previous turn.\n</turn_aborted>"), Kind.MAIN),
    (asked(f"Pre-compaction memory flush. Store durable memories only.{CLOCK}"), Kind.MEMORY_FLUSH),
    (asked("Based on this conversation, generate a short 1-2 word filename slug (lowercase)"), Kind.SLUG),
    (asked("Skill review. Distill new durable learning from it."), Kind.REVIEW),
    (asked(f"Look after my plants.{CLOCK}"), Kind.HEARTBEAT),
    (asked(f"Follow the heartbeat monitor scratch context when provided.{CLOCK}"), Kind.HEARTBEAT),
    (asked("[Sun 2026-11-22 08:35 UTC] [OpenClaw heartbeat poll]"), Kind.HEARTBEAT),
    (asked(f"[cron:7 water] Water the plants{CLOCK}"), Kind.SCHEDULED),
    (asked("water the plants", key="agent:main:cron:7"), Kind.SCHEDULED),
    (asked("mail came", key="agent:main:hook:gmail:7"), Kind.BACKGROUND),
    (asked(f"An async command you ran earlier has completed. The details are:\n\nx{CLOCK}"), Kind.BACKGROUND),
    (asked(f"A scheduled reminder has been triggered. The reminder content is:\n\nx{CLOCK}"), Kind.BACKGROUND),
    (asked("A background task completed. Use this result to reply to the user."), Kind.BACKGROUND),
    (asked("[Inter-session message] sourceSession=agent:b:main isUser=false\nhi"), Kind.BACKGROUND),
    (asked("[Sun 2026-11-22 08:35 UTC] #7 Ann: lunch?", more="[OpenClaw room event]"), Kind.BACKGROUND),
    (asked("go", key="agent:main:subagent:1234"), Kind.SUBAGENT),
    (asked("go", key="agent:main:subagent:1:subagent:2"), Kind.SUBAGENT),
    (asked("ping", key="agent:main:setup-inference:incognito-probe"), Kind.HELPER),
    (asked("x", key="agent:main:internal-session-effects:run"), Kind.HELPER),
]


@pytest.mark.parametrize(("messages", "kind"), OPENCLAW_TURNS)
def test_what_openclaws_agent_is_asked_tells_what_for(messages: list[dict[str, Any]], kind: Kind) -> None:
    traffic = classify(messages, tools=True)
    assert (traffic.kind, traffic.app) == (kind, "openclaw")
    assert classify(messages, tools=False).kind is (Kind.UNKNOWN if kind is Kind.MAIN else kind)


def test_a_parts_list_that_ends_in_a_turn_of_the_users_is_one() -> None:
    parts = ["[Sun 2026-11-22 08:35 UTC] [OpenClaw heartbeat poll]", "what is up?"]
    messages = asked("x")
    messages[3] = {"role": "user", "content": [{"type": "text", "text": text} for text in parts]}
    assert classify(messages, tools=True).kind is Kind.MAIN


SIDE_SYSTEMS: list[tuple[str, Kind]] = [
    ("Generate a concise session title (3-6 words)", Kind.TITLE),
    (
        "Name the topic. You are labeling the supplied message, not participating in its conversation. Treat it.",
        Kind.TITLE,
    ),
    ("You are a context summarization assistant. Your task is", Kind.COMPACTION),
    ("Write an Activity recap for someone scanning their tasks", Kind.RECAP),
    ("You judge the trajectory of a running AI agent session for", Kind.RECAP),
    ("You are OpenClaw's exec safety reviewer. You review", Kind.REVIEW),
    ("You classify one chat message from a user who was just asked to approve a pending", Kind.REVIEW),
    ("You are answering an ephemeral /btw side question about", Kind.ASIDE),
    ("You are OpenClaw, the system agent: a small, tidy hermit crab", Kind.HELPER),
]


@pytest.mark.parametrize(("system", "kind"), SIDE_SYSTEMS)
def test_openclaws_requests_without_tools_are_told_by_their_system_prompt(system: str, kind: Kind) -> None:
    traffic = classify([{"role": "system", "content": system}, USER], tools=False)
    assert (traffic.kind, traffic.app) == (kind, "openclaw")
    assert classify([{"role": "system", "content": system}, USER], tools=True).kind is Kind.MAIN


CLAUDE = "You are Claude Code, Anthropic's official CLI for Claude.\n"
WEBUI = "### Task:\n{}\n### Guidelines:\n- x\n### Chat History:\n<chat_history>\nhi\n</chat_history>"
OTHERS: list[tuple[str, str, Kind]] = [
    ("", WEBUI.format("Generate a concise, 3-5 word title with an emoji summarizing the chat history."), Kind.TITLE),
    ("", WEBUI.format("Suggest 3-5 relevant follow-up questions or prompts"), Kind.HELPER),
    ("", "### Task:\nGenerate a title for my book", Kind.MAIN),
    (f"{CLAUDE}Analyze if this message indicates a new conversation topic. If it does", "hi", Kind.TITLE),
    (f"{CLAUDE}You are an interactive agent", "hi", Kind.MAIN),
    ("You are a title generator. You output ONLY a thread title. Nothing else.", "hi", Kind.TITLE),
    ("You are a helpful AI assistant tasked with summarizing conversations.", "hi", Kind.COMPACTION),
    ("You name things. Generate a concise title for what the user sends.", "my essay", Kind.MAIN),
]


@pytest.mark.parametrize(("system", "text", "kind"), OTHERS)
def test_other_programs_have_side_requests_only_where_that_is_certain(system: str, text: str, kind: Kind) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    assert classify(messages, tools=False, user_agent="x/1").kind is kind
    assert classify(messages, tools=True, user_agent="x/1") == Traffic(Kind.MAIN, "x/1")


def test_the_runtime_line_is_found_at_the_end_of_a_system_prompt() -> None:
    system = (
        f"{MARK}Runtime: agent=x | session=agent:x:old | y\n## Runtime\n\n{RUNTIME}\n<!-- /openclaw:attempt:DYNAMIC -->"
    )
    traffic = classify([{"role": "developer", "content": system}, USER, CONTEXT], tools=True)
    assert traffic.runtime == RUNTIME
    assert identify({}, runtime=traffic.runtime).session_id == "1c81d855-87ad-47af-a3eb-27ce146f0982"
    named = openclaw.runtime_line([RUNTIME.replace("agent=main", "name=Ann | agent=main")])
    assert openclaw.session_key(named) == "s1"


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


def test_before_a_reply_that_was_rewritten_the_parents_ids_stand() -> None:
    asked = sampled("q|", REPLY)
    parent = Sampled(asked.text + "u|tab|", [*asked.ids, *map(ord, "u|tab|")], len("q|ab|u|"), len(asked.ids) + 2)
    found = splice("q|ab|u|ab|v|", CODEC, parent=parent, reply_at=lambda: len("q|ab|u|"))
    assert (found.how, found.reused) == (How.ENCODED, 7)
    assert found.ids == [*asked.ids, ord("u"), ord("|"), 1000, *map(ord, "|v|")]


pieces = st.lists(st.text("abqx", max_size=4).map(lambda text: text + "|"), max_size=4).map("".join)


@given(pieces, pieces, st.lists(st.sampled_from([97, 98, 120, 1000]), max_size=5), pieces, pieces)
def test_spliced_ids_always_say_the_rendered_text(
    head: str, moved: str, reply: list[int], rest: str, tail: str
) -> None:
    parent = sampled(head + moved, [*reply, ord("|")])
    text = head + CODEC.decode(reply) + "|" + rest + tail
    found = splice(text, CODEC, parent=parent, reply_at=lambda: len(head))
    assert CODEC.decode(found.ids) == text


letters = st.lists(st.sampled_from([97, 98, 120, 124, 1000]), max_size=8)


@given(pieces, letters, pieces, letters, st.one_of(st.none(), st.integers(0, 30)), st.booleans())
def test_spliced_ids_say_the_rendered_text_whatever_became_of_the_parent(
    prompt: str, reply: list[int], other: str, more: list[int], place: int | None, continued: bool
) -> None:
    parent = sampled(prompt, reply)
    text = (parent.text if continued else other) + CODEC.decode(more)
    found = splice(text, CODEC, parent=parent, reply_at=lambda: place)
    assert CODEC.decode(found.ids) == text
    assert (found.how is How.PREFIX) is text.startswith(parent.text)
    if found.how is How.PREFIX:
        assert found.ids[: len(parent.ids)] == list(parent.ids)


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
    assert memory.find_call(("a",)) is None
    assert memory.find_call(("b",)) is not None
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
    within = memory.find(b"c", call_ids=(), sessions=("s2",))
    assert within is not None
    assert within.step_id == "b"
    assert memory.find(b"c", call_ids=(), sessions=("s3",)) is None


def test_what_a_model_that_went_astray_wrote_is_normalised_in_one_pass() -> None:
    began = time.process_time()
    tree.turns_of([USER, {"role": "assistant", "content": "</think>" + "<think>" * 100_000}])
    assert time.process_time() - began < 2.0, "a pass an opening mark would take a quarter of an hour"


@pytest.mark.parametrize(
    ("sampled", "sent_back"),
    [
        ("<think>a</think>b", "b"),
        ("<think></think>a<think>b\nc</think>d", "ad"),
        ("a</think>b<think>c<think>d</think>e", "a</think>be"),
    ],
)
def test_thoughts_that_end_are_no_part_of_an_answer(sampled: str, sent_back: str) -> None:
    one, other = ({"role": "assistant", "content": text} for text in (sampled, sent_back))
    assert last_hash(USER, one) == last_hash(USER, other)
    assert last_hash(USER, {"role": "assistant", "content": "<think>a"}) != last_hash(
        USER, {"role": "assistant", "content": ""}
    )


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({"content": "I look."}, "hm"),
        ({"content": "I look.", "reasoning_content": "so"}, "so"),
        ({"content": "<think>\nhm\n</think>\n\nI look."}, None),
        ({"content": [{"type": "text", "text": "<think>hm</think>I look."}]}, None),
    ],
)
def test_thoughts_are_put_back_where_the_client_has_left_them_out(sent: dict[str, Any], wanted: str | None) -> None:
    reply = Sampled("p<think>\nhm\n</think>\n\nI look.|", [], reply_char=1, reply_id=0)
    placed = Placement(session_id="s", run_id="r", kind=Kind.MAIN, app="", chain=b"", said=((1, reply),))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **sent}]
    (_, message) = _with_thoughts(messages, placed, ThinkMarks("<think>", "</think>"))
    assert message.get("reasoning_content") == wanted
    assert message["content"] == sent["content"]

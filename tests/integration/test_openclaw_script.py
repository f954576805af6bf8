"""What scripts/openclaw does without OpenClaw: its configuration, its reading, and checks that notice what is wrong."""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zstandard

from openclaw_drive.agent import DriveError, Order, Turn, read_turn
from openclaw_drive.check import Conversation, Finding, Kept, Signal, Talk, check_all, check_tool_loop, split_calls
from openclaw_drive.config import Gateway, openclaw_config, write_config
from openclaw_drive.evidence import check_doctor, check_list
from openclaw_drive.judging import Judged, Judgement, check_judgements
from openclaw_drive.leftovers import remove_leftovers
from openclaw_drive.transcript import Call, Said, ToolResult, Transcript, TranscriptError, read_transcript

END = "<|im_end|>"
CALL_TEXT = '<tool_call>\n{"name": "exec", "arguments": {"command": "echo hi"}}\n</tool_call>'
TEXTS = {1: CALL_TEXT, 2: "done", 3: END}


def decode(ids: Sequence[int]) -> str:
    return "".join(TEXTS[token_id] for token_id in ids)


def kept(step_id: str, ids: list[int], *, prompt_ids: list[int], parent_id: str = "") -> Kept:
    return Kept(
        step_id=step_id,
        session_id="s1",
        run_id="trace1",
        parent_id=parent_id,
        kind="main",
        app="openclaw",
        trainable=True,
        untrainable="",
        temperature=1.0,
        adapter_version=0,
        text=decode(ids),
        prompt_ids=prompt_ids,
        response_ids=ids,
        response_logprobs=[-0.5] * len(ids),
        max_abs_difference=1e-5,
        reference_difference=2e-5,
    )


def conversation(*steps: Kept, asides: Sequence[str] = ()) -> Conversation:
    call = Call("call_1", "exec", {"command": "echo hi"})
    said = (Said("a", "run1", "", (call,)), Said("b", "run1", "done", ()))
    turn = Turn("first", "Run echo hi", "done", "s1", ("exec",), 1.0)
    talk = Talk("daemon", (turn,), frozenset(asides))
    return Conversation(talk, Transcript(said, (ToolResult("call_1", "hi", False),)), steps)


STEPS = (kept("a", [1, 3], prompt_ids=[2]), kept("b", [2, 3], prompt_ids=[2, 1, 3, 2], parent_id="a"))
ASIDE = {"trainable": False, "untrainable": "side request", "run_id": "trace2"}


def failed(*conversations: Conversation, apart: Sequence[Kept] = ()) -> list[Finding]:
    return [f for f in check_all(conversations, apart, decode=decode, end=END) if not f.ok]


def broken(*steps: Kept) -> list[Finding]:
    return failed(conversation(*steps))


def test_a_conversation_that_was_kept_well_passes_every_check() -> None:
    assert broken(*STEPS) == []
    assert check_tool_loop([conversation(*STEPS)], "daemon", word="hi").ok


@pytest.mark.parametrize(
    "change",
    [
        {"step_id": "other"},
        {"session_id": "s2"},
        {"run_id": "trace2"},
        {"kind": "title"},
        {"text": "another text"},
        {"response_ids": [2, 2, 3], "text": "donedone<|im_end|>", "response_logprobs": [-1.0, -1.0, -1.0]},
        {"response_logprobs": [-0.5]},
        {"response_logprobs": [-0.5, float("nan")]},
        {"response_logprobs": [-0.5, 0.5]},
        {"max_abs_difference": 2e-3},
        {"max_abs_difference": None},
        {"reference_difference": float("nan")},
        {"adapter_version": 3},
        {"trainable": False, "untrainable": "cut"},
        {"parent_id": ""},
        {"parent_id": "of another session"},
        {"prompt_ids": [2, 1, 2, 3]},
    ],
)
def test_each_thing_that_may_go_wrong_is_noticed(change: dict[str, object]) -> None:
    assert broken(STEPS[0], msgspec.structs.replace(STEPS[1], **change))


def test_a_turn_that_openclaw_gave_up_may_be_two_runs() -> None:
    talk = conversation(STEPS[0], msgspec.structs.replace(STEPS[1], run_id="trace2"))
    given_up = replace(talk.talk, turns=(replace(talk.talk.turns[0], failed=True),))
    assert failed(replace(talk, talk=given_up)) == []


def test_a_turn_in_which_a_call_was_spoiled_may_be_two_runs() -> None:
    parted = (STEPS[0], msgspec.structs.replace(STEPS[1], run_id="trace2"))
    assert [f.name for f in failed(conversation(*parted))] == ["one run a user turn"]
    cut = msgspec.structs.replace(STEPS[0], text='<tool_call>\n{"name": "exec", "arg')
    assert "one run a user turn" not in [f.name for f in failed(conversation(cut, parted[1]))]


def test_a_side_request_is_one_that_was_caused_and_is_never_learned_from() -> None:
    summary = msgspec.structs.replace(STEPS[0], step_id="c", kind="compaction", **ASIDE)
    assert failed(conversation(*STEPS, summary, asides=["compaction"])) == []
    assert failed(conversation(*STEPS, summary))
    assert failed(conversation(*STEPS, asides=["compaction"]))
    assert failed(conversation(*STEPS, msgspec.structs.replace(summary, trainable=True), asides=["compaction"]))
    assert failed(conversation(*STEPS, msgspec.structs.replace(summary, run_id="trace1"), asides=["compaction"]))


def test_what_belongs_to_no_conversation_is_a_title() -> None:
    title = msgspec.structs.replace(STEPS[0], step_id="t", session_id="s2", kind="title", **ASIDE)
    assert failed(conversation(*STEPS), apart=[title]) == []
    assert failed(conversation(*STEPS), apart=[msgspec.structs.replace(title, kind="main")])


def test_a_heartbeat_in_the_transcript_is_a_heartbeat_of_the_edge_and_no_turn() -> None:
    talk = conversation(
        *STEPS, msgspec.structs.replace(STEPS[1], step_id="c", kind="heartbeat", **ASIDE), asides=["heartbeat"]
    )
    woken = replace(talk.transcript, said=(*talk.transcript.said, Said("c", "run2", "done", (), heartbeat=True)))
    assert failed(replace(talk, transcript=woken)) == []
    asked = replace(talk.transcript, said=(*talk.transcript.said, Said("c", "run2", "done", ())))
    assert failed(replace(talk, transcript=asked))


@pytest.mark.parametrize(("kind", "kept_well"), [("heartbeat", True), ("compaction", False)])
def test_a_turn_may_continue_a_heartbeat_but_nothing_beside_the_conversation(kind: str, kept_well: bool) -> None:
    beside = msgspec.structs.replace(STEPS[1], step_id="c", kind=kind, **ASIDE)
    after = msgspec.structs.replace(STEPS[1], step_id="d", parent_id="c", prompt_ids=[2, 1, 3, 2, 2, 3])
    problems = [f.name for f in failed(conversation(*STEPS, beside, after, asides=[kind]))]
    assert problems == ([] if kept_well else ["each session's main line is one tree"])


def test_after_a_summary_a_prompt_need_not_have_its_parents_reply() -> None:
    anew = conversation(STEPS[0], msgspec.structs.replace(STEPS[1], prompt_ids=[2, 2]))
    first, second = anew.transcript.said
    assert failed(anew)
    assert (
        failed(replace(anew, transcript=replace(anew.transcript, said=(first, replace(second, summarised=True))))) == []
    )


def test_a_tool_loop_needs_its_result_and_the_next_step_of_the_same_run() -> None:
    assert not check_tool_loop([conversation(*STEPS)], "daemon", word="other word").ok
    assert not check_tool_loop([conversation(*STEPS)], "responses", word="hi").ok
    for change in ({"run_id": "t2"}, {"parent_id": ""}):
        talk = conversation(STEPS[0], msgspec.structs.replace(STEPS[1], **change))
        assert not check_tool_loop([talk], "daemon", word="hi").ok


def test_the_counts_of_the_edge_are_those_of_its_steps() -> None:
    unlike = msgspec.structs.replace(STEPS[1], kind="title", session_id="s2", trainable=False, untrainable="cut")
    counts = Counter({("main", ""): 1, ("title", "cut"): 1})
    assert check_doctor(counts, [STEPS[0], unlike]).ok
    assert not check_doctor(counts, STEPS).ok
    assert check_list({"s1": 1, "s2": 1}, [STEPS[0], unlike]).ok
    assert not check_list({"s1": 1}, [STEPS[0], unlike]).ok


def test_a_call_that_cannot_be_read_is_text() -> None:
    assert split_calls(f"Wait. {CALL_TEXT}") == ("Wait.", [("exec", {"command": "echo hi"})])
    assert split_calls("<tool_call>{name}</tool_call>") == ("<tool_call>{name}</tool_call>", [])


def test_the_configuration_is_private_and_keeps_everything_in_one_folder(tmp_path: Path) -> None:
    config = openclaw_config(folder=tmp_path, temperature=1.0)
    path = tmp_path / "home/.openclaw/openclaw.json"
    write_config(path, config)
    assert path.stat().st_mode & 0o777 == 0o600
    for place in (config["agents"]["defaults"]["workspace"], config["logging"]["file"]):
        assert Path(place).is_relative_to(tmp_path)


def test_the_daemon_listens_on_loopback_and_wants_a_token(tmp_path: Path) -> None:
    config = openclaw_config(folder=tmp_path, temperature=1.0, gateway=Gateway(9, "its own"))
    assert config["gateway"] == {
        "mode": "local",
        "bind": "loopback",
        "port": 9,
        "auth": {"mode": "token", "token": "its own"},
    }


def test_what_was_said_of_an_answer_is_one_signal_on_it_and_a_correction_speaks_against_it() -> None:
    said = Signal(signal_id="1", target_id="a", source="openclaw", value=1.0, comment="fine")
    against = Signal(signal_id="2", target_id="trace1", source="next-state", value=-0.8)
    judged = Judged((Judgement("a", good=True, words="fine"),), ("Noted.",), corrected="b")

    def problems(*signals: Signal, judged: Judged = judged) -> list[bool]:
        steps = [msgspec.structs.replace(step, signals=list(signals)) for step in STEPS]
        return [not finding.ok for finding in check_judgements([conversation(*steps)], judged)]

    assert problems(said, against) == [False, False, False]
    assert problems(said, against, judged=replace(judged, replies=("Not stored",))) == [True, False, False]
    for wrong in ({"target_id": "b"}, {"value": -1.0}, {"comment": ""}, {"source": "user"}):
        assert problems(msgspec.structs.replace(said, **wrong), against) == [False, True, False], wrong
    assert problems(said, msgspec.structs.replace(said, signal_id="3"), against) == [False, True, False]
    for wrong in ({"value": 0.5}, {"target_id": "trace2"}, {"source": "user"}):
        assert problems(said, msgspec.structs.replace(against, **wrong)) == [False, False, True], wrong


def test_what_openclaw_prints_becomes_a_turn_or_a_plain_error() -> None:
    printed = {
        "payloads": [{"text": "done", "mediaUrl": None}],
        "meta": {"agentMeta": {"sessionId": "s1"}, "toolSummary": {"calls": 1, "tools": ["exec"]}},
    }
    order = Order("first", "Run echo hi")
    for whole in (printed, {"runId": "r1", "status": "ok", "result": printed}):  # --local, and through the daemon
        turn = read_turn(json.dumps(whole).encode(), order, seconds=1.0)
        assert turn == Turn("first", "Run echo hi", "done", "s1", ("exec",), 1.0)
    with pytest.raises(DriveError, match="printed something else"):
        read_turn(b"Update available!", order, seconds=1.0)


def test_a_transcript_is_read_from_plain_and_packed_events(tmp_path: Path) -> None:
    call = {"type": "toolCall", "id": "call_1", "name": "exec", "arguments": {"command": "echo hi"}}
    messages = [
        {"role": "user", "content": "Run echo hi"},
        {"role": "assistant", "content": [call], "responseId": "a", "__openclaw": {"runId": "run1"}},
        {"role": "toolResult", "toolCallId": "call_1", "content": [{"type": "text", "text": "hi"}], "isError": False},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "done"}],
            "responseId": "b",
            "__openclaw": {"runId": "run1"},
        },
    ]
    own = {"role": "assistant", "model": "gateway-injected", "content": "Noted.", "idempotencyKey": "k"}
    messages.append(own)
    database = tmp_path / "agent.sqlite"
    write_database(database, [{"type": "message", "message": message} for message in messages])
    assert read_transcript(database, "s1") == replace(conversation().transcript, own_words={"k": "Noted."})
    assert read_transcript(database, "s2") == Transcript((), ())


def test_a_transcript_says_what_nobody_asked_and_where_a_summary_came_in(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    for asked, response_id in (("hello", "a"), ("[OpenClaw heartbeat poll]", "b"), ("and now?", "c"), ("bye", "d")):
        answer = {"role": "assistant", "content": [], "responseId": response_id}
        events += [{"type": "message", "message": {"role": "user", "content": asked}}]
        events += [{"type": "compaction"}] if response_id == "c" else []
        events += [{"type": "message", "message": answer}]
    write_database(tmp_path / "agent.sqlite", events)
    said = read_transcript(tmp_path / "agent.sqlite", "s1").said
    assert [s.response_id for s in said if s.heartbeat] == ["b"]
    assert [s.response_id for s in said if s.summarised] == ["c"]


def test_a_file_that_is_no_transcript_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "agent.sqlite").write_text("no database")
    with pytest.raises(TranscriptError, match="not the transcript"):
        read_transcript(tmp_path / "agent.sqlite", "s1")


def write_database(path: Path, events: Sequence[dict[str, object]]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE transcript_events (session_id TEXT, seq INT, event_json TEXT, event_zstd BLOB)"
        )
        for seq, event in enumerate(map(json.dumps, events)):
            row = (event, None) if seq % 2 else (None, zstandard.ZstdCompressor().compress(event.encode()))
            connection.execute("INSERT INTO transcript_events VALUES ('s1', ?, ?, ?)", (seq, *row))


def test_only_the_locks_of_this_home_are_removed_from_the_temporary_folder(tmp_path: Path) -> None:
    database = tmp_path / "home/.openclaw/state/openclaw.sqlite"
    locks = tmp_path / f"openclaw-state-locks-{os.getuid()}"
    for folder in (database.parent, locks, tmp_path / "openclaw"):
        folder.mkdir(parents=True)
    name = hashlib.sha256(str(database.resolve()).encode()).hexdigest()[:8]
    own, foreign = locks / f"state-handles.{name}.lock.sqlite", locks / "state-handles.00000000.lock.sqlite"
    for path in (database, own, foreign):
        path.touch()
    remove_leftovers(tmp_path / "home", tmp=tmp_path)
    assert not own.exists()
    assert foreign.exists()
    assert not (tmp_path / "openclaw").exists()

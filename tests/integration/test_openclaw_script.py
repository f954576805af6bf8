"""What scripts/openclaw does without OpenClaw: its configuration, its reading, and checks that notice what is wrong."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zstandard

from openclaw_drive.agent import DriveError, Turn, read_turn
from openclaw_drive.check import Conversation, Finding, Kept, check_all, check_tool_loop, split_calls
from openclaw_drive.config import openclaw_config, write_config
from openclaw_drive.leftovers import remove_leftovers
from openclaw_drive.transcript import Call, Said, ToolResult, Transcript, read_transcript

END = "<|im_end|>"
CALL_TEXT = '<tool_call>\n{"name": "exec", "arguments": {"command": "echo hi"}}\n</tool_call>'
TEXTS = {1: CALL_TEXT, 2: "done", 3: END}


def decode(ids: Sequence[int]) -> str:
    return "".join(TEXTS[token_id] for token_id in ids)


def kept(step_id: str, ids: list[int], *, parent_id: str = "") -> Kept:
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
        prompt_ids=[1, 2],
        response_ids=ids,
        response_logprobs=[-0.5] * len(ids),
        max_abs_difference=1e-5,
        reference_difference=2e-5,
    )


def conversation(*steps: Kept) -> Conversation:
    call = Call("call_1", "exec", {"command": "echo hi"})
    said = (Said("a", "run1", "", (call,)), Said("b", "run1", "done", ()))
    turn = Turn("first", "Run echo hi", "done", "s1", ("exec",), 1.0)
    return Conversation("first", (turn,), Transcript(said, (ToolResult("call_1", "hi", False),)), steps)


STEPS = (kept("a", [1, 3]), kept("b", [2, 3], parent_id="a"))


def broken(*steps: Kept) -> list[Finding]:
    return [f for f in check_all([conversation(*steps)], decode=decode, end=END) if not f.ok]


def test_a_conversation_that_was_kept_well_passes_every_check() -> None:
    assert broken(*STEPS) == []
    assert check_tool_loop([conversation(*STEPS)], "hi").ok


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
    ],
)
def test_each_thing_that_may_go_wrong_is_noticed(change: dict[str, object]) -> None:
    assert broken(STEPS[0], msgspec.structs.replace(STEPS[1], **change))


def test_a_turn_that_openclaw_gave_up_may_be_two_runs() -> None:
    talk = conversation(STEPS[0], msgspec.structs.replace(STEPS[1], run_id="trace2"))
    given_up = replace(talk, turns=(replace(talk.turns[0], failed=True),))
    assert all(f.ok for f in check_all([given_up], decode=decode, end=END))


def test_a_tool_loop_needs_its_result_and_the_next_step_of_the_same_run() -> None:
    assert not check_tool_loop([conversation(*STEPS)], "other word").ok
    assert not check_tool_loop([conversation(STEPS[0], msgspec.structs.replace(STEPS[1], run_id="t2"))], "hi").ok
    assert not check_tool_loop([conversation(STEPS[0], msgspec.structs.replace(STEPS[1], parent_id=""))], "hi").ok


def test_a_call_that_cannot_be_read_is_text() -> None:
    assert split_calls(f"Wait. {CALL_TEXT}") == ("Wait.", [("exec", {"command": "echo hi"})])
    assert split_calls("<tool_call>{name}</tool_call>") == ("<tool_call>{name}</tool_call>", [])


def test_the_configuration_points_at_the_edge_and_keeps_everything_in_one_folder(tmp_path: Path) -> None:
    config = openclaw_config("http://127.0.0.1:8100/v1", token="secret", folder=tmp_path, temperature=1.0)
    path = tmp_path / "home/.openclaw/openclaw.json"
    write_config(path, config)
    assert path.stat().st_mode & 0o777 == 0o600
    provider = json.loads(path.read_text())["models"]["providers"]["clawloop"]
    assert (provider["baseUrl"], provider["apiKey"]) == ("http://127.0.0.1:8100/v1", "secret")
    assert provider["models"][0]["compat"]["sendSessionAffinityHeaders"]
    for place in (config["agents"]["defaults"]["workspace"], config["logging"]["file"]):
        assert Path(place).is_relative_to(tmp_path)


def test_what_openclaw_prints_becomes_a_turn_or_a_plain_error() -> None:
    printed = {
        "payloads": [{"text": "done", "mediaUrl": None}],
        "meta": {"agentMeta": {"sessionId": "s1"}, "toolSummary": {"calls": 1, "tools": ["exec"]}},
    }
    turn = read_turn(json.dumps(printed).encode(), "first", message="Run echo hi", seconds=1.0)
    assert turn == Turn("first", "Run echo hi", "done", "s1", ("exec",), 1.0)
    with pytest.raises(DriveError, match="printed something else"):
        read_turn(b"Update available!", "first", message="hello", seconds=1.0)


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
    database = tmp_path / "agent.sqlite"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TABLE transcript_events (session_id TEXT, seq INT, event_json TEXT, event_zstd BLOB)"
        )
        for seq, message in enumerate(messages):
            event = json.dumps({"type": "message", "message": message})
            row = (event, None) if seq % 2 else (None, zstandard.ZstdCompressor().compress(event.encode()))
            connection.execute("INSERT INTO transcript_events VALUES ('s1', ?, ?, ?)", (seq, *row))
    assert read_transcript(database, "s1") == conversation().transcript
    assert read_transcript(database, "s2") == Transcript((), ())


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

"""Exports for other programs: their documented fields, what is left out, and the manifest that each is held against.

TRL itself is not installed here: what it documents is checked with what reads such files, json and pyarrow.
"""

import json
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.errors import ExportInvalid, PoolError
from clawloop_edge.pool import curation, deriving
from clawloop_edge.pool.curation import Word
from clawloop_edge.pool.derived import DerivedManifest, beside, check_derived
from clawloop_edge.pool.exported import Basis, Chosen
from clawloop_edge.pool.exporting import Derived, ExportFormat, export_pool
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.records import Channel, Signal, Target

from .kept import kept_step

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "disk"}'}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.open(tmp_path / "pool", KnownKey.of(bytes(32))) as opened:
        curation.prepare(opened)
        yield opened


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def keep(
    pool: Pool, session: str, messages: list[Any], reply: Any, *, reward: float | None = None, **fields: Any
) -> str:
    kept: KeptStep = kept_step(session, messages=messages, reply=reply, **fields)
    pool.keep_step(kept).result()
    if reward is not None:
        step_id = kept.step.step_id
        signal = Signal(
            signal_id=new_id(), target=Target.STEP, target_id=step_id, source="user", value=reward, created_ms=1
        )
        pool.keep_signal(signal).result()
    return kept.step.step_id


def written(pool: Pool, path: Path, form: ExportFormat, **options: Any) -> tuple[list[Any], DerivedManifest]:
    manifest = export_pool(pool, path, options.pop("chosen", Chosen()), form=form, **options)
    assert isinstance(manifest, DerivedManifest)
    assert check_derived(path) == manifest
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path, beside(path))} == {0o600}
    if form is ExportFormat.VERL:
        return import_module("pyarrow.parquet").read_table(path).to_pylist(), manifest
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == manifest.rows
    if rows:  # as the library `datasets` reads such a file
        assert import_module("pyarrow.json").read_json(path).num_rows == len(rows)
    return rows, manifest


def test_a_conversation_is_one_row_as_far_as_it_went_on_each_branch(pool: Pool, tmp_path: Path) -> None:
    one = keep(pool, "s", [user("a")], said("b"), tools=TOOLS)
    two = keep(
        pool,
        "s",
        [user("a"), said("b"), user("c")],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        parent_id=one,
    )
    other = keep(pool, "s", [user("a"), said("b"), user("instead")], said("d"), parent_id=one)
    rows, manifest = written(pool, tmp_path / "chat.jsonl", ExportFormat.CHAT)
    assert [row["messages"][-2]["content"] for row in rows] == ["c", "instead"]
    call = rows[0]["messages"][-1]
    assert call["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "disk"}}, (
        "an object, as TRL has it"
    )
    assert (manifest.rows, manifest.steps, manifest.content) == (2, 3, "text")
    curation.curate(pool, Target.STEP, two, word=Word(trainable=False)).result()
    curation.curate(pool, Target.STEP, other, word=Word(trainable=False)).result()
    rows, manifest = written(pool, tmp_path / "chat.jsonl", ExportFormat.CHAT, replace=True)
    assert rows == [{"messages": [user("a"), said("b")], "tools": TOOLS}]
    assert manifest.left_out == {deriving.TAKEN_OUT: 2}


def test_prompt_and_completion_are_those_of_each_step(pool: Pool, tmp_path: Path) -> None:
    keep(pool, "s", [user("a")], said("b"), reward=1.0)
    keep(pool, "t", [user("a")], said("bad"), reward=-1.0)
    keep(pool, "val", [user("never")], said("trained"), channel=Channel.VAL)
    keep(pool, "handed-in", [], {})
    rows, manifest = written(pool, tmp_path / "c.jsonl", ExportFormat.TRL_COMPLETION)
    assert rows == [
        {"prompt": [user("a")], "completion": [said("b")]},
        {"prompt": [user("a")], "completion": [said("bad")]},
    ]
    assert manifest.head.chosen.channel is Channel.TRAIN
    rows, _ = written(pool, tmp_path / "good.jsonl", ExportFormat.TRL_COMPLETION, chosen=Chosen(reward_min=0.5))
    assert [row["completion"] for row in rows] == [[said("b")]]
    rows, _ = written(pool, tmp_path / "v.jsonl", ExportFormat.TRL_COMPLETION, chosen=Chosen(channel=Channel.VAL))
    assert [row["completion"] for row in rows] == [[said("trained")]]


def test_answers_to_one_prompt_whose_rewards_are_apart_are_a_pair(pool: Pool, tmp_path: Path) -> None:
    for number, reward in enumerate((1.0, 0.9, 0.8, -1.0, None)):
        keep(pool, f"s{number}", [user("a")], said(f"answer {reward}"), reward=reward, tools=TOOLS)
    keep(pool, "alone", [user("b")], said("fine"), reward=1.0)
    rows, manifest = written(pool, tmp_path / "p.jsonl", ExportFormat.TRL_PREFERENCE)
    assert rows == [
        {"prompt": [user("a")], "chosen": [said("answer 1.0")], "rejected": [said("answer -1.0")], "tools": TOOLS}
    ]
    assert manifest.details == {"margin": 0.5}
    rows, _ = written(pool, tmp_path / "p2.jsonl", ExportFormat.TRL_PREFERENCE, derived=Derived(margin=0.05))
    assert [row["rejected"][0]["content"] for row in rows] == ["answer -1.0", "answer 0.8"], "each answer once"


def test_trajectories_of_one_group_are_pairs_with_all_their_turns(pool: Pool, tmp_path: Path) -> None:
    for name, reward in (("good", 1.0), ("bad", -1.0)):
        group: dict[str, Any] = {"trajectory_id": name, "group_id": "g", "run_id": name}
        first = keep(pool, name, [user("task")], said(f"{name} 1"), **group)
        more = [user("task"), said(f"{name} 1"), user("go on")]
        keep(pool, name, more, said(f"{name} 2"), parent_id=first, reward=reward, **group)
    for name, reward in (("rewritten", 1.0), ("whole", -1.0)):
        group = {"trajectory_id": name, "group_id": "h", "run_id": name}
        keep(pool, name, [user("task")], said("1"), **group)
        start = user("a summary") if name == "rewritten" else user("task")
        keep(pool, name, [start, said("1"), user("go on")], said("2"), reward=reward, **group)
    rows, manifest = written(pool, tmp_path / "p.jsonl", ExportFormat.TRL_PREFERENCE)
    assert rows == [
        {
            "prompt": [user("task")],
            "chosen": [said("good 1"), user("go on"), said("good 2")],
            "rejected": [said("bad 1"), user("go on"), said("bad 2")],
        }
    ]
    assert manifest.left_out == {deriving.REWRITTEN: 1}


def test_a_task_is_a_row_with_verls_columns(pool: Pool, tmp_path: Path) -> None:
    keep(pool, "t1", [user("2+2?")], said("4"), trajectory_id="t1", reward=1.0, app="agent")
    keep(pool, "s", [user("half \ud800"), said("x"), user("y")], said("z"))
    keep(pool, "u", [{"role": "assistant", "content": "", "tool_calls": [CALL]}, user("?")], said("!"))

    def task_of(_reading: object, trajectory_id: str) -> deriving.Task:
        return deriving.Task(data_source="sums", ability="math", ground_truth="4" if trajectory_id == "t1" else "")

    path = tmp_path / "verl.parquet"
    rows, manifest = written(pool, path, ExportFormat.VERL, derived=Derived(task_of=task_of))
    by_answer = {row["extra_info"]["answer"]: row for row in rows}
    row = by_answer["4"]
    assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert (row["data_source"], row["ability"]) == ("sums", "math")
    assert row["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert row["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert (row["extra_info"]["split"], row["extra_info"]["reward"]) == ("train", 1.0)
    assert sorted(each["extra_info"]["index"] for each in rows) == [0, 1]
    assert by_answer["z"]["extra_info"]["reward"] is None, "what nobody judged is no zero"
    assert manifest.left_out == {deriving.WITH_CALLS: 1}


def test_the_manifest_says_where_it_is_from_and_by_what_right(pool: Pool, tmp_path: Path) -> None:
    keep(pool, "s", [user("a")], said("b"), reward=1.0)
    basis = Basis(level="full", receipt_id="r1")
    written(pool, tmp_path / "c.jsonl", ExportFormat.CHAT, chosen=Chosen(tags=[], reward_min=0.0), basis=basis)
    manifest = json.loads(beside(tmp_path / "c.jsonl").read_text())
    assert manifest["head"]["pool_id"] == pool.keyring.pool_id
    assert manifest["head"]["consent"] == {
        "basis": "the owner's own command on this device",
        "level": "full",
        "receipt_id": "r1",
    }
    assert (manifest["head"]["chosen"]["reward_min"], manifest["head"]["reward"]["cap"]) == (0.0, 0.4)
    assert (manifest["steps"], manifest["sessions"], manifest["signals"], manifest["rows"]) == (1, 1, 1, 1)


def test_a_changed_file_or_one_without_a_manifest_is_found(pool: Pool, tmp_path: Path) -> None:
    keep(pool, "s", [user("a")], said("b"))
    path = tmp_path / "c.jsonl"
    written(pool, path, ExportFormat.CHAT)
    with pytest.raises(PoolError, match="there already"):
        export_pool(pool, path, Chosen(), form=ExportFormat.CHAT)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(ExportInvalid, match="was changed"):
        check_derived(path)
    beside(path).unlink()
    with pytest.raises(StorageError, match="cannot read"):
        check_derived(path)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]

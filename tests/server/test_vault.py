import hashlib
import math
import os
import signal as signals
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from clawloop_server import home as homes
from clawloop_server.errors import DeviceError, HomeError, VaultError
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.intake import MAX_TARGET_SIGNALS, Reason
from clawloop_server.vault.store import Vault, lineage_root
from clawloop_shared import wire
from clawloop_shared.database import open_database
from clawloop_shared.envelope import derive_key
from clawloop_shared.errors import KeyMissing, StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.messages import ForgetRequest, ItemReceived, UploadItem
from clawloop_shared.records import Channel, Signal, Step, StepBatch, Target

Make = Callable[..., Any]


def item(steps: list[Step] | None = None, found: list[Signal] | None = None, *, item_id: str = "") -> UploadItem:
    body = wire.encode(StepBatch(steps=steps or [], signals=found or []))
    return UploadItem(item_id=item_id or new_id(), receipt_id=new_id(), kind="steps", body=body)


def test_what_was_received_comes_back_as_a_rewarded_trajectory(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    first, second = make_step(run_id="run", created_ms=1), make_step(run_id="run", created_ms=2)
    sent = item([second, first], [make_signal(Target.RUN, "run", 0.5)])

    assert [r.item_id for r in vault.receive(device, [sent])] == [sent.item_id]

    (found,) = vault.ready(first.policy.line, 10)
    assert found.steps == [first, second]
    assert (found.reward, found.weight, found.channel) == (0.5, 1.0, Channel.TRAIN)
    assert vault.count_ready(first.policy.line) == 1
    assert vault.count_ready(first.policy.line, Channel.VAL) == 0


@pytest.mark.parametrize("target", list(Target))
def test_a_signal_finds_its_trajectory_by_any_of_its_names_whichever_comes_first(
    vault: Vault, device: str, make_step: Make, make_signal: Make, target: Target
) -> None:
    def pair(tag: str) -> tuple[Step, Signal]:
        step = make_step(run_id=f"run {tag}", session_id=f"session {tag}", trajectory_id=f"trajectory {tag}")
        names = {Target.STEP: step.step_id, Target.RUN: step.run_id, Target.SESSION: step.session_id}
        return step, make_signal(target, names.get(target, step.trajectory_id))

    early, late = pair("a"), pair("b")
    vault.receive(device, [item([early[0]])])
    vault.receive(device, [item(found=[late[1]])])
    assert vault.count_ready(early[0].policy.line) == 0
    vault.receive(device, [item(found=[early[1]])])
    vault.receive(device, [item([late[0]])])

    assert [t.steps for t in vault.ready(early[0].policy.line, 9)] == [[early[0]], [late[0]]]


def test_a_name_of_another_kind_or_another_device_matches_nothing(
    vault: Vault, add_device: Callable[[], str], make_step: Make, make_signal: Make
) -> None:
    one, other = add_device(), add_device()
    step = make_step(run_id="same", session_id="other", group_id="g")
    vault.receive(one, [item([step], [make_signal(Target.SESSION, "same"), make_signal(Target.TRAJECTORY, "same")])])
    vault.receive(other, [item(found=[make_signal(Target.RUN, "same")])])
    assert vault.count_ready(step.policy.line) == 0

    twin = make_step(run_id="same", group_id="g")
    vault.receive(other, [item([twin])])
    vault.receive(one, [item(found=[make_signal(Target.RUN, "same")])])
    found = vault.ready(step.policy.line, 9)
    assert [t.steps for t in found] == [[twin], [step]], "in the order in which they became ready"
    assert len({t.trajectory_id for t in found}) == len({t.group_id for t in found}) == 2


def test_channels_are_never_mixed_in_one_trajectory(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    train, val = make_step(run_id="run"), make_step(run_id="run", channel=Channel.VAL)
    vault.receive(device, [item([train, val], [make_signal(Target.RUN, "run")])])
    assert [(t.steps, t.device_id) for t in vault.ready(train.policy.line, 9)] == [([train], device)]
    assert [t.steps for t in vault.ready(train.policy.line, 9, Channel.VAL)] == [[val]]


def test_what_is_sent_twice_counts_once_and_a_changed_record_is_set_aside(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    step, judged = make_step(run_id="run"), make_signal(Target.RUN, "run")
    sent = item([step], [judged])
    for _ in range(3):
        assert [r.item_id for r in vault.receive(device, [sent])] == [sent.item_id]
    again = item([step], [judged])
    changed = item([make_step(step_id=step.step_id, response_ids=[7])])
    reused = item([make_step()], item_id=sent.item_id)
    assert len(vault.receive(device, [again, changed, reused])) == 3

    stats = vault.stats()
    assert (stats.steps, stats.signals, stats.items) == (1, 1, 3)
    assert stats.set_aside == {"changed": 2}
    assert [t.steps for t in vault.ready(step.policy.line, 9)] == [[step]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"logprobs": [-0.5, math.nan]}, "bad logprob"),
        ({"logprobs": [-math.inf, -0.5]}, "bad logprob"),
        ({"logprobs": [-0.5]}, "bad logprob"),
        ({"logprobs": []}, "bad logprob"),
        ({"logprobs": [-0.5, 0.5]}, "bad logprob"),
        ({"prompt_ids": [-1]}, "bad step"),
        ({"step_id": "x" * 300}, "bad step"),
        ({"response_ids": [4, 1000]}, "token outside the vocabulary"),
        ({"line": "0123456789abcdef"}, "other model line"),
        ({"untrainable": "sampled with top-p"}, "untrainable"),
        ({"logprobs": [None, None], "redacted": [(3, 2)]}, "nothing left to learn"),
        ({"logprobs": [None, -0.5]}, "bad logprob"),
    ],
)
def test_a_bad_step_is_set_aside_with_its_reason_and_the_rest_of_the_item_is_kept(
    vault: Vault, device: str, make_step: Make, make_signal: Make, fields: dict[str, Any], reason: str
) -> None:
    good = make_step(run_id="run")
    sent = item([make_step(run_id="run", **fields), good], [make_signal(Target.RUN, "run")])

    assert [r.item_id for r in vault.receive(device, [sent])] == [sent.item_id], (
        "acknowledged, so that it is not sent for ever"
    )

    assert vault.stats().set_aside == {reason: 1}
    assert [t.steps for t in vault.ready(good.policy.line, 9)] == [[good]]


def test_a_redacted_step_comes_back_with_its_masks(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    step = make_step(run_id="0f3a", logprobs=[None, -0.5], redacted=[(1, 1), (3, 1)], step_id="a pseudonym")
    vault.receive(device, [item([step], [make_signal(Target.STEP, "a pseudonym"), make_signal(Target.RUN, "0f3a")])])
    (found,) = vault.ready(step.policy.line, 9)
    assert found.steps == [step]
    assert len(found.signals) == 2


def test_an_item_that_comes_again_is_known_and_said_to_be_there_since_when_it_came(
    vault: Vault, device: str, make_step: Make
) -> None:
    sent = item([make_step()])
    (first,) = vault.receive(device, [sent], now_ms=1000)
    assert first == ItemReceived(
        device_id=device, item_id=sent.item_id, received_ms=1000, sha256=hashlib.sha256(sent.body).hexdigest()
    )
    assert vault.receive(device, [sent], now_ms=2000) == [first]
    (changed,) = vault.receive(device, [item([make_step()], item_id=sent.item_id)], now_ms=3000)
    assert (changed.received_ms, changed.sha256 == first.sha256) == (3000, False)


def test_a_bad_signal_and_an_unreadable_item_are_set_aside(vault: Vault, device: str, make_signal: Make) -> None:
    unreadable = UploadItem(item_id="i", receipt_id="r", kind="steps", body=b"CLW\x01\x08steps.v1 no zstd")
    large = UploadItem(item_id="j", receipt_id="r", kind="steps", body=bytes((8 << 20) + 1))
    bad = item(found=[make_signal(Target.RUN, "run", math.nan), make_signal(Target.RUN, "")])
    assert len(vault.receive(device, [unreadable, large, bad])) == 3
    assert vault.stats().set_aside == {"bad signal": 2, "too large": 1, "unreadable": 1}


def test_a_flood_of_signals_on_one_target_is_bounded_and_cheap(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    steps = [make_step(run_id=f"run {n}") for n in range(300)]
    signals = [make_signal(Target.SESSION, "session") for _ in range(MAX_TARGET_SIGNALS + 1000)]
    asked: list[str] = []
    vault.database._database.conn.set_trace_callback(asked.append)
    vault.receive(device, [item(steps, signals)])
    assert sum("DISTINCT trajectory_id" in sql for sql in asked) == 1
    assert vault.count_ready(steps[0].policy.line) == 300
    stats = vault.stats()
    assert stats.signals == MAX_TARGET_SIGNALS
    assert stats.set_aside == {Reason.TOO_MANY: 1000}


@pytest.mark.parametrize(("limit", "value"), [("STEPS", 3), ("TOKENS", 17)])
def test_a_trajectory_is_bounded_whatever_it_is_sent_in(
    vault: Vault,
    device: str,
    make_step: Make,
    make_signal: Make,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
) -> None:
    monkeypatch.setattr(f"clawloop_server.vault.receiving.MAX_TRAJECTORY_{limit}", value)
    steps = [make_step(run_id="long", created_ms=n) for n in range(6)]
    assert {len(step.prompt_ids) + len(step.response_ids) for step in steps} == {5}
    vault.receive(device, [item(steps[:2], [make_signal(Target.RUN, "long")])])
    vault.receive(device, [item([*steps[2:], make_step(run_id="other")], [make_signal(Target.RUN, "other")])])
    vault.receive(device, [item(steps[:2])])
    (found, other) = vault.ready(steps[0].policy.line, 9)
    assert (found.steps, len(other.steps)) == (steps[:3], 1), "what else is in an item is kept"
    assert vault.stats().set_aside == {Reason.LONG_TRAJECTORY: 3}
    request = ForgetRequest(request_id="one", device_id=device, at_ms=50, record_ids=[steps[0].step_id])
    assert vault.forget(request).deleted >= 1
    last = make_step(run_id="long", created_ms=9)
    vault.receive(device, [item([last, make_step(run_id="long")])])
    ready = [trajectory.steps for trajectory in vault.ready(steps[0].policy.line, 9)]
    assert ready == [other.steps, [*steps[1:3], last]], "what was forgotten leaves room"


def test_an_item_that_is_nested_too_deeply_is_set_aside(vault: Vault, device: str) -> None:
    deep = b"\x82\xa4type\xa8steps.v1\xa1x" + b"\x91" * 200_000 + b"\xc0"
    body = b"CLW\x01\x08steps.v1" + zstandard.ZstdCompressor().compress(deep)
    vault.receive(device, [UploadItem("deep", "r", "steps", body)])
    assert vault.stats().set_aside == {Reason.UNREADABLE: 1}


def test_only_a_device_that_is_let_in_may_send(vault: Vault, device: str, make_step: Make) -> None:
    with pytest.raises(DeviceError, match="unknown"):
        vault.receive(new_id(), [item([make_step()])])
    Devices(vault.database).revoke(device)
    with pytest.raises(DeviceError, match="revoked"):
        vault.receive(device, [item([make_step()])])
    assert vault.stats().steps == 0


def test_consuming_is_all_or_nothing_and_happens_once(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    steps = [make_step(run_id=f"run {n}") for n in range(3)]
    vault.receive(device, [item(steps, [make_signal(Target.SESSION, "session")])])
    line = steps[0].policy.line
    found = vault.ready(line, 9)
    ids = [t.trajectory_id for t in found]
    vault.consume("round 1", found[:1])
    with pytest.raises(VaultError, match="not ready any more"):
        vault.consume("round 2", list(reversed(found)))
    assert [t.trajectory_id for t in vault.ready(line, 9)] == ids[1:]
    assert vault.lineage("round 1") == ids[:1]
    assert lineage_root(ids) == lineage_root(reversed(ids)) != lineage_root(ids[:1])


def test_late_signals_and_steps_are_kept_but_make_no_consumed_trajectory_ready_again(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    step = make_step(run_id="run")
    vault.receive(device, [item([step], [make_signal(Target.RUN, "run")])])
    vault.consume("round", vault.ready(step.policy.line, 9))
    vault.receive(device, [item([make_step(run_id="run")], [make_signal(Target.RUN, "run", -1.0)])])
    assert (vault.stats().steps, vault.stats().signals, vault.count_ready(step.policy.line)) == (2, 2, 0)


_CONSUMER = """
import sys
from pathlib import Path
from clawloop_server.home import open_home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
home = open_home(Path(sys.argv[1]))
vault = Vault.open(home, load_master_key(home), settings=RewardSettings(settle_s=0))
taken = 0
for line in sys.stdin:
    found = vault.ready(sys.argv[2], 100)
    vault.consume("round " + line.strip(), found)
    taken += len(found)
    print(taken, flush=True)
"""


def test_another_process_reads_and_consumes_what_this_one_receives(
    vault: Vault, home: Home, device: str, make_step: Make, make_signal: Make
) -> None:
    line = make_step().policy.line
    command = [sys.executable, "-c", _CONSUMER, str(home.folder), line]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdin
        assert consumer.stdout
        taken = 0
        for n in range(5):
            run = f"run {n}"
            vault.receive(device, [item([make_step(run_id=run)], [make_signal(Target.RUN, run)])])
            consumer.stdin.write(f"{n}\n")
            consumer.stdin.flush()
            vault.receive(device, [item([make_step(run_id=f"{run} more")], [make_signal(Target.RUN, f"{run} more")])])
            taken = int(consumer.stdout.readline())
    assert taken + vault.count_ready(line) == 10
    assert vault.stats().trajectories["train"].get("consumed") == taken


_RECEIVER = """
import sys
from pathlib import Path
from clawloop_server.home import open_home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.messages import ForgetRequest, ItemReceived, UploadItem
from clawloop_shared.records import Policy, Sampling, Signal, Step, StepBatch, Target
home = open_home(Path(sys.argv[1]))
vault = Vault.open(home, load_master_key(home))
while True:
    step = Step(step_id=new_step_id(), session_id="s", run_id=new_id(), prompt_ids=[1], response_ids=[2],
                response_logprobs=[-1.0], policy=Policy(line=sys.argv[3]), sampling=Sampling(), finish_reason="stop",
                created_ms=1)
    signal = Signal(signal_id=new_id(), target=Target.RUN, target_id=step.run_id, source="f", value=1.0, created_ms=1)
    body = wire.encode(StepBatch([step], [signal]))
    vault.receive(sys.argv[2], [UploadItem(new_id(), "r", "steps", body)])
    print(step.step_id, flush=True)
"""


def test_kill_9_while_receiving_loses_nothing_that_was_acknowledged(
    vault: Vault, home: Home, device: str, make_step: Make
) -> None:
    line = make_step().policy.line
    acknowledged: list[str] = []
    for kill in range(10):
        command = [sys.executable, "-c", _RECEIVER, str(home.folder), device, line]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout
            acknowledged += [receiver.stdout.readline().strip() for _ in range(5 + 3 * kill)]
            os.kill(receiver.pid, signals.SIGKILL)
            acknowledged += [text.strip() for text in receiver.stdout if text.endswith("\n")]
    kept = {step.step_id for t in vault.ready(line, 100_000) for step in t.steps}
    assert len(acknowledged) >= 185
    assert set(acknowledged) <= kept
    assert vault.stats().signals == vault.stats().steps == len(kept)
    assert vault.database.row("PRAGMA integrity_check") == ("ok",)


_KILLED = """
import os, sys
from pathlib import Path
import msgspec
from clawloop_server.home import open_home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import UploadItem
home = open_home(Path(sys.argv[1]))
vault = Vault.open(home, load_master_key(home))
vault.receive(sys.argv[2], [msgspec.msgpack.decode(sys.stdin.buffer.read(), type=UploadItem)], now_ms=1000)
os.kill(os.getpid(), 9)
"""


def test_an_item_whose_receipt_was_lost_to_a_kill_is_known_when_it_comes_again(
    vault: Vault, home: Home, device: str, make_step: Make
) -> None:
    sent = item([make_step()])
    command = [sys.executable, "-c", _KILLED, str(home.folder), device]
    killed = subprocess.run(command, input=msgspec.msgpack.encode(sent), capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    (received,) = vault.receive(device, [sent], now_ms=2000)
    assert (received.item_id, received.received_ms) == (sent.item_id, 1000)
    assert (vault.stats().items, vault.stats().steps) == (1, 1)


def in_files(home: Home, *texts: bytes) -> list[str]:
    files = [path for path in home.folder.rglob("*") if path.is_file() and home.bases not in path.parents]
    return [f"{text!r} in {path.name}" for path in files for text in texts if text in path.read_bytes()]


def test_neither_ids_nor_content_are_in_any_file_in_the_clear(
    vault: Vault, home: Home, device: str, make_step: Make, make_signal: Make
) -> None:
    step = make_step(run_id="canary-run", session_id="canary-session", trajectory_id="canary-trajectory")
    bad = UploadItem(item_id="canary-item", receipt_id="canary-receipt", kind="steps", body=b"canary-body")
    vault.receive(device, [bad, item([step], [make_signal(Target.RUN, "canary-run")])])
    assert (home.folder / "server.db-wal").stat().st_size > 0
    assert in_files(home, b"canary", step.step_id.encode(), device.encode()) == []
    (home.logs / "hub.log").write_bytes(b"a canary")
    assert in_files(home, b"canary") == ["b'canary' in hub.log"], "the search itself works"


def test_even_inside_the_database_what_a_device_named_is_sealed(
    vault: Vault, home: Home, keys: ServerKeys, device: str, make_step: Make, make_signal: Make
) -> None:
    step = make_step(run_id="canary-run", session_id="canary-session")
    vault.receive(device, [item([step], [make_signal(Target.RUN, "canary-run")], item_id="canary-item")])
    database = open_database(home.database, derive_key(keys.master, "clawloop server.db"), read_only=True)
    tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
    dump = repr([database.execute(f"SELECT * FROM {table}").fetchall() for table in tables])  # noqa: S608
    database.close()
    assert device in dump
    assert "canary" not in dump
    assert step.step_id not in dump


def test_a_record_moved_to_another_row_does_not_open(vault: Vault, device: str, make_step: Make) -> None:
    one, other = make_step(run_id="one"), make_step(run_id="other")
    judged = Signal(signal_id=new_id(), target=Target.SESSION, target_id="session", source="f", value=1.0, created_ms=1)
    vault.receive(device, [item([one, other], [judged])])
    with vault.database.write() as database:
        database.run("UPDATE steps SET sealed = (SELECT sealed FROM steps ORDER BY step_key LIMIT 1)")
    with pytest.raises(StorageError, match="wrong key or changed"):
        vault.ready(one.policy.line, 9)


def test_deleting_a_device_shreds_what_it_sent_and_says_which_rounds_had_learned_from_it(
    vault: Vault, home: Home, add_device: Callable[[], str], make_step: Make, make_signal: Make
) -> None:
    gone, stays = add_device(), add_device()
    for name in (gone, stays):
        vault.receive(name, [item([make_step(run_id="a"), make_step(run_id="b")], [make_signal(Target.RUN, "a")])])
    line = make_step().policy.line
    vault.consume("round", vault.ready(line, 9))
    key = home.device_keys / gone
    assert key.exists()

    report = vault.delete_device(gone)

    assert (report.steps, report.signals, report.items, report.rounds) == (2, 1, 1, ["round"])
    assert vault.stats().steps == 2
    assert vault.stats().trajectories["train"] == {"consumed": 1, "open": 1, "shredded": 1}
    assert not key.exists()
    assert vault.database.row("SELECT 1 FROM vault_keys WHERE owner_id = ?", [gone]) is None
    assert (home.folder / "server.db-wal").stat().st_size == 0, "old pages are gone from the log"
    assert vault.delete_device(gone).steps == 0, "again is harmless"


def test_a_wrong_master_key_opens_nothing(vault: Vault, home: Home) -> None:
    with pytest.raises(KeyMissing, match="does not open with this key"):
        Vault.open(home, bytes(32))


def test_a_home_must_be_private_and_initialised(tmp_path: Path, home: Home) -> None:
    with pytest.raises(HomeError, match="clawloop-server init"):
        homes.open_home(tmp_path / "nothing")
    home.keys.chmod(0o755)
    with pytest.raises(HomeError, match="chmod 700"):
        homes.open_home(home.folder)

"""What a device wants forgotten is gone whole, comes in no more, and takes nothing of anybody else's with it."""

import os
import random
import signal as signals
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from clawloop_server.bases import Base
from clawloop_server.errors import VaultError
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.vault import schema
from clawloop_server.vault.forgetting import asked_of
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.database import migrate, open_database, transaction
from clawloop_shared.envelope import derive_key
from clawloop_shared.errors import StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.lora import FILES
from clawloop_shared.manifest import Evaluation, Probe
from clawloop_shared.messages import ForgetRequest, UploadItem
from clawloop_shared.records import Signal, Step, StepBatch, Target

Make = Callable[..., Any]


def item(steps: list[Step] | None = None, found: list[Signal] | None = None, *, item_id: str = "") -> UploadItem:
    body = wire.encode(StepBatch(steps=steps or [], signals=found or []))
    return UploadItem(item_id=item_id or new_id(), receipt_id=new_id(), kind="steps", body=body)


def asking(device: str, *ids: str, request_id: str = "", everything: bool = False, at_ms: int = 50) -> ForgetRequest:
    return ForgetRequest(
        request_id=request_id or new_id(), device_id=device, at_ms=at_ms, record_ids=list(ids), everything=everything
    )


def counts(vault: Vault) -> tuple[int, int, int]:
    stats = vault.stats()
    return stats.steps, stats.signals, stats.items


def test_a_forgotten_session_is_gone_with_its_item_and_never_comes_in_again(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    gone = [make_step(session_id="a", run_id="r"), make_step(session_id="a", run_id="r")]
    judged = make_signal(Target.RUN, "r")
    sent = item(gone, [judged])
    stays = make_step(session_id="b", run_id="other")
    vault.receive(device, [sent, item([stays], [make_signal(Target.RUN, "other")])])

    done = vault.forget(asking(device, *(s.step_id for s in gone), judged.signal_id))

    assert (done.deleted, done.unknown, done.adapters) == (3, 0, [])
    assert counts(vault) == (1, 1, 1)
    again = [sent, item(gone, [judged]), item([make_step(step_id=gone[0].step_id)])]
    assert [r.item_id for r in vault.receive(device, again)] == [i.item_id for i in again], "acknowledged all the same"
    assert counts(vault)[:2] == (1, 1)
    assert vault.stats().set_aside == {}
    assert [t.steps for t in vault.ready(stays.policy.line, 9)] == [[stays]]


def test_the_same_names_on_another_device_are_not_touched(
    vault: Vault, add_device: Callable[..., str], make_step: Make, make_signal: Make
) -> None:
    one, other = add_device(), add_device()
    step = make_step(run_id="r")
    for device in (one, other):
        vault.receive(device, [item([step], [make_signal(Target.RUN, "r")], item_id="same")])
    vault.forget(asking(one, step.step_id))
    assert counts(vault) == (1, 1, 1)
    assert [t.steps for t in vault.ready(step.policy.line, 9)] == [[step]]
    vault.receive(other, [item([step])])
    assert vault.stats().set_aside == {}


def test_signals_go_with_the_last_step_that_they_could_judge(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    first, second = make_step(run_id="r1", session_id="s"), make_step(run_id="r2", session_id="s")
    of_first, of_session = make_signal(Target.STEP, first.step_id), make_signal(Target.SESSION, "s")
    vault.receive(device, [item([first, second], [of_first, of_session, make_signal(Target.RUN, "r1")])])

    assert vault.forget(asking(device, first.step_id)).deleted == 3
    assert counts(vault) == (1, 1, 1), "the session still has a step"
    assert vault.forget(asking(device, second.step_id)).deleted == 2
    assert counts(vault) == (0, 0, 0)
    late = item(found=[make_signal(Target.STEP, first.step_id), of_first, make_signal(Target.RUN, "r9")])
    vault.receive(device, [late])
    assert counts(vault) == (0, 1, 1), "what judges a forgotten step is not taken"


def test_a_trajectory_goes_on_with_the_steps_and_signals_that_are_left(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    steps = [make_step(run_id="r", created_ms=n) for n in (100, 101)]
    judged = [make_signal(Target.RUN, "r", value) for value in (1.0, -1.0)]
    vault.receive(device, [item(steps, judged)])
    line = steps[0].policy.line
    vault.forget(asking(device, steps[0].step_id, judged[0].signal_id))
    (left,) = vault.ready(line, 9)
    assert (left.steps, left.reward) == ([steps[1]], -1.0)
    vault.forget(asking(device, judged[1].signal_id))
    assert vault.ready(line, 9) == []
    assert vault.stats().trajectories == {"train": {"open": 1}}
    vault.receive(device, [item(found=[make_signal(Target.RUN, "r", 0.5)])])
    assert [t.reward for t in vault.ready(line, 9)] == [0.5]


def test_what_was_set_aside_goes_too_and_so_does_what_nobody_can_read(
    vault: Vault, device: str, make_step: Make
) -> None:
    bad, other = make_step(untrainable="by hand"), make_step(untrainable="by hand")
    unreadable = UploadItem(item_id="i", receipt_id="r", kind="steps", body=b"rubbish")
    vault.receive(device, [item([bad, other]), unreadable])
    done = vault.forget(asking(device, bad.step_id))
    assert (done.deleted, done.unknown) == (2, 0)
    assert vault.stats().set_aside == {"untrainable": 1}
    vault.receive(device, [item([bad])])
    assert vault.stats().set_aside == {"untrainable": 1}, "not even there does it come again"


def test_an_item_can_be_named_for_all_that_came_in_it(
    vault: Vault, device: str, make_step: Make, make_signal: Make
) -> None:
    sent = item([make_step(run_id="r"), make_step()], [make_signal(Target.RUN, "r")])
    vault.receive(device, [sent, item([make_step()])])
    assert vault.forget(asking(device, sent.item_id)).deleted == 3
    assert counts(vault) == (1, 0, 1)
    vault.receive(device, [sent])
    assert counts(vault) == (1, 0, 1)


def test_what_had_not_come_yet_is_unknown_and_does_not_come_later(vault: Vault, device: str, make_step: Make) -> None:
    step, under_way = make_step(), item([make_step()])
    done = vault.forget(asking(device, step.step_id, under_way.item_id, step.step_id))
    assert (done.deleted, done.unknown) == (0, 2)
    vault.receive(device, [item([step]), under_way])
    assert counts(vault)[0] == 0


def test_asked_again_the_answer_is_the_same_and_another_question_needs_another_id(
    vault: Vault, device: str, make_step: Make
) -> None:
    step = make_step()
    vault.receive(device, [item([step])])
    first = vault.forget(asking(device, step.step_id, "x", request_id="one", at_ms=50), now_ms=51)
    again = vault.forget(asking(device, "x", step.step_id, request_id="one", at_ms=90_000), now_ms=90_001)
    assert again == first
    assert first.at_ms == 51
    for other in (asking(device, "y", request_id="one"), asking(device, everything=True, request_id="one")):
        with pytest.raises(VaultError, match="asked for something else before"):
            vault.forget(other)
    (asked,) = asked_of(vault.database, device)
    assert (asked.request_id, asked.everything, asked.deleted, asked.unknown) == ("one", False, 1, 1)


def test_everything_goes_with_the_key_and_only_what_is_made_later_comes_in(
    vault: Vault, home: Home, add_device: Callable[..., str], make_step: Make, make_signal: Make
) -> None:
    gone, stays = add_device(), add_device()
    old = make_step(run_id="r", created_ms=100)
    for device in (gone, stays):
        bad = make_step(untrainable="x", created_ms=100)
        vault.receive(device, [item([old, bad], [make_signal(Target.RUN, "r", created_ms=100)])])
    key = home.device_keys / gone
    before = key.read_bytes()

    done = vault.forget(asking(gone, everything=True, at_ms=100), now_ms=1000)

    assert (done.deleted, done.unknown) == (3, 0)
    assert not key.exists()
    assert counts(vault) == (1, 1, 1)
    assert vault.database.count("SELECT count(*) FROM trajectories WHERE device_id = ?", [gone]) == 0
    assert (home.folder / "server.db-wal").stat().st_size == 0, "old pages are gone from the log"
    new = make_step(run_id="r", created_ms=101)
    vault.receive(gone, [item([old, new], [make_signal(Target.RUN, "r", created_ms=101)])])
    assert key.read_bytes() != before
    assert [t.steps for t in vault.ready(old.policy.line, 9)] == [[old], [new]]


def test_what_was_made_by_a_clock_that_runs_ahead_is_kept_out_by_that_clock(
    vault: Vault, device: str, make_step: Make
) -> None:
    vault.forget(asking(device, everything=True, at_ms=5_000), now_ms=1_000)
    vault.receive(device, [item([make_step(created_ms=5_000), make_step(created_ms=5_001)])])
    assert counts(vault)[0] == 1


def test_a_revoked_device_may_still_have_its_own_deleted(vault: Vault, device: str, make_step: Make) -> None:
    step = make_step()
    vault.receive(device, [item([step])])
    Devices(vault.database).revoke(device)
    assert vault.forget(asking(device, step.step_id)).deleted == 1
    assert vault.forget(asking(device, everything=True)).deleted == 0
    assert vault.forget(asking(device, "x")).unknown == 1


def released(registry: Registry, base: Base, *, round_id: str) -> int:
    candidate = Candidate(
        round_id=round_id,
        line=base.line,
        files=dict.fromkeys(FILES, b"x"),
        rank=1,
        alpha=1.0,
        target_modules=["q_proj"],
        probe=Probe(ids=[1], logprobs=[-1.0]),
        evaluation=Evaluation(suite="", episodes=0, reward=0.0, reward_before=0.0, standard_error=0.0),
        lineage_root="",
    )
    return registry.record_candidate(candidate)


def test_adapters_are_named_that_learned_from_it_or_went_on_from_one_that_had(
    vault: Vault, home: Home, base: Base, device: str, make_step: Make, make_signal: Make
) -> None:
    registry = Registry(vault.database, home.adapters)
    steps = {}

    def run(name: str, base_version: int) -> int:
        steps[name] = make_step(run_id=name)
        vault.receive(device, [item([steps[name]], [make_signal(Target.RUN, name)])])
        found = vault.ready(base.line_id, 9)
        round_id = registry.start_round(base.line_id, base_version=base_version, trajectories=1, steps=1)
        with registry.within() as database:
            vault.consume(round_id, found, database)
            version = released(registry, base, round_id=round_id)
            registry.finish_round(round_id, RoundState.PASSED, version=version)
        return version

    assert [run("a", 0), run("b", 1), run("c", 0), run("d", 2)] == [1, 2, 3, 4]
    assert registry.copy_adapter(2) == 5, "released again after a rollback"
    assert run("e", 5) == 6
    found = {name: vault.forget(asking(device, steps[name].step_id)).adapters for name in "cba"}
    assert found == {"c": [3], "b": [2, 4, 5, 6], "a": [1, 2, 4, 5, 6]}
    assert vault.stats().trajectories == {"train": {"consumed": 2, "shredded": 3}}
    assert vault.forget(asking(device, everything=True)).adapters == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["steps", "signals", "everything", "device"])
def test_what_is_forgotten_is_lost_to_a_round_under_way_and_to_the_next_one(
    vault: Vault, home: Home, base: Base, device: str, make_step: Make, make_signal: Make, what: str
) -> None:
    step, judged = make_step(run_id="r"), make_signal(Target.RUN, "r")
    vault.receive(device, [item([step], [judged])])
    assert vault.pin("round", base.line_id, 9) == (1, 1)
    (pin,) = vault.pins.of("round")
    assert [t.steps for t in vault.pins.read([pin.trajectory_id])] == [[step]]
    if what == "device":
        vault.delete_device(device)
    else:
        names = {"steps": [step.step_id], "signals": [judged.signal_id], "everything": []}[what]
        assert vault.forget(asking(device, *names, everything=what == "everything")).adapters == []
    (pin,) = vault.pins.of("round")
    assert pin.lost
    assert list(vault.pins.read([pin.trajectory_id])) == []
    assert vault.ready(base.line_id, 9) == []
    assert vault.database.count("SELECT sum(length(names)) FROM pins") == 0, "not even which rows they were"


def test_without_a_round_under_way_nothing_of_it_is_left_to_consume(
    vault: Vault, base: Base, device: str, make_step: Make, make_signal: Make
) -> None:
    step = make_step(run_id="r")
    vault.receive(device, [item([step], [make_signal(Target.RUN, "r")])])
    found = vault.ready(base.line_id, 9)
    vault.forget(asking(device, step.step_id))
    assert vault.database.count("SELECT count(*) FROM trajectories") == 0
    with pytest.raises(VaultError, match="not ready any more"):
        vault.consume("round", found)


def test_no_row_of_a_forgotten_record_is_left_in_any_table(
    vault: Vault, home: Home, keys: ServerKeys, device: str, make_step: Make, make_signal: Make
) -> None:
    step, judged = make_step(run_id="r"), make_signal(Target.RUN, "r")
    sent = item([step, make_step(untrainable="x", step_id="bad")], [judged])
    vault.receive(device, [sent])
    kept = "SELECT sealed FROM steps UNION SELECT sealed FROM signals"
    aside = "SELECT sealed FROM set_aside UNION SELECT sealed FROM items"
    sealed = [row[0] for query in (kept, aside) for row in vault.database.rows(query)]
    assert len(sealed) == 4
    vault.forget(asking(device, step.step_id, judged.signal_id, "bad"))
    assert (home.folder / "server.db-wal").stat().st_size == 0
    database = open_database(home.database, derive_key(keys.master, "clawloop server.db"), read_only=True)
    tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
    found = {cell for table in tables for row in database.execute(f"SELECT * FROM {table}").fetchall() for cell in row}  # noqa: S608
    database.close()
    assert not found & set(sealed)
    assert not {cell for cell in found if isinstance(cell, str)} & {step.step_id, "bad", judged.signal_id}


def test_while_the_log_is_read_it_is_not_acknowledged(
    vault: Vault, home: Home, keys: ServerKeys, device: str, make_step: Make
) -> None:
    step = make_step()
    vault.receive(device, [item([step])])
    reader = Vault.open(home, keys.master)
    vault.database.run("PRAGMA busy_timeout = 50")
    with reader.database.snapshot() as reading:
        assert reading.count("SELECT count(*) FROM steps") == 1
        with pytest.raises(StorageError, match="run it again"):
            vault.forget(asking(device, step.step_id, request_id="one"))
    assert vault.forget(asking(device, step.step_id, request_id="one")).deleted == 1
    assert (home.folder / "server.db-wal").stat().st_size == 0
    reader.close()


def test_a_vault_of_before_there_was_forgetting_forgets(
    home: Home, keys: ServerKeys, base: Base, make_step: Make, make_signal: Make
) -> None:
    database = open_database(home.database, derive_key(keys.master, "clawloop server.db"))
    migrate(database, "server", migrations=[schema._tables])
    (vault_id,) = database.execute("SELECT value FROM meta").fetchone()
    seal = DeviceSeal.new(vault_id=vault_id, device_id=(device := new_id()))
    step, judged = make_step(run_id="r"), make_signal(Target.RUN, "r")
    names = [seal.name(*name) for name in (("step", step.step_id), ("run", "r"), ("session", "session"))]
    with transaction(database):
        database.execute(
            "INSERT INTO devices VALUES (?, NULL, NULL, NULL, ?, 'joined', 0, 1, 1)", [device, base.line_id]
        )
        database.execute("INSERT INTO device_secrets VALUES (?, ?)", [device, seal.wrap(keys.master)])
        sql = "INSERT INTO trajectories VALUES ('t', ?, ?, 'train', 'ready', 1, NULL, 1)"
        database.execute(sql, [device, base.line_id])
        plain = seal.seal("steps", names[0], plain=msgspec.msgpack.encode(step))
        database.execute("INSERT INTO steps VALUES (?, ?, ?, ?, x'', 't', x'', 5, ?)", [device, *names, plain])
        key = seal.name("signal", judged.signal_id)
        plain = seal.seal("signals", key, plain=msgspec.msgpack.encode(judged))
        database.execute("INSERT INTO signals VALUES (?, ?, ?, x'', ?)", [device, key, names[1], plain])
        database.execute("INSERT INTO set_aside VALUES (?, x'01', 'untrainable', x'', 1)", [device])
    database.close()
    vault = Vault.open(home, keys.master)
    assert [t.steps for t in vault.ready(base.line_id, 9)] == [[step]]
    assert vault.forget(asking(device, step.step_id)).deleted == 3
    assert counts(vault) == (0, 0, 0)
    vault.close()


_FORGETTER = """
import sys
from pathlib import Path
import msgspec
from clawloop_server.home import open_home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import ForgetRequest
home = open_home(Path(sys.argv[1]))
vault = Vault.open(home, load_master_key(home))
for line in sys.stdin:
    request = msgspec.json.decode(line, type=ForgetRequest)
    print("at it", flush=True)
    print(msgspec.json.encode(vault.forget(request)).decode(), flush=True)
"""


def test_kill_9_while_forgetting_leaves_no_half_and_the_same_answer(
    vault: Vault, home: Home, device: str, make_step: Make, make_signal: Make
) -> None:
    rng, size, answered = random.Random(3), 40, dict[str, str]()
    waiting = []
    for n in range(24):
        steps = [make_step(session_id=f"s{n}") for _ in range(size)]
        vault.receive(device, [item(steps, [make_signal(Target.SESSION, f"s{n}")])])
        waiting.append(asking(device, *(s.step_id for s in steps), request_id=f"q{n}"))
    requests = list(waiting)
    for _ in range(8):
        command = [sys.executable, "-c", _FORGETTER, str(home.folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin
            assert child.stdout
            child.stdin.write("".join(msgspec.json.encode(request).decode() + "\n" for request in waiting))
            child.stdin.flush()
            lines = [child.stdout.readline() for _ in range(rng.randrange(1, 8))]
            os.kill(child.pid, signals.SIGKILL)
            lines += list(child.stdout)
        for line in lines:
            if line.startswith("{") and line.endswith("}\n"):
                answered[msgspec.json.decode(line)["request_id"]] = line
        done = {one.request_id for one in asked_of(vault.database, device)}
        waiting = [request for request in requests if request.request_id not in done]
        assert done >= answered.keys()
        assert vault.stats().steps == size * len(waiting)
        assert vault.stats().signals == vault.stats().items == len(waiting)
    assert vault.database.row("PRAGMA integrity_check") == ("ok",)
    assert answered
    for request in requests:
        receipt = msgspec.json.encode(vault.forget(request)).decode() + "\n"
        assert answered.get(request.request_id, receipt) == receipt
    assert counts(vault) == (0, 0, 0)

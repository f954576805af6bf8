"""The chain over all changes: what is kept again, put back, taken out or slipped in does not go unseen."""

from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawloop_edge.pool import heads
from clawloop_edge.pool.keys import KeyBundle, KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import open_database, transaction

from .conftest import MakeKept, MakeSignal

if TYPE_CHECKING:
    from sqlite_utils import Database


def problems(pool: Pool) -> list[str]:
    """What the chain's check finds."""
    with pool.read() as database:
        return list(heads.check(database, pool.chain_key))


def run(pool: Pool, statement: str, *parameters: object) -> None:
    """One statement in the writer's thread."""
    pool.submit(lambda database: database.execute(statement, parameters)).result()


def test_each_change_moves_the_head_and_a_noted_head_is_told_later(
    pool: Pool, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    seen = [pool.submit(heads.current).result()]
    kept = make_kept()
    pool.keep_step(kept).result()
    seen.append(pool.submit(heads.note).result())
    pool.keep_signal(make_signal(kept.step.step_id)).result()
    pool.keep_step(kept).result()  # there already: no change
    seen.append(pool.submit(heads.note).result())
    assert [head.seq for head in seen] == [0, 1, 2]
    assert len({head.head for head in seen}) == 3
    assert pool.submit(heads.note).result() == seen[-1]
    pool.keep_step(make_kept()).result()
    with pool.read() as database:
        assert [heads.head_at(database, head.seq) for head in seen] == [None, seen[1].head, seen[2].head]
        assert heads.head_at(database, 3) == heads.current(database).head
        assert heads.head_at(database, 4) is None
    assert problems(pool) == []


def test_a_change_taken_out_with_its_record_is_seen(pool: Pool, make_kept: MakeKept) -> None:
    for each in (make_kept(), make_kept(), make_kept()):
        pool.keep_step(each).result()
    run(pool, "DELETE FROM steps WHERE seq = 2")
    run(pool, "DELETE FROM changes WHERE seq = 2")
    assert problems(pool)[0] == "changes 2 to 2 are missing; restore a backup"
    assert len(problems(pool)) == 2


def test_a_row_sealed_anew_is_seen(pool: Pool, make_kept: MakeKept) -> None:
    kept = make_kept()
    pool.keep_step(kept).result()

    def seal_anew(database: "Database") -> None:
        scope = pool.keyring.find(database, "session/session-1")
        place = {"table": "steps", "record": kept.step.step_id}
        sealed = database.execute("SELECT talk FROM steps").fetchone()[0]
        plain = scope.unseal(place["table"], place["record"], column="talk", sealed=sealed)
        again = scope.seal(place["table"], place["record"], column="talk", plain=plain)
        database.execute("UPDATE steps SET talk = ?", (again,))

    pool.submit(seal_anew).result()
    assert pool.get_step(kept.step.step_id) == kept
    assert pool.verify().problems == [f"change 1: step {kept.step.step_id} is not what was kept then"]


def test_a_row_taken_out_or_slipped_in_is_seen(pool: Pool, make_kept: MakeKept, make_signal: MakeSignal) -> None:
    kept = make_kept()
    signal = make_signal(kept.step.step_id)
    pool.keep_step(kept).result()
    pool.keep_signal(signal).result()
    run(pool, "CREATE TABLE aside AS SELECT * FROM signals")
    run(pool, "DELETE FROM signals")
    assert problems(pool) == [f"change 2: signal {signal.signal_id} is missing, and was not forgotten"]
    run(pool, "INSERT INTO signals SELECT * FROM aside")
    run(pool, "UPDATE aside SET signal_id = 'other', seq = 3")
    run(pool, "INSERT INTO signals SELECT * FROM aside")
    assert problems(pool) == ["signals has 2 rows, and the chain tells of 1"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 8), st.sampled_from(["leaf", "chain", "heads"]))
def test_no_mac_of_the_chain_can_be_changed_unseen(pool: Pool, make_kept: MakeKept, seq: int, where: str) -> None:
    while pool.stats().last_seq < 8:
        pool.keep_step(make_kept()).result()
        pool.submit(heads.note).result()
    change = {
        "leaf": ("UPDATE changes SET leaf = ? WHERE seq = ?", "SELECT leaf FROM changes WHERE seq = ?"),
        "chain": ("UPDATE chain SET head = ? WHERE ?", "SELECT head FROM chain WHERE ?"),
        "heads": ("UPDATE heads SET head = ? WHERE seq = ?", "SELECT head FROM heads WHERE seq = ?"),
    }[where]
    with pool.read() as database:
        good = database.execute(change[1], (seq,)).fetchone()[0]
    run(pool, change[0], bytes(32), seq)
    assert problems(pool) != []
    run(pool, change[0], good, seq)
    assert problems(pool) == []


def test_what_is_forgotten_keeps_its_place_in_the_chain(pool: Pool, make_kept: MakeKept) -> None:
    for _ in range(3):
        pool.keep_step(make_kept()).result()

    def forget(database: "Database") -> None:
        database.execute("DELETE FROM steps WHERE seq = 2")
        heads.mark_forgotten(database, [2])

    pool.submit(forget).result()
    assert problems(pool) == []
    with pool.read() as database:
        rows = database.execute("SELECT kind, record_id, session_id FROM changes WHERE seq = 2").fetchall()
    assert rows == [("forgotten", "", "")]


def test_another_rooms_records_are_in_the_chain_if_it_wants(pool: Pool) -> None:
    place = heads.Chained("note", "notes", ("body",), "t.note_id = CAST(c.record_id AS INTEGER)")

    def notes(database: "Database") -> None:
        database.execute("CREATE TABLE notes (note_id INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT")

    def write(database: "Database") -> None:
        for number in range(3):
            body = bytes([number])
            heads.append(database, pool.chain_key, kind="note", record_id=str(number), session_id="", sealed=(body,))
            database.execute("INSERT INTO notes VALUES (?, ?)", (number, body))

    pool.adopt("notes", (notes,), chained=(place,))
    pool.submit(write).result()
    assert pool.verify().ok
    run(pool, "UPDATE notes SET body = x'07' WHERE note_id = 1")
    assert pool.verify().problems == ["change 2: note 1 is not what was kept then"]


def test_changes_that_were_kept_before_there_was_a_chain_are_taken_in(
    tmp_path: Path, key: bytes, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    kept = [make_kept() for _ in range(3)]
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        for each in kept:
            pool.keep_step(each).result()
        pool.keep_signal(make_signal(kept[0].step.step_id)).result()
    database = open_database(tmp_path / "pool.db", KeyBundle.of(key).file_key)
    with transaction(database):
        for statement in (
            "DROP TABLE chain",
            "DROP TABLE heads",
            "ALTER TABLE changes DROP COLUMN leaf",
            "DELETE FROM changes WHERE seq = 2",
            "DELETE FROM _sqlite_migrations WHERE name = 'chain_kept_changes'",
        ):
            database.conn.execute(statement)
    database.close()
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        assert [change.seq for change in pool.changes(0, 9)] == [1, 3, 4]
        assert problems(pool) == ["steps has 3 rows, and the chain tells of 2"]
        with pool.read() as reader:
            assert heads.current(reader).seq == 4

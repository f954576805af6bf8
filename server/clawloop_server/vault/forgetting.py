"""Taking out of the vault what a device wants forgotten, and keeping it from coming in again.

Named records go with what has no meaning without them: signals that judge nothing any more, items that held nothing
else, trajectories without steps. Their keyed names stay as tombstones. A delta goes by the name of its item: which
steps it was learned from, nobody told. Everything goes with the device's key; then nothing that was made before is
taken any more. Knows no signature, no HTTP and no clock. Format: docs/formats/vault.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from clawloop_server.errors import VaultError
from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.deltas import DeltaState
from clawloop_server.vault.pins import lose
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals, forget_keys
from clawloop_server.vault.sums import SUMS_WITH_DEVICE, SUMS_WITH_DOOMED, shred_sums
from clawloop_shared.files import sha256
from clawloop_shared.messages import ForgetReceipt, ForgetRequest
from clawloop_shared.records import Mark, Signal, Step

_KINDS = ("step", "signal", "item")
_NAMES = ("step_key", "run_key", "session_key", "named_key")


class Erased(msgspec.Struct, frozen=True):
    """What was deleted, in numbers, and which rounds had learned from any of it before."""

    steps: int
    signals: int
    items: int
    set_aside: int
    rounds: list[str]
    deltas: int = 0
    adapters: list[int] = []
    """versions that those rounds made, or that went on from one of them"""

    @property
    def records(self) -> int:
        """How much that is in words of the device."""
        return self.steps + self.signals + self.set_aside + self.deltas


class Asked(msgspec.Struct, frozen=True):
    """One request of a device to forget, and what came of it."""

    request_id: str
    at_ms: int
    everything: bool
    deleted: int
    unknown: int
    adapters: list[int]


@dataclass(frozen=True)
class Graves:
    """What of one device must not come in again: names, and all that was made up to `before_ms` (0: nothing was)."""

    database: ServerDatabase
    seal: DeviceSeal
    before_ms: int
    named: bool

    @classmethod
    def of(cls, database: ServerDatabase, seal: DeviceSeal) -> Graves:
        """Those of the device that `seal` is of."""
        own = [seal.device_id]
        before_ms = database.count("SELECT max(before_ms) FROM forgotten WHERE device_id = ?", own)
        named = database.row("SELECT 1 FROM tombstones WHERE device_id = ? LIMIT 1", own) is not None
        return cls(database, seal, before_ms, named)

    def hold(self, record: Step | Signal | Mark) -> bool:
        """Whether a record was forgotten, or is about a step that was."""
        if self.before_ms and record.created_ms <= self.before_ms:
            return True
        if not isinstance(record, Signal):
            return self.hold_name("step", record.step_id)
        return self.hold_name("signal", record.signal_id) or self.hold_name(record.target, record.target_id)

    def hold_name(self, kind: str, name: str) -> bool:
        """Whether there is a tombstone for this name."""
        sql = "SELECT 1 FROM tombstones WHERE device_id = ? AND name_key = ?"
        return self.named and self.database.row(sql, [self.seal.device_id, self.seal.name(kind, name)]) is not None


def forget(database: ServerDatabase, seals: DeviceSeals, *, request: ForgetRequest, now_ms: int) -> ForgetReceipt:
    """Do what a device asks, in one transaction; what was asked before is answered as it was, and done no second time.

    After `everything`, records made up to `request.at_ms` are kept out: both are times of the device's own clock.

    Raises:
        VaultError: another request of this device had this id.
        StorageError: the disk is full or broken; nothing was deleted.
    """
    ids = sorted(set(request.record_ids))
    digest = sha256(msgspec.json.encode([request.everything, ids]))
    with database.write():
        found = _answered(database, request, digest=digest)
        if found is not None:
            return found
        if request.everything:
            erased, unknown, before_ms = erase_device(database, request.device_id), 0, request.at_ms
        else:
            (erased, unknown), before_ms = _erase_named(database, seals, device_id=request.device_id, ids=ids), 0
        receipt = ForgetReceipt(
            request_id=request.request_id,
            device_id=request.device_id,
            deleted=erased.records,
            unknown=unknown,
            adapters=erased.adapters,
            at_ms=now_ms,
        )
        _write_down(database, receipt, digest=digest, before_ms=before_ms)
    return receipt


def asked_of(database: ServerDatabase, device_id: str) -> list[Asked]:
    """What a device asked to forget so far, oldest first."""
    rows = database.rows(
        "SELECT request_id, at_ms, before_ms > 0, deleted, unknown, adapters FROM forgotten WHERE device_id = ?"
        " ORDER BY at_ms, request_id",
        [device_id],
    )
    return [Asked(row[0], row[1], bool(row[2]), row[3], row[4], msgspec.json.decode(row[5])) for row in rows]


def _answered(database: ServerDatabase, request: ForgetRequest, *, digest: str) -> ForgetReceipt | None:
    row = database.row(
        "SELECT digest, deleted, unknown, adapters, at_ms FROM forgotten WHERE device_id = ? AND request_id = ?",
        [request.device_id, request.request_id],
    )
    if row is None:
        return None
    if row[0] != digest:
        raise VaultError(
            f"request {request.request_id} asked for something else before; give this one an id of its own"
        )
    return ForgetReceipt(
        request_id=request.request_id,
        device_id=request.device_id,
        deleted=row[1],
        unknown=row[2],
        adapters=msgspec.json.decode(row[3], type=list[int]),
        at_ms=row[4],
    )


def _write_down(database: ServerDatabase, receipt: ForgetReceipt, *, digest: str, before_ms: int) -> None:
    adapters = msgspec.json.encode(receipt.adapters).decode()
    facts = [before_ms, receipt.deleted, receipt.unknown, adapters, receipt.at_ms]
    database.run(
        "INSERT INTO forgotten VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [receipt.device_id, receipt.request_id, digest, *facts]
    )


def _erase_named(
    database: ServerDatabase, seals: DeviceSeals, *, device_id: str, ids: Sequence[str]
) -> tuple[Erased, int]:
    seal = seals.get(device_id)
    if seal is None:
        joined = database.row("SELECT 1 FROM devices WHERE device_id = ? AND state = 'joined'", [device_id])
        if joined is None:  # it can send nothing any more, so nothing has to be kept out
            return Erased(steps=0, signals=0, items=0, set_aside=0, rounds=[]), len(ids)
        seal = seals.ensure(device_id)
    return erase_records(database, seal, ids=ids)


def erase_records(database: ServerDatabase, seal: DeviceSeal, *, ids: Sequence[str]) -> tuple[Erased, int]:
    """Delete the steps, signals and items of these names, and what has no meaning without them; leave tombstones.

    Gives what that came to, and how many of the names were of nothing.
    """
    run, device = database.run, [seal.device_id]
    _prepare(database)
    unknown = sum(_doom(database, seal, name=name) for name in ids)
    for select in (
        "SELECT step_key FROM steps WHERE device_id = ? AND item_key IN temp.doomed",
        "SELECT signal_key FROM signals WHERE device_id = ? AND item_key IN temp.doomed",
    ):
        run(f"INSERT OR IGNORE INTO temp.doomed {select}", device)
    _note_touched(database, device)
    steps = run("DELETE FROM steps WHERE device_id = ? AND step_key IN temp.doomed", device)
    run("DELETE FROM marks WHERE device_id = ? AND step_key IN temp.doomed", device)
    _doom_idle_signals(database, device)
    signals = run("DELETE FROM signals WHERE device_id = ? AND signal_key IN temp.doomed", device)
    _doom_empty_items(database)
    items = run("DELETE FROM items WHERE device_id = ? AND item_key IN temp.doomed", device)
    deltas, joined = _erase_deltas(database, "device_id = ? AND item_key IN temp.doomed", device)
    summed, joined_sums = _erase_deltas(database, SUMS_WITH_DOOMED, device)
    shred_sums(database, seal.device_id, doomed=True)
    deltas, joined = deltas + summed, joined + joined_sums
    # What cannot be told apart (an item that could not be read) may hold any of it.
    unclear = "DELETE FROM set_aside WHERE device_id = ? AND (name_key = x'' OR name_key IN temp.doomed)"
    set_aside = run(unclear, device)
    run("INSERT OR IGNORE INTO tombstones SELECT ?, key FROM temp.doomed", device)
    counts = {"steps": steps, "signals": signals, "items": items, "set_aside": set_aside, "deltas": deltas}
    return _erased(database, counts, joined=joined), unknown


def erase_device(database: ServerDatabase, device_id: str) -> Erased:
    """Delete all that a device sent, with its tombstones, and the secure sums that it is in; of the keys of these
    nothing opens any more, and `DeviceSeals.bury` takes them away."""
    _prepare(database)
    database.run("INSERT INTO temp.touched SELECT trajectory_id FROM trajectories WHERE device_id = ?", [device_id])
    steps, signals, items, set_aside, *_ = (
        database.run(f"DELETE FROM {table} WHERE device_id = ?", [device_id])  # noqa: S608 constant names
        for table in ("steps", "signals", "items", "set_aside", "marks", "tombstones")
    )
    forget_keys(database, "owner_id = ?", [device_id])
    deltas, joined = _erase_deltas(database, "device_id = ?", [device_id])
    summed, joined_sums = _erase_deltas(database, SUMS_WITH_DEVICE, [device_id])
    shred_sums(database, device_id, doomed=False)
    deltas, joined = deltas + summed, joined + joined_sums
    counts = {"steps": steps, "signals": signals, "items": items, "set_aside": set_aside, "deltas": deltas}
    return _erased(database, counts, joined=joined)


def _erase_deltas(database: ServerDatabase, which: str, values: Sequence[str]) -> tuple[int, list[str]]:
    """Delete these deltas; how many still were more than a row, and the rounds whose adapters have some of them. Of
    those the rows stay, so that the rounds are explained."""
    there = f"{which} AND state != '{DeltaState.SHREDDED}'"
    of = f"FROM deltas WHERE {there} AND state = '{DeltaState.JOINED}'"
    number = database.count(f"SELECT count(*) FROM deltas WHERE {there}", values)  # noqa: S608 constant text
    rounds = [row[0] for row in database.rows(f"SELECT DISTINCT round_id {of} ORDER BY 1", values)]
    shred = f"UPDATE deltas SET state = '{DeltaState.SHREDDED}', sealed = NULL WHERE {there}"  # noqa: S608
    database.run(f"{shred} AND state = '{DeltaState.JOINED}'", values)
    database.run(f"DELETE FROM deltas WHERE {there}", values)  # noqa: S608
    return number, rounds


def _erased(database: ServerDatabase, counts: Mapping[str, int], *, joined: Sequence[str]) -> Erased:
    rounds = sorted({*_settle(database), *joined})
    return Erased(**counts, rounds=rounds, adapters=adapters_after(database, rounds))


def adapters_after(database: ServerDatabase, rounds: Iterable[str]) -> list[int]:
    """The versions that these rounds made, and those that went on from one of them, or joined what a device had learned
    beside one of them."""
    found = database.rows(
        "WITH RECURSIVE went_on (round_id, base_version) AS (SELECT round_id, base_version FROM rounds UNION"
        " SELECT round_id, base_version FROM deltas WHERE state IN ('joined', 'shredded')),"
        " learned (round_id) AS (SELECT value FROM json_each(?) UNION"
        " SELECT w.round_id FROM learned JOIN adapters a ON a.round_id = learned.round_id"
        " JOIN went_on w ON w.base_version = a.version)"
        " SELECT version FROM adapters WHERE round_id IN learned ORDER BY version",
        [msgspec.json.encode(list(rounds)).decode()],
    )
    return [version for (version,) in found]


def _prepare(database: ServerDatabase) -> None:
    """Working sets, in memory: rows to delete, trajectories that lose something, what could be judged, items opened."""
    for name in ("doomed", "touched", "judged", "opened"):
        database.run(f"CREATE TEMP TABLE IF NOT EXISTS {name} (key PRIMARY KEY) WITHOUT ROWID")
        database.run(f"DELETE FROM temp.{name}")  # noqa: S608 constant names


def _doom(database: ServerDatabase, seal: DeviceSeal, *, name: str) -> bool:
    """Mark a name as every kind that it may be of; whether there is nothing of that name."""
    keys = [seal.name(kind, name) for kind in _KINDS]
    database.run_each("INSERT OR IGNORE INTO temp.doomed VALUES (?)", [[key] for key in keys])
    own = [seal.device_id]
    return not database.count(
        "SELECT EXISTS (SELECT 1 FROM steps WHERE device_id = ? AND step_key = ?)"
        " OR EXISTS (SELECT 1 FROM signals WHERE device_id = ? AND signal_key = ?)"
        " OR EXISTS (SELECT 1 FROM items WHERE device_id = ? AND item_key = ?)"
        " OR EXISTS (SELECT 1 FROM set_aside WHERE device_id = ? AND name_key IN (?, ?))"
        " OR EXISTS (SELECT 1 FROM secure_members WHERE device_id = ? AND item_key = ?)",
        [*own, keys[0], *own, keys[1], *own, keys[2], *own, keys[0], keys[1], *own, keys[2]],
    )


def _note_touched(database: ServerDatabase, device: Sequence[str]) -> None:
    """Which trajectories lose steps or signals, what can have judged the lost steps, and which items held them."""
    lost = "FROM steps WHERE device_id = ? AND step_key IN temp.doomed"
    judged = "SELECT target_key FROM signals WHERE device_id = ?1 AND signal_key IN temp.doomed"
    database.run(f"INSERT OR IGNORE INTO temp.touched SELECT trajectory_id {lost}", device)
    database.run(f"INSERT OR IGNORE INTO temp.opened SELECT item_key {lost}", device)
    for name in _NAMES:
        database.run(f"INSERT OR IGNORE INTO temp.judged SELECT {name} {lost}", device)
        # Of a step the key of the table begins with the device; the others have indexes of their own.
        mine = "device_id = ?1 AND " if name == "step_key" else ""
        found = f"SELECT trajectory_id FROM steps WHERE {mine}{name} IN ({judged})"  # noqa: S608 constant names
        database.run(f"INSERT OR IGNORE INTO temp.touched {found}", device)


def _doom_idle_signals(database: ServerDatabase, device: Sequence[str]) -> None:
    """Mark the signals on what had a step and has none any more, and note which items held a signal that goes."""
    # CROSS JOIN keeps this order: what is forgotten is little, what a device ever said is much.
    database.run(
        "INSERT OR IGNORE INTO temp.doomed SELECT signal_key FROM temp.judged j"
        " CROSS JOIN signals g ON g.target_key = j.key WHERE g.device_id = ? AND j.key != x''"
        " AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.device_id = g.device_id AND s.step_key = j.key)"
        " AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.run_key = j.key)"
        " AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.session_key = j.key)"
        " AND NOT EXISTS (SELECT 1 FROM steps s WHERE s.named_key = j.key)",
        device,
    )
    lost = "SELECT item_key FROM signals WHERE device_id = ? AND signal_key IN temp.doomed"
    database.run(f"INSERT OR IGNORE INTO temp.opened {lost}", device)


def _doom_empty_items(database: ServerDatabase) -> None:
    """Mark the items that lost a record and have none left."""
    database.run(
        "INSERT OR IGNORE INTO temp.doomed SELECT key FROM temp.opened WHERE key != x''"
        " AND NOT EXISTS (SELECT 1 FROM steps WHERE item_key = key)"
        " AND NOT EXISTS (SELECT 1 FROM signals WHERE item_key = key)"
    )


def _settle(database: ServerDatabase) -> list[str]:
    """Bring the touched trajectories in line with what is left of them; the rounds that had consumed them.

    One that a round consumed stays as a row, so that the round is explained. To a round that runs it is lost: what
    learned from it is not published (`pins`).
    """
    touched = "FROM trajectories WHERE trajectory_id IN temp.touched"
    consumed = f"SELECT DISTINCT round_id {touched} AND round_id IS NOT NULL ORDER BY 1"
    rounds = [row[0] for row in database.rows(consumed)]
    groups = [row[0] for row in database.rows(f"SELECT DISTINCT group_id {touched}")]
    empty = "(SELECT key FROM temp.touched WHERE NOT EXISTS (SELECT 1 FROM steps WHERE trajectory_id = key))"
    database.run(
        "UPDATE trajectories SET account = NULL, (steps, tokens) = (SELECT count(*), coalesce(sum(s.tokens), 0)"
        " FROM steps s WHERE s.trajectory_id = trajectories.trajectory_id) WHERE trajectory_id IN temp.touched"
    )
    database.run(
        f"UPDATE trajectories SET state = 'shredded' WHERE trajectory_id IN {empty}"  # noqa: S608 constant text
        " AND round_id IS NOT NULL"
    )
    lose(database, "SELECT key FROM temp.touched")
    database.run(f"DELETE FROM trajectories WHERE trajectory_id IN {empty} AND state != 'shredded'")  # noqa: S608
    standing.update(database, [row[0] for row in database.rows("SELECT key FROM temp.touched")])
    standing.update_groups(database, groups)
    return rounds

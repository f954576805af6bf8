"""The tables of server.db, as ordered migrations. What a device named (ids, text) is in sealed columns alone.

Look-ups go by keyed hashes (`*_key` columns), so that neither names nor times of a deleted device can be read from an
old copy of the file, even with the master key. The devices' keys are in no table (`seals`). Format:
docs/formats/vault.md.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from clawloop_shared import wire
from clawloop_shared.database import migrate as shared_migrate
from clawloop_shared.ids import new_id
from clawloop_shared.log_head import entry_leaf
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.merkle import appended

if TYPE_CHECKING:
    from sqlite_utils import Database

_FIRST = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE devices (
  device_id TEXT PRIMARY KEY, device_key BLOB UNIQUE, node_key_pem TEXT UNIQUE, node_id TEXT UNIQUE,
  line_id TEXT NOT NULL, state TEXT NOT NULL, adapter_version INTEGER NOT NULL DEFAULT 0,
  joined_ms INTEGER NOT NULL, seen_ms INTEGER NOT NULL DEFAULT 0);
CREATE TABLE device_secrets (device_id TEXT PRIMARY KEY REFERENCES devices, wrapped BLOB NOT NULL);
CREATE TABLE invitations (
  code_sha256 BLOB PRIMARY KEY, created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL,
  used_ms INTEGER, device_id TEXT);
CREATE TABLE items (
  device_id TEXT NOT NULL, item_key BLOB NOT NULL, digest BLOB NOT NULL, sealed BLOB NOT NULL,
  size_bytes INTEGER NOT NULL, received_ms INTEGER NOT NULL, PRIMARY KEY (device_id, item_key)) WITHOUT ROWID;
CREATE TABLE set_aside (
  device_id TEXT NOT NULL, record_key BLOB NOT NULL, reason TEXT NOT NULL, sealed BLOB NOT NULL,
  received_ms INTEGER NOT NULL, PRIMARY KEY (device_id, record_key)) WITHOUT ROWID;
CREATE TABLE steps (
  device_id TEXT NOT NULL, step_key BLOB NOT NULL, run_key BLOB NOT NULL, session_key BLOB NOT NULL,
  named_key BLOB NOT NULL, trajectory_id TEXT NOT NULL, digest BLOB NOT NULL, tokens INTEGER NOT NULL,
  sealed BLOB NOT NULL, PRIMARY KEY (device_id, step_key)) WITHOUT ROWID;
CREATE INDEX steps_by_run ON steps (run_key);
CREATE INDEX steps_by_session ON steps (session_key);
CREATE INDEX steps_by_name ON steps (named_key);
CREATE INDEX steps_by_trajectory ON steps (trajectory_id);
CREATE TABLE signals (
  device_id TEXT NOT NULL, signal_key BLOB NOT NULL, target_key BLOB NOT NULL, digest BLOB NOT NULL,
  sealed BLOB NOT NULL, PRIMARY KEY (device_id, signal_key)) WITHOUT ROWID;
CREATE INDEX signals_by_target ON signals (target_key);
CREATE TABLE trajectories (
  trajectory_id TEXT PRIMARY KEY, device_id TEXT NOT NULL, line_id TEXT NOT NULL, channel TEXT NOT NULL,
  state TEXT NOT NULL, ready_order INTEGER, round_id TEXT, created_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX trajectories_ready ON trajectories (line_id, channel, state, ready_order);
CREATE INDEX trajectories_by_order ON trajectories (ready_order);
CREATE INDEX trajectories_by_device ON trajectories (device_id);
CREATE INDEX trajectories_by_round ON trajectories (round_id);
CREATE TABLE rounds (
  round_id TEXT PRIMARY KEY, line_id TEXT NOT NULL, state TEXT NOT NULL, base_version INTEGER NOT NULL,
  version INTEGER, trajectories INTEGER NOT NULL, steps INTEGER NOT NULL, metrics TEXT NOT NULL,
  reason TEXT NOT NULL, started_ms INTEGER NOT NULL, finished_ms INTEGER);
CREATE TABLE adapters (
  version INTEGER PRIMARY KEY, line_id TEXT NOT NULL, state TEXT NOT NULL, round_id TEXT NOT NULL,
  facts BLOB NOT NULL, manifest BLOB, created_ms INTEGER NOT NULL, released_ms INTEGER);
CREATE INDEX adapters_by_line ON adapters (line_id, state, version);
"""

_FORGETTING = """
ALTER TABLE steps ADD COLUMN item_key BLOB NOT NULL DEFAULT x'';
ALTER TABLE signals ADD COLUMN item_key BLOB NOT NULL DEFAULT x'';
ALTER TABLE set_aside ADD COLUMN name_key BLOB NOT NULL DEFAULT x'';
CREATE INDEX steps_by_item ON steps (item_key);
CREATE INDEX signals_by_item ON signals (item_key);
CREATE INDEX set_aside_by_name ON set_aside (name_key);
CREATE TABLE tombstones (
  device_id TEXT NOT NULL, name_key BLOB NOT NULL, PRIMARY KEY (device_id, name_key)) WITHOUT ROWID;
CREATE TABLE forgotten (
  device_id TEXT NOT NULL, request_id TEXT NOT NULL, digest TEXT NOT NULL, before_ms INTEGER NOT NULL,
  deleted INTEGER NOT NULL, unknown INTEGER NOT NULL, adapters TEXT NOT NULL, at_ms INTEGER NOT NULL,
  PRIMARY KEY (device_id, request_id)) WITHOUT ROWID;
"""

_GROUPS = """
ALTER TABLE steps ADD COLUMN left_out INTEGER NOT NULL DEFAULT 0;
ALTER TABLE signals ADD COLUMN counts INTEGER NOT NULL DEFAULT 1;
CREATE TABLE marks (
  device_id TEXT NOT NULL, step_key BLOB NOT NULL, left_out INTEGER NOT NULL, sealed BLOB NOT NULL,
  PRIMARY KEY (device_id, step_key)) WITHOUT ROWID;
DROP INDEX trajectories_ready;
DROP INDEX trajectories_by_order;
ALTER TABLE trajectories RENAME COLUMN ready_order TO place;
ALTER TABLE trajectories ADD COLUMN group_id TEXT NOT NULL DEFAULT '';
ALTER TABLE trajectories ADD COLUMN account BLOB;
UPDATE trajectories SET group_id = trajectory_id;
UPDATE trajectories SET state = 'judged' WHERE state = 'ready';
CREATE INDEX trajectories_by_group ON trajectories (group_id, state);
CREATE TABLE trajectory_groups (
  group_id TEXT PRIMARY KEY, device_id TEXT NOT NULL, line_id TEXT NOT NULL, channel TEXT NOT NULL,
  size INTEGER NOT NULL, stage TEXT NOT NULL, judged INTEGER NOT NULL, arrived_ms INTEGER NOT NULL,
  arrival INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX trajectory_groups_ready ON trajectory_groups (line_id, channel, stage, arrived_ms, arrival, judged);
CREATE INDEX trajectory_groups_by_arrival ON trajectory_groups (arrival);
CREATE INDEX trajectory_groups_by_device ON trajectory_groups (device_id);
INSERT INTO trajectory_groups
  SELECT trajectory_id, device_id, line_id, channel, 0, iif(state = 'judged', 'quiet', 'waiting'), state = 'judged',
  created_ms, coalesce(place, 0) FROM trajectories WHERE state IN ('open', 'judged');
"""

_CLASSIFIED = """
ALTER TABLE trajectories ADD COLUMN classified INTEGER NOT NULL DEFAULT 0;
CREATE INDEX trajectories_unclassified ON trajectories (line_id, channel, created_ms)
  WHERE NOT classified AND state IN ('open', 'judged');
"""

_PINS = """
ALTER TABLE rounds ADD COLUMN settings TEXT NOT NULL DEFAULT '';
ALTER TABLE rounds ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rounds ADD COLUMN row_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rounds ADD COLUMN at_update INTEGER;
ALTER TABLE rounds ADD COLUMN deaths TEXT NOT NULL DEFAULT '{}';
ALTER TABLE rounds ADD COLUMN rejected_steps TEXT NOT NULL DEFAULT '';
CREATE TABLE pins (
  trajectory_id TEXT PRIMARY KEY, round_id TEXT NOT NULL, device_id TEXT NOT NULL, tokens INTEGER NOT NULL,
  names BLOB NOT NULL, at_update INTEGER, place INTEGER, reason TEXT NOT NULL, lost INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX pins_by_round ON pins (round_id, at_update, place);
"""

_LENGTHS = """
ALTER TABLE trajectories ADD COLUMN steps INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trajectories ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0;
UPDATE trajectories SET (steps, tokens) =
  (SELECT count(*), coalesce(sum(s.tokens), 0) FROM steps s WHERE s.trajectory_id = trajectories.trajectory_id);
"""

_DELTAS = """
ALTER TABLE devices ADD COLUMN level TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN cohort TEXT NOT NULL DEFAULT '';
ALTER TABLE adapters ADD COLUMN cohort TEXT NOT NULL DEFAULT '';
ALTER TABLE rounds ADD COLUMN cohort TEXT NOT NULL DEFAULT '';
CREATE TABLE deltas (
  delta_id TEXT PRIMARY KEY, device_id TEXT NOT NULL, item_key BLOB NOT NULL, line_id TEXT NOT NULL,
  base_version INTEGER NOT NULL, method TEXT NOT NULL, level TEXT NOT NULL, rank INTEGER NOT NULL,
  trajectories INTEGER NOT NULL, size_bytes INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
  round_id TEXT, received_ms INTEGER NOT NULL, sealed BLOB);
CREATE INDEX deltas_waiting ON deltas (line_id, state, received_ms);
CREATE INDEX deltas_by_device ON deltas (device_id, received_ms);
CREATE INDEX deltas_by_round ON deltas (round_id);
CREATE INDEX devices_apart ON devices (line_id, cohort) WHERE cohort != '';
"""

_JOINING = """
ALTER TABLE invitations ADD COLUMN label TEXT NOT NULL DEFAULT '';
ALTER TABLE invitations ADD COLUMN revoked_ms INTEGER;
ALTER TABLE devices ADD COLUMN instance TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN taken_at_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN held_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN rival_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN approved_ms INTEGER NOT NULL DEFAULT 0;
UPDATE devices SET approved_ms = joined_ms;
CREATE TABLE device_events (
  event_id INTEGER PRIMARY KEY AUTOINCREMENT, device_id TEXT NOT NULL, at_ms INTEGER NOT NULL, what TEXT NOT NULL,
  detail TEXT NOT NULL);
CREATE INDEX device_events_by_device ON device_events (device_id, event_id);
"""

_SECURE_SUMS = """
CREATE TABLE secure_sums (
  sum_id TEXT PRIMARY KEY, task_id TEXT NOT NULL, line_id TEXT NOT NULL, status TEXT NOT NULL, phase TEXT NOT NULL,
  reason TEXT NOT NULL, began_ms INTEGER NOT NULL, ended_ms INTEGER, wrapped BLOB, state BLOB, total BLOB);
CREATE INDEX secure_sums_by_status ON secure_sums (status, task_id);
CREATE TABLE secure_members (
  sum_id TEXT NOT NULL, device_id TEXT NOT NULL, item_key BLOB NOT NULL DEFAULT x'',
  PRIMARY KEY (sum_id, device_id)) WITHOUT ROWID;
CREATE INDEX secure_members_by_device ON secure_members (device_id, item_key);
CREATE TABLE secure_expected (
  task_id TEXT NOT NULL, device_id TEXT NOT NULL, task BLOB NOT NULL, since_ms INTEGER NOT NULL,
  PRIMARY KEY (task_id, device_id)) WITHOUT ROWID;
"""

_KEY_FILES = """
CREATE TABLE vault_keys (owner_id TEXT PRIMARY KEY, digest BLOB) WITHOUT ROWID;
CREATE INDEX vault_keys_dead ON vault_keys (owner_id) WHERE digest IS NULL;
"""

_TURNS = """
CREATE INDEX trajectory_groups_in_turn
  ON trajectory_groups (line_id, channel, stage, device_id, arrived_ms, arrival, group_id);
CREATE INDEX trajectories_by_device_round ON trajectories (device_id, round_id);
"""

_ADAPTER_ACTS = """
CREATE TABLE adapter_acts (
  act_id INTEGER PRIMARY KEY, version INTEGER NOT NULL, act TEXT NOT NULL, who TEXT NOT NULL, why TEXT NOT NULL,
  at_ms INTEGER NOT NULL);
CREATE INDEX adapter_acts_by_version ON adapter_acts (version);
"""

_LOG = """
CREATE TABLE log_entries (
  line_id TEXT NOT NULL, position INTEGER NOT NULL, version INTEGER NOT NULL UNIQUE, manifest_sha256 TEXT NOT NULL,
  added_ms INTEGER NOT NULL, PRIMARY KEY (line_id, position)) WITHOUT ROWID;
CREATE TABLE log_nodes (
  line_id TEXT NOT NULL, level INTEGER NOT NULL, position INTEGER NOT NULL, hash BLOB NOT NULL,
  PRIMARY KEY (line_id, level, position)) WITHOUT ROWID;
CREATE TABLE log_heads (
  line_id TEXT NOT NULL, size INTEGER NOT NULL, key_id TEXT NOT NULL, head BLOB NOT NULL,
  PRIMARY KEY (line_id, size, key_id)) WITHOUT ROWID;
"""
"""nodes: the complete subtrees of merkle.py; heads: what was signed of each size, so that nothing else can be since"""


def _tables(database: Database) -> None:
    _run(database, _FIRST)
    database.execute("INSERT INTO meta VALUES ('vault_id', ?)", [new_id()])


def _forgetting(database: Database) -> None:
    _run(database, _FORGETTING)


def _groups(database: Database) -> None:
    _run(database, _GROUPS)


def _classified(database: Database) -> None:
    _run(database, _CLASSIFIED)


def _pins(database: Database) -> None:
    _run(database, _PINS)


def _lengths(database: Database) -> None:
    _run(database, _LENGTHS)


def _deltas(database: Database) -> None:
    _run(database, _DELTAS)


def _joining(database: Database) -> None:
    _run(database, _JOINING)


def _secure_sums(database: Database) -> None:
    _run(database, _SECURE_SUMS)


def _key_files(database: Database) -> None:
    _run(database, _KEY_FILES)


def _turns(database: Database) -> None:
    _run(database, _TURNS)


def _adapter_acts(database: Database) -> None:
    _run(database, _ADAPTER_ACTS)


def _log(database: Database) -> None:
    """What was released before there was a log comes first, in the order of its versions."""
    _run(database, _LOG)
    found = database.execute(
        "SELECT line_id, version, manifest, coalesce(released_ms, created_ms) FROM adapters"
        " WHERE manifest IS NOT NULL ORDER BY version"
    ).fetchall()
    sizes: dict[str, int] = {}
    for line_id, version, manifest, added_ms in found:
        position = sizes.setdefault(line_id, 0)
        digest = wire.decode(manifest, SignedManifest).sha256
        database.execute(
            "INSERT INTO log_entries VALUES (?, ?, ?, ?, ?)", [line_id, position, version, digest, added_ms]
        )
        for node in appended(position, entry_leaf(version, digest), partial(_log_node, database, line_id)):
            database.execute("INSERT INTO log_nodes VALUES (?, ?, ?, ?)", [line_id, *node])
        sizes[line_id] += 1


def _log_node(database: Database, line_id: str, level: int, position: int) -> bytes:
    sql = "SELECT hash FROM log_nodes WHERE line_id = ? AND level = ? AND position = ?"
    found: bytes = database.execute(sql, [line_id, level, position]).fetchone()[0]
    return found


def _run(database: Database, statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            database.execute(statement)


_MIGRATIONS = [
    _tables,
    _forgetting,
    _groups,
    _classified,
    _pins,
    _lengths,
    _deltas,
    _joining,
    _secure_sums,
    _key_files,
    _turns,
    _adapter_acts,
    _log,
]
"""in the order in which they came; one that was released never changes"""


def migrate(database: Database) -> None:
    """Bring the tables up to date.

    Raises:
        StorageError: the file cannot be written.
    """
    shared_migrate(database, "server", migrations=_MIGRATIONS)

"""From sealed rows to one rewarded trajectory: as it is now, or of the very rows that a round was given."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from clawloop_server.errors import VaultError
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared.records import Signal, Step, Trajectory
from clawloop_shared.signals import RewardRules, assemble

_STEP = msgspec.msgpack.Decoder(Step)
_SIGNAL = msgspec.msgpack.Decoder(Signal)


class Names(msgspec.Struct, frozen=True):
    """The rows that a trajectory is made of, by their keyed hashes; `left_out` are steps that its owner marked so."""

    steps: list[bytes]
    signals: list[bytes]
    left_out: list[bytes]


def names_of(database: ServerDatabase, trajectory_id: str, device_id: str) -> Names:
    """Which rows make a trajectory now; opens none of them."""
    rows = database.rows(
        "SELECT step_key, run_key, session_key, named_key, left_out FROM steps WHERE trajectory_id = ?", [trajectory_id]
    )
    sql = "SELECT signal_key FROM signals WHERE target_key = ? AND device_id = ?"
    targets = {name for row in rows for name in row[:4] if name}
    signals = {key for target in targets for (key,) in database.rows(sql, [target, device_id])}
    return Names([row[0] for row in rows], sorted(signals), [row[0] for row in rows if row[4]])


def read_trajectory(
    database: ServerDatabase, seal: DeviceSeal, trajectory_id: str, *, names: Names, rules: RewardRules
) -> Trajectory:
    """The trajectory that these rows make, under the vault's own ids.

    Raises:
        StorageError: a record does not open with the keys that are here.
        VaultError: a row is gone, or they make no reward under these rules.
    """
    steps = list(_opened(database, seal, "steps", keys=names.steps))
    left_out = set(names.left_out)
    found = _rewarded(
        database,
        trajectory_id,
        [_STEP.decode(plain) for _, plain in steps],
        signals=[_SIGNAL.decode(plain) for _, plain in _opened(database, seal, "signals", keys=names.signals)],
        left_out={_STEP.decode(plain).step_id for key, plain in steps if key in left_out},
        rules=rules,
    )
    return msgspec.structs.replace(found, device_id=seal.device_id)


def read_signals(database: ServerDatabase, seal: DeviceSeal, names: Names) -> list[Signal]:
    """The signals of a trajectory, without its steps.

    Raises:
        StorageError, VaultError: as `read_trajectory`.
    """
    return [_SIGNAL.decode(plain) for _, plain in _opened(database, seal, "signals", keys=names.signals)]


def _opened(
    database: ServerDatabase, seal: DeviceSeal, table: str, *, keys: Sequence[bytes]
) -> Iterable[tuple[bytes, bytes]]:
    column = {"steps": "step_key", "signals": "signal_key"}[table]
    sql = f"SELECT sealed FROM {table} WHERE device_id = ? AND {column} = ?"  # noqa: S608 constant names
    for key in keys:
        row = database.row(sql, [seal.device_id, key])
        if row is None:
            raise VaultError(f"a record of device {seal.device_id} that a round was to read is gone; start it anew")
        yield key, seal.unseal(table, key, sealed=row[0])


def _rewarded(
    database: ServerDatabase,
    trajectory_id: str,
    steps: Sequence[Step],
    *,
    signals: Sequence[Signal],
    left_out: Collection[str],
    rules: RewardRules,
) -> Trajectory:
    found = assemble(steps, signals, rules=rules, left_out=left_out)
    if len(found) != 1:
        raise VaultError(f"trajectory {trajectory_id} has no reward under these [reward] settings; restart the server")
    sql = "SELECT nullif(group_id, trajectory_id), device_id FROM trajectories WHERE trajectory_id = ?"
    group_id, device_id = database.row(sql, [trajectory_id]) or ("", "")
    ids = {"trajectory_id": trajectory_id, "group_id": group_id or "", "device_id": device_id}
    return msgspec.structs.replace(found[0], **ids)

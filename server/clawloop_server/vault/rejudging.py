"""Looking again at all signals after the operator changed which of them count. Part of the transaction that is open.

Whether a signal counts is noted beside it when it comes, so that counting what is ready opens no record.
"""

from __future__ import annotations

import msgspec

from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared.records import Signal
from clawloop_shared.signals import DEFAULT_RULES, FACTORS, RewardRules

_SIGNAL = msgspec.msgpack.Decoder(Signal)
_META = "signals that count"
_PAGE = 1000
_DEVICES = "SELECT owner_id FROM vault_keys WHERE digest IS NOT NULL AND owner_id IN (SELECT device_id FROM devices)"


def rejudge(database: ServerDatabase, seals: DeviceSeals, *, rules: RewardRules) -> None:
    """Note anew which signals count, if that is decided otherwise than before; nothing is read if it is not.

    Raises:
        StorageError: a record does not open with the keys that are here.
    """
    decided = _decided(rules)
    known = database.row("SELECT value FROM meta WHERE name = ?", [_META])
    if decided == (known[0] if known else _decided(DEFAULT_RULES)):
        return
    database.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [_META, decided])
    for (device_id,) in database.rows(_DEVICES):
        targets = _note(database, seals.open(device_id), rules=rules)
        found = dict.fromkeys(
            trajectory_id
            for target in targets
            for (trajectory_id,) in database.rows(
                "SELECT trajectory_id FROM steps WHERE step_key = ?1 AND device_id = ?2"
                " UNION SELECT trajectory_id FROM steps WHERE run_key = ?1"
                " UNION SELECT trajectory_id FROM steps WHERE session_key = ?1"
                " UNION SELECT trajectory_id FROM steps WHERE named_key = ?1",
                [target, device_id],
            )
        )
        standing.update(database, found)


def _decided(rules: RewardRules) -> str:
    """What decides which signals count, as text."""
    names = sorted({*FACTORS, *rules.weights})
    return msgspec.json.encode([rules.least, {name: rules.factor(name) for name in names}]).decode()


def _note(database: ServerDatabase, seal: DeviceSeal, *, rules: RewardRules) -> set[bytes]:
    """Note which signals of a device count; the targets of those with which that changed."""
    changed, after = set[bytes](), b""
    while True:
        page = database.rows(
            "SELECT signal_key, target_key, counts, sealed FROM signals WHERE device_id = ? AND signal_key > ?"
            " ORDER BY signal_key LIMIT ?",
            [seal.device_id, after, _PAGE],
        )
        if not page:
            return changed
        for key, target, counted, sealed in page:
            counts = rules.counts(_SIGNAL.decode(seal.unseal("signals", key, sealed=sealed)))
            if counts != bool(counted):
                sql = "UPDATE signals SET counts = ? WHERE device_id = ? AND signal_key = ?"
                database.run(sql, [counts, seal.device_id, key])
                changed.add(target)
        after = page[-1][0]

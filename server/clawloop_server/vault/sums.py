"""What secure sums came to, as deltas for rounds: under a key of their own, and with the devices that are in them.

Nobody can take one device's part out of a sum, so a sum goes whole with the first of its parts that is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

from clawloop_server.errors import DeviceError
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.deltas import keep_delta
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals, forget_keys
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta
from clawloop_shared.files import sha256

_GRAVE = "SELECT 1 FROM tombstones WHERE device_id = ? AND name_key = ?"
_OF = "SELECT sum_id FROM secure_members WHERE device_id = ?"
SUMS_WITH_DEVICE = f"device_id IN ({_OF})"
"""of deltas: those that a device is in with others"""
SUMS_WITH_DOOMED = f"device_id IN ({_OF} AND item_key IN temp.doomed)"
"""of deltas: those that a part of a device is in that is to go"""


class SumDeltas:
    """Keeps sums among the deltas that wait for a round; their `device_id` is the id of the sum."""

    def __init__(self, database: ServerDatabase, seals: DeviceSeals) -> None:
        self._database, self._seals = database, seals

    def __call__(self, sum_id: str, delta: LoraDelta, items: dict[str, str], /) -> str:
        """Keep the mean of these devices' deltas (`items`: what each calls its part), unless one has asked to forget
        its part since, or everything, or was deleted; then say so. Part of the transaction that is open."""
        for device_id, why in gone_since(self._database, sum_id, items).items():
            return f"device {device_id} {why}, so the sum was not kept"
        names = dict[str, bytes]()
        for device_id, item_id in items.items():
            seal = self._seal(device_id)
            if seal is None:
                continue
            names[device_id] = seal.name("item", item_id)
            if self._database.row(_GRAVE, [device_id, names[device_id]]) is not None:
                return f"device {device_id} asked to forget its part, so the sum was not kept"
        for device_id, name in names.items():
            sql = "UPDATE secure_members SET item_key = ? WHERE sum_id = ? AND device_id = ?"
            self._database.run(sql, [name, sum_id, device_id])
        item_key = bytes.fromhex(sha256(sum_id.encode()))[:16]
        of_sum = self._seals.make_for_sum(sum_id)
        keep_delta(self._database, of_sum, delta, item_key=item_key, body=wire.encode(delta))
        return ""

    def _seal(self, device_id: str) -> DeviceSeal | None:
        """None: the device was revoked before it sent anything of its own."""
        try:
            return self._seals.get(device_id) or self._seals.ensure(device_id)
        except DeviceError:
            return None


def gone_since(database: ServerDatabase, sum_id: str, device_ids: Iterable[str]) -> dict[str, str]:
    """Of which of these devices nothing may be in a sum that runs, and why: it was deleted, or asked to forget
    everything since the sum began (by the server's clock)."""
    ids = list(device_ids)
    these = f"device_id IN ({', '.join('?' * len(ids))})"
    there = database.rows(f"SELECT device_id FROM devices WHERE state != 'deleted' AND {these}", ids)  # noqa: S608 marks alone
    emptied = database.rows(
        f"SELECT DISTINCT device_id FROM forgotten WHERE {these} AND before_ms > 0"  # noqa: S608 marks alone
        " AND at_ms >= (SELECT began_ms FROM secure_sums WHERE sum_id = ?)",
        [*ids, sum_id],
    )
    gone = dict.fromkeys(set(ids) - {row[0] for row in there}, "was deleted")
    return {row[0]: "asked to forget everything" for row in emptied} | gone


def devices_in(database: ServerDatabase, device_id: str) -> frozenset[str]:
    """The devices that a delta is of: the members of the sum, if it is one, else the device itself."""
    rows = database.rows("SELECT device_id FROM secure_members WHERE sum_id = ?", [device_id])
    return frozenset(row[0] for row in rows) or frozenset([device_id])


def shred_sums(database: ServerDatabase, device_id: str, *, doomed: bool) -> None:
    """Mark as dead the keys of the sums that a device is in; `doomed`: of those alone that a part is in that is to go.
    Part of the transaction that is open."""
    of = f"{_OF} AND item_key IN temp.doomed" if doomed else _OF
    forget_keys(database, f"owner_id IN ({of})", [device_id])
    if not doomed:
        database.run("DELETE FROM secure_expected WHERE device_id = ?", [device_id])

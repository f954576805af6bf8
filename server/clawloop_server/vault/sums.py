"""What secure sums came to, as deltas for rounds: under a key of their own, and with the devices that are in them.

Nobody can take one device's part out of a sum, so a sum goes whole with the first of its members that is forgotten.
"""

from __future__ import annotations

from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.deltas import keep_delta
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta
from clawloop_shared.files import sha256


class SumDeltas:
    """Keeps sums among the deltas that wait for a round; their `device_id` is the id of the sum."""

    def __init__(self, database: ServerDatabase, seals: DeviceSeals) -> None:
        self._database, self._seals = database, seals

    def __call__(self, sum_id: str, delta: LoraDelta, members: list[str], /) -> None:
        """Keep the mean of these devices' deltas. Part of the transaction that is open."""
        item_key = bytes.fromhex(sha256(sum_id.encode()))[:16]
        seal = self._seals.make_for_sum(sum_id)
        keep_delta(self._database, seal, delta, item_key=item_key, body=wire.encode(delta))


def devices_in(database: ServerDatabase, device_id: str) -> frozenset[str]:
    """The devices that a delta is of: the members of the sum, if it is one, else the device itself."""
    rows = database.rows("SELECT device_id FROM secure_members WHERE sum_id = ?", [device_id])
    return frozenset(row[0] for row in rows) or frozenset([device_id])


OF_SUMS_WITH = "device_id IN (SELECT sum_id FROM secure_members WHERE device_id = ?)"
"""of deltas: those that a device is in with others"""


def shred_sums_with(database: ServerDatabase, device_id: str) -> None:
    """Destroy the keys of the sums that a device is in. Part of the transaction that is open."""
    database.run(
        "UPDATE secure_sums SET wrapped = NULL WHERE sum_id IN (SELECT sum_id FROM secure_members WHERE device_id = ?)",
        [device_id],
    )
    database.run("DELETE FROM secure_expected WHERE device_id = ?", [device_id])

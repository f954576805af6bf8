"""The vault: what devices sent, kept on disk before it is acknowledged, and given out as rewarded trajectories.

The hub's process receives, the trainer's process reads and consumes; each has a `Vault` of its own on one file.
Later signals, steps and marks count until a round consumed their trajectory; after that they are kept, but change no
round that was. Knows no HTTP, no Flower and no tensor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import msgspec

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import list_bases
from clawloop_server.errors import VaultError
from clawloop_server.home import Home
from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.deltas import Deltas
from clawloop_server.vault.forgetting import Erased, erase_device, forget
from clawloop_server.vault.groups import TrajectoryState, deadlines
from clawloop_server.vault.judging import Answer, answers, keep_values
from clawloop_server.vault.parts import FOLDER as BLOBS
from clawloop_server.vault.parts import drop_all_parts, drop_parts
from clawloop_server.vault.pins import Pins
from clawloop_server.vault.reading import names_of, read_trajectory
from clawloop_server.vault.receiving import Receiver
from clawloop_server.vault.rejudging import rejudge
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.settings import DEFAULT_SETTINGS, RewardSettings
from clawloop_shared.errors import StorageError
from clawloop_shared.files import sha256
from clawloop_shared.messages import ForgetReceipt, ForgetRequest, ItemReceived, UploadItem
from clawloop_shared.records import Channel, Trajectory
from clawloop_shared.signals import Account, account_of

_log = logging.getLogger(__name__)

_ACCOUNT = msgspec.msgpack.Decoder(Account)


class VaultStats(msgspec.Struct, frozen=True):
    """What is in the vault, in numbers. `trajectories` is by channel, then state; `set_aside` by reason;
    `deltas` by state."""

    devices: int
    items: int
    received_bytes: int
    steps: int
    tokens: int
    signals: int
    marks: int
    trajectories: dict[str, dict[str, int]]
    set_aside: dict[str, int]
    deltas: dict[str, int] = {}


class Lesson(msgspec.Struct, frozen=True):
    """One trajectory of a round, and how the reward came about that the round read. Without an account it was forgotten
    since, or consumed before accounts were kept."""

    trajectory_id: str
    device_id: str
    group_id: str
    state: TrajectoryState
    account: Account | None


class Vault:
    """The vault of a server, safe to use from any thread."""

    def __init__(
        self,
        database: ServerDatabase,
        *,
        home: Home,
        master_key: bytes,
        settings: RewardSettings = DEFAULT_SETTINGS,
        federate: FederateSettings | None = None,
    ) -> None:
        self.database, self._federate = database, federate or FederateSettings()
        self._home, self._settings = home, settings
        self._seals = DeviceSeals(database, master_key)
        self._seals.move_out()
        self.pins = Pins(database, self._seals, settings)
        self.deltas = Deltas(database, self._seals)

    @classmethod
    def open(
        cls,
        home: Home,
        master_key: bytes,
        *,
        settings: RewardSettings = DEFAULT_SETTINGS,
        federate: FederateSettings | None = None,
    ) -> Vault:
        """Open (or make) the vault in `home`; `settings` are those of `[reward]`, `federate` those of `[federate]`.

        Raises:
            KeyMissing: the master key is another one.
            StorageError: the database cannot be opened.
        """
        database = ServerDatabase.open(home.database, master_key)
        return cls(database, home=home, master_key=master_key, settings=settings, federate=federate)

    @property
    def rules(self) -> RewardSettings:
        """How signals are weighed here."""
        return self._settings

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    # receiving

    def receive(self, device_id: str, items: Sequence[UploadItem], *, now_ms: int | None = None) -> list[ItemReceived]:
        """Keep what a device sent; what can be said of each item when this returns: it is on disk.

        What was sent before counts once. A record that is wrong is set aside with its reason; what the device asked to
        forget leaves no trace.

        Raises:
            DeviceError: the device is unknown, revoked or deleted; nothing is kept.
            StorageError: nothing could be written; send it again.
        """
        shapes = {base.line_id: base.shape for base in list_bases(self._home)}
        now_ms = now_ms or _now_ms()
        with self.database.write() as database:
            receiver = Receiver(
                database,
                self._seals.ensure(device_id),
                shapes=shapes,
                rules=self._settings,
                federate=self._federate,
                now_ms=now_ms,
            )
            # One at a time: unpacked, an item may be far larger than it came.
            received = [_received(item, device_id=device_id, received_ms=receiver.take(item)) for item in items]
            receiver.finish()
        return received

    def obey_settings(self) -> None:
        """Look again at all signals if others are enough for a reward now than before, after the keys of what is
        deleted are gone; called where a server starts.

        Raises:
            StorageError: a record does not open with the keys that are here, or one that is dead cannot be removed.
        """
        self._seals.tidy()
        half = (
            "SELECT device_id FROM devices WHERE state = 'deleted' AND device_id IN (SELECT owner_id FROM vault_keys)"
        )
        for (device_id,) in self.database.rows(half):  # marked as deleted, and no further
            self.delete_device(device_id)
        with self.database.write() as database:
            rejudge(database, self._seals, rules=self._settings)

    # judging

    def answers(self, line_id: str, limit: int) -> list[Answer]:
        """Up to `limit` answers that the server's own judge has not looked at, the oldest first.

        Raises:
            StorageError: a record does not open with the keys that are here.
        """
        with self.database.snapshot() as database:
            return answers(database, self._seals, line_id, limit=limit)

    def keep_values(self, judged: Sequence[Answer], *, weight: float, now_ms: int | None = None) -> None:
        """Keep what the server's own judge says of answers; of what was forgotten meanwhile nothing is kept."""
        with self.database.write() as database:
            keep_values(database, self._seals, judged, weight=weight, rules=self._settings, now_ms=now_ms or _now_ms())

    # giving out

    def ready(
        self,
        line_id: str,
        limit: int,
        channel: Channel = Channel.TRAIN,
        *,
        cohort: str = "",
        now_ms: int | None = None,
    ) -> list[Trajectory]:
        """The trajectories that a round of up to `limit` takes for a cohort: those of whole groups, in turns by device,
        the longest waiting of each first.

        A group that alone is larger than the limit is taken whole when it is the first. Ids of trajectories and groups
        are the vault's own: unique over all devices.

        Raises:
            StorageError: a record does not open with the keys that are here.
            VaultError: the vault was opened with other `[reward]` settings than those that its server runs with.
        """
        until = deadlines(now_ms or _now_ms(), self._settings)
        with self.database.snapshot() as database:
            seals = dict[str, DeviceSeal]()
            return [
                read_trajectory(
                    database,
                    seals.get(device_id) or seals.setdefault(device_id, self._seals.open(device_id)),
                    trajectory_id,
                    names=names_of(database, trajectory_id, device_id),
                    rules=self._settings,
                )
                for trajectory_id, device_id in standing.chosen(
                    database, line_id, channel, deadlines=until, limit=limit, cohort=cohort
                )
            ]

    def pin(
        self, round_id: str, line_id: str, limit: int, *, cohort: str = "", now_ms: int | None = None
    ) -> tuple[int, int]:
        """Pin what `ready` would give out to a round, as it is now; how many trajectories and steps."""
        until = deadlines(now_ms or _now_ms(), self._settings)
        return self.pins.take(round_id, line_id, limit, deadlines=until, cohort=cohort)

    def count_ready(
        self, line_id: str, channel: Channel = Channel.TRAIN, *, cohort: str = "", now_ms: int | None = None
    ) -> int:
        """How many trajectories are ready for a cohort: as many as `ready` gives out without a limit."""
        until = deadlines(now_ms or _now_ms(), self._settings)
        return standing.count_ready(self.database, line_id, channel, deadlines=until, cohort=cohort)

    def consume(self, round_id: str, trajectories: Sequence[Trajectory], db: ServerDatabase | None = None) -> None:
        """Mark trajectories as consumed by a round, all or none; part of the transaction that `db` has open.

        Raises:
            VaultError: one of them is not there any more (consumed by another round, or its device was deleted).
        """
        with (db or self.database).write() as database:
            groups = dict[str, None]()
            for place, trajectory in enumerate(trajectories, start=1):
                trajectory_id = trajectory.trajectory_id
                found = database.row(
                    "UPDATE trajectories SET state = ?, round_id = ?, place = ?"
                    " WHERE trajectory_id = ? AND round_id IS NULL RETURNING group_id, device_id",
                    [TrajectoryState.CONSUMED, round_id, place, trajectory_id],
                )
                if found is None:
                    raise VaultError(f"round {round_id}: trajectory {trajectory_id} is not ready any more; start anew")
                groups[found[0]] = None
                self._keep_account(trajectory, self._seals.get(found[1]))
            standing.update_groups(database, groups)

    def _keep_account(self, trajectory: Trajectory, seal: DeviceSeal | None) -> None:
        """Keep how the reward came about, unless some of what it came from was forgotten since it was read."""
        sql = "SELECT 1 FROM signals WHERE device_id = ? AND signal_key = ?"
        if seal is None or not all(
            self.database.row(sql, [seal.device_id, seal.name("signal", signal.signal_id)])
            for signal in trajectory.signals
        ):
            return
        plain = msgspec.msgpack.encode(account_of(trajectory.signals, self._settings))
        key = trajectory.trajectory_id.encode()
        self.database.run(
            "UPDATE trajectories SET account = ? WHERE trajectory_id = ? AND state = ?",
            [seal.seal("trajectories", key, plain=plain), trajectory.trajectory_id, TrajectoryState.CONSUMED],
        )

    def lineage(self, round_id: str) -> list[str]:
        """The trajectories that a round consumed, in the order in which it got them."""
        sql = "SELECT trajectory_id FROM trajectories WHERE round_id = ? ORDER BY place"
        return [row[0] for row in self.database.rows(sql, [round_id])]

    def devices_of(self, trajectory_ids: Iterable[str]) -> frozenset[str]:
        """The devices that these trajectories came from."""
        sql = "SELECT DISTINCT device_id FROM trajectories WHERE trajectory_id IN (SELECT value FROM json_each(?))"
        ids = msgspec.json.encode(list(trajectory_ids)).decode()
        return frozenset(row[0] for row in self.database.rows(sql, [ids]))

    def lessons(self, round_id: str) -> list[Lesson]:
        """What a round consumed, in the order in which it got it, with how each reward came about. Never content.

        Raises:
            StorageError: a record does not open with the keys that are here.
        """
        with self.database.snapshot() as database:
            rows = database.rows(
                "SELECT trajectory_id, device_id, coalesce(nullif(group_id, trajectory_id), ''), state, account"
                " FROM trajectories WHERE round_id = ? ORDER BY place",
                [round_id],
            )
            return [
                Lesson(
                    trajectory_id=trajectory_id,
                    device_id=device_id,
                    group_id=group_id,
                    state=TrajectoryState(state),
                    account=self._account(trajectory_id, device_id, sealed=sealed),
                )
                for trajectory_id, device_id, group_id, state, sealed in rows
            ]

    def _account(self, trajectory_id: str, device_id: str, *, sealed: bytes | None) -> Account | None:
        seal = self._seals.get(device_id) if sealed else None
        if seal is None or sealed is None:
            return None
        return _ACCOUNT.decode(seal.unseal("trajectories", trajectory_id.encode(), sealed=sealed))

    # forgetting and counting

    def forget(self, request: ForgetRequest, *, now_ms: int | None = None) -> ForgetReceipt:
        """Delete what a device asks to be forgotten, and empty the log. Asked again, it is answered as it was.

        Raises:
            VaultError: another request of this device had this id.
            StorageError: nothing was deleted, or a key not removed, or the log not emptied; ask again.
        """
        now_ms = now_ms or _now_ms()
        self._drop_parts(request.device_id, None if request.everything else request.record_ids)
        receipt = forget(self.database, self._seals, request=request, now_ms=now_ms)
        self._seals.bury()
        self.database.scrub()
        return receipt

    def delete_device(self, device_id: str) -> Erased:
        """Shred all that a device sent: delete its rows, destroy its key, empty the log. Running it again is harmless.

        Raises:
            StorageError: rows are deleted, but its key could not be, or the log not be emptied; run it again.
        """
        self._drop_parts(device_id, None)
        with self.database.write() as database:
            erased = erase_device(database, device_id)
        self._seals.bury()
        self.database.scrub()
        return erased

    def _drop_parts(self, device_id: str, item_ids: Sequence[str] | None) -> None:
        """Remove what came so far of items (None: of all) that come in parts; while the key is there that names it."""
        blobs = self._home.folder / BLOBS
        try:
            seal = self._seals.get(device_id)
        except StorageError as error:  # they open no more, and go when the hub sweeps
            _log.warning("parts of items of device %s cannot be found: %s", device_id, error)
            return
        try:
            if seal is not None:
                drop_all_parts(blobs, seal) if item_ids is None else drop_parts(blobs, seal, item_ids)
        except OSError as error:
            raise StorageError(f"parts of items in {blobs} cannot be removed: {error}") from error

    def stats(self) -> VaultStats:
        """What is in the vault, in numbers."""
        count, rows = self.database.count, self.database.rows
        trajectories: dict[str, dict[str, int]] = {}
        for channel, state, number in rows("SELECT channel, state, count(*) FROM trajectories GROUP BY 1, 2"):
            trajectories.setdefault(channel, {})[state] = number
        return VaultStats(
            devices=count("SELECT count(*) FROM devices WHERE state = 'joined'"),
            items=count("SELECT count(*) FROM items"),
            received_bytes=count("SELECT sum(size_bytes) FROM items"),
            steps=count("SELECT count(*) FROM steps"),
            tokens=count("SELECT sum(tokens) FROM steps"),
            signals=count("SELECT count(*) FROM signals"),
            marks=count("SELECT count(*) FROM marks"),
            trajectories=trajectories,
            set_aside=dict(rows("SELECT reason, count(*) FROM set_aside GROUP BY 1 ORDER BY 1")),
            deltas=dict(rows("SELECT state, count(*) FROM deltas GROUP BY 1 ORDER BY 1")),
        )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _received(item: UploadItem, *, device_id: str, received_ms: int) -> ItemReceived:
    return ItemReceived(device_id=device_id, item_id=item.item_id, received_ms=received_ms, sha256=sha256(item.body))


def lineage_root(ids: Iterable[str]) -> str:
    """One hash over the trajectories and deltas of a round, for its adapter's manifest."""
    return sha256("\n".join(sorted(ids)).encode())

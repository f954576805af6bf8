"""The vault: what devices sent, kept on disk before it is acknowledged, and given out as rewarded trajectories.

The hub's process receives, the trainer's process reads and consumes; each has a `Vault` of its own on one file.
A trajectory is open (no signal yet), ready, then consumed by one round. Later signals and steps are kept, but change
no round that was. Knows no HTTP, no Flower and no tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum

import msgspec

from clawloop_server.bases import list_bases
from clawloop_server.errors import VaultError
from clawloop_server.home import Home
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.forgetting import Erased, Graves, erase_device, forget
from clawloop_server.vault.intake import MAX_TARGET_SIGNALS, Reason, Refused, refuse, sort_item
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared.files import sha256
from clawloop_shared.messages import ForgetReceipt, ForgetRequest, ItemReceived, UploadItem
from clawloop_shared.records import Channel, Signal, Step, Target, Trajectory
from clawloop_shared.signals import assemble, trajectory_key

_STEP = msgspec.msgpack.Decoder(Step)
_SIGNAL = msgspec.msgpack.Decoder(Signal)
_COLUMN = {
    Target.STEP: "step_key",
    Target.RUN: "run_key",
    Target.SESSION: "session_key",
    Target.TRAJECTORY: "named_key",
}


class TrajectoryState(StrEnum):
    """How far a trajectory is."""

    OPEN = "open"
    """no signal judges it yet"""
    READY = "ready"
    """may be learned from"""
    CONSUMED = "consumed"
    """one round learned from it, or looked at it and left it"""
    SHREDDED = "shredded"
    """a round learned from it, and it was forgotten since, or its device deleted"""


class VaultStats(msgspec.Struct, frozen=True):
    """What is in the vault, in numbers. `trajectories` is by channel, then state; `set_aside` by reason."""

    devices: int
    items: int
    received_bytes: int
    steps: int
    tokens: int
    signals: int
    trajectories: dict[str, dict[str, int]]
    set_aside: dict[str, int]


class Vault:
    """The vault of a server, safe to use from any thread."""

    def __init__(self, database: ServerDatabase, *, home: Home, master_key: bytes) -> None:
        self.database = database
        self._home = home
        self._seals = DeviceSeals(database, master_key)

    @classmethod
    def open(cls, home: Home, master_key: bytes) -> Vault:
        """Open (or make) the vault in `home`.

        Raises:
            KeyMissing: the master key is another one.
            StorageError: the database cannot be opened.
        """
        return cls(ServerDatabase.open(home.database, master_key), home=home, master_key=master_key)

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
        vocabularies = {base.line_id: base.shape.vocab_size for base in list_bases(self._home)}
        now_ms = now_ms or time.time_ns() // 1_000_000
        with self.database.write() as database:
            seal = self._seals.ensure(device_id)
            graves = Graves.of(database, seal)
            received, touched, judged = [], dict[str, None](), dict[tuple[Target, bytes], None]()
            for item in items:  # one at a time: unpacked, an item may be far larger than it came
                received_ms, is_new = self._note_item(item, seal=seal, graves=graves, now_ms=now_ms)
                received.append(_received(item, device_id=device_id, received_ms=received_ms))
                if is_new:
                    intake = sort_item(item, vocabularies, forgotten=graves.hold)
                    for refused in intake.refused:
                        self._set_aside(refused, seal=seal, now_ms=now_ms)
                    item_key = seal.name("item", item.item_id)
                    touched |= dict.fromkeys(self._keep_steps(intake.steps, item_key, seal=seal, now_ms=now_ms))
                    judged |= dict.fromkeys(self._keep_signals(intake.signals, item_key, seal=seal, now_ms=now_ms))
            for target, key in judged:
                touched |= dict.fromkeys(self._trajectories_of(target, key))
            self._mark_ready(touched)
        return received

    def _note_item(self, item: UploadItem, *, seal: DeviceSeal, graves: Graves, now_ms: int) -> tuple[int, bool]:
        """When the item came, and whether it is new; one with a known id and another body is set aside."""
        key, digest = seal.name("item", item.item_id), seal.digest(item.body)
        sql = "SELECT digest, received_ms FROM items WHERE device_id = ? AND item_key = ?"
        known = self.database.row(sql, [seal.device_id, key])
        if known is not None and known[0] == digest:
            return known[1], False
        if graves.hold_name("item", item.item_id):
            return now_ms, False
        if known is not None:
            refused = Refused(Reason.CHANGED, "an item with this id was sent before with another body", item.body)
            self._set_aside(refused, seal=seal, now_ms=now_ms)
            return now_ms, False
        facts = msgspec.msgpack.encode([item.item_id[:256], item.receipt_id[:256], item.kind[:64]])
        self.database.run(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, digest, seal.seal("items", key, plain=facts), len(item.body), now_ms],
        )
        return now_ms, True

    def _set_aside(self, refused: Refused, *, seal: DeviceSeal, now_ms: int) -> None:
        key = seal.digest(refused.record)
        plain = msgspec.msgpack.encode([refused.detail, refused.record])
        name = seal.name(refused.kind, refused.name) if refused.kind else b""
        self.database.run(
            "INSERT OR IGNORE INTO set_aside VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, refused.reason, seal.seal("set_aside", key, plain=plain), now_ms, name],
        )

    def _keep_steps(self, steps: Sequence[Step], item_key: bytes, *, seal: DeviceSeal, now_ms: int) -> Iterator[str]:
        """Keep the steps of an item; the trajectories of those that are new."""
        for step in steps:
            yield from self._keep_step(step, item_key, seal=seal, now_ms=now_ms)

    def _keep_signals(
        self, signals: Sequence[Signal], item_key: bytes, *, seal: DeviceSeal, now_ms: int
    ) -> Iterator[tuple[Target, bytes]]:
        """Keep the signals of an item; what those that are new judge, by kind and key."""
        for signal in signals:
            yield from self._keep_signal(signal, item_key, seal=seal, now_ms=now_ms)

    def _keep_step(self, step: Step, item_key: bytes, *, seal: DeviceSeal, now_ms: int) -> list[str]:
        plain, key = msgspec.msgpack.encode(step), seal.name("step", step.step_id)
        known = self.database.row(
            "SELECT digest FROM steps WHERE device_id = ? AND step_key = ?", [seal.device_id, key]
        )
        if known is not None:
            self._check_same(step, plain, digest=known[0], seal=seal, now_ms=now_ms)
            return []
        name = "\0".join((step.channel, step.policy.line, *trajectory_key(step)))
        trajectory_id = seal.name("rewarded", name).hex()
        self.database.run(
            "INSERT OR IGNORE INTO trajectories (trajectory_id, device_id, line_id, channel, state, created_ms)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [trajectory_id, seal.device_id, step.policy.line, step.channel, TrajectoryState.OPEN, now_ms],
        )
        names = [seal.name("run", step.run_id), seal.name("session", step.session_id)]
        names.append(seal.name("trajectory", step.trajectory_id) if step.trajectory_id else b"")
        tokens = len(step.prompt_ids) + len(step.response_ids)
        sealed = seal.seal("steps", key, plain=plain)
        self.database.run(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, *names, trajectory_id, seal.digest(plain), tokens, sealed, item_key],
        )
        return [trajectory_id]

    def _keep_signal(
        self, signal: Signal, item_key: bytes, *, seal: DeviceSeal, now_ms: int
    ) -> list[tuple[Target, bytes]]:
        plain, key = msgspec.msgpack.encode(signal), seal.name("signal", signal.signal_id)
        sql = "SELECT digest FROM signals WHERE device_id = ? AND signal_key = ?"
        known = self.database.row(sql, [seal.device_id, key])
        if known is not None:
            self._check_same(signal, plain, digest=known[0], seal=seal, now_ms=now_ms)
            return []
        target = seal.name(signal.target, signal.target_id)
        sql = "SELECT count(*) FROM signals WHERE target_key = ? AND device_id = ?"
        if self.database.count(sql, [target, seal.device_id]) >= MAX_TARGET_SIGNALS:
            refused = refuse(Reason.TOO_MANY, f"its {signal.target} has {MAX_TARGET_SIGNALS} signals", record=signal)
            self._set_aside(refused, seal=seal, now_ms=now_ms)
            return []
        self.database.run(
            "INSERT INTO signals VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, target, seal.digest(plain), seal.seal("signals", key, plain=plain), item_key],
        )
        return [(signal.target, target)]

    def _trajectories_of(self, target: Target, key: bytes) -> list[str]:
        sql = f"SELECT DISTINCT trajectory_id FROM steps WHERE {_COLUMN[target]} = ?"  # noqa: S608 of a table
        return [row[0] for row in self.database.rows(sql, [key])]

    def _check_same(self, record: Step | Signal, plain: bytes, *, digest: bytes, seal: DeviceSeal, now_ms: int) -> None:
        if seal.digest(plain) != digest:
            refused = refuse(Reason.CHANGED, "sent before with other content", record=record)
            self._set_aside(refused, seal=seal, now_ms=now_ms)

    def _mark_ready(self, trajectory_ids: Iterable[str]) -> None:
        order = self.database.count("SELECT max(ready_order) FROM trajectories")
        for trajectory_id in trajectory_ids:
            order += self.database.run(
                "UPDATE trajectories SET state = ?, ready_order = ? WHERE trajectory_id = ? AND state = ? AND EXISTS ("
                " SELECT 1 FROM steps s JOIN signals g ON g.device_id = s.device_id"
                " AND g.target_key IN (s.step_key, s.run_key, s.session_key, s.named_key) WHERE s.trajectory_id = ?)",
                [TrajectoryState.READY, order + 1, trajectory_id, TrajectoryState.OPEN, trajectory_id],
            )

    # giving out

    def ready(self, line_id: str, limit: int, channel: Channel = Channel.TRAIN) -> list[Trajectory]:
        """Up to `limit` trajectories that have a signal and were not consumed, in the order they became ready.

        Their ids, and those of their groups, are the vault's own: unique over all devices.

        Raises:
            StorageError: a record does not open with the keys that are here.
        """
        with self.database.snapshot() as database:
            rows = database.rows(
                "SELECT trajectory_id, device_id FROM trajectories WHERE line_id = ? AND channel = ? AND state = ?"
                " ORDER BY ready_order LIMIT ?",
                [line_id, channel, TrajectoryState.READY, limit],
            )
            return [self._load(trajectory_id, self._seals.open(device_id)) for trajectory_id, device_id in rows]

    def _load(self, trajectory_id: str, seal: DeviceSeal) -> Trajectory:
        rows = self.database.rows(
            "SELECT step_key, run_key, session_key, named_key, sealed FROM steps WHERE trajectory_id = ?",
            [trajectory_id],
        )
        steps = [_STEP.decode(seal.unseal("steps", row[0], sealed=row[4])) for row in rows]
        signals = {
            key: _SIGNAL.decode(seal.unseal("signals", key, sealed=sealed))
            for target in {name for row in rows for name in row[:4] if name}
            for key, sealed in self.database.rows(
                "SELECT signal_key, sealed FROM signals WHERE target_key = ? AND device_id = ?",
                [target, seal.device_id],
            )
        }
        (found,) = assemble(steps, signals.values())
        group_id = seal.name("group", found.group_id).hex() if found.group_id else ""
        return msgspec.structs.replace(found, trajectory_id=trajectory_id, group_id=group_id)

    def count_ready(self, line_id: str, channel: Channel = Channel.TRAIN) -> int:
        """How many trajectories are ready."""
        return self.database.count(
            "SELECT count(*) FROM trajectories WHERE line_id = ? AND channel = ? AND state = ?",
            [line_id, channel, TrajectoryState.READY],
        )

    def consume(self, round_id: str, trajectory_ids: Sequence[str], db: ServerDatabase | None = None) -> None:
        """Mark trajectories as consumed by a round, all or none; part of the transaction that `db` has open.

        What its device forgot after the round had read it is consumed all the same, so that the round is explained.

        Raises:
            VaultError: one of them is not there any more (consumed by another round, or its device was deleted).
        """
        with (db or self.database).write() as database:
            for trajectory_id in trajectory_ids:
                changed = database.run(
                    "UPDATE trajectories SET state = iif(state = ?, state, ?), round_id = ?"
                    " WHERE trajectory_id = ? AND round_id IS NULL",
                    [TrajectoryState.SHREDDED, TrajectoryState.CONSUMED, round_id, trajectory_id],
                )
                if changed != 1:
                    raise VaultError(f"round {round_id}: trajectory {trajectory_id} is not ready any more; start anew")

    def lineage(self, round_id: str) -> list[str]:
        """The trajectories that a round consumed, in the order they became ready."""
        sql = "SELECT trajectory_id FROM trajectories WHERE round_id = ? ORDER BY ready_order"
        return [row[0] for row in self.database.rows(sql, [round_id])]

    # forgetting and counting

    def forget(self, request: ForgetRequest, *, now_ms: int | None = None) -> ForgetReceipt:
        """Delete what a device asks to be forgotten, and empty the log. Asked again, it is answered as it was.

        Raises:
            VaultError: another request of this device had this id.
            StorageError: nothing was deleted, or the log could not be emptied; ask again.
        """
        now_ms = now_ms or time.time_ns() // 1_000_000
        receipt = forget(self.database, self._seals, request=request, now_ms=now_ms)
        self.database.scrub()
        return receipt

    def delete_device(self, device_id: str) -> Erased:
        """Shred all that a device sent: destroy its key, delete its rows, empty the log. Running it again is harmless.

        Raises:
            StorageError: rows are deleted, but the log could not be emptied; run it again.
        """
        with self.database.write() as database:
            erased = erase_device(database, device_id, keep_under_way=False)
        self.database.scrub()
        return erased

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
            trajectories=trajectories,
            set_aside=dict(rows("SELECT reason, count(*) FROM set_aside GROUP BY 1 ORDER BY 1")),
        )


def _received(item: UploadItem, *, device_id: str, received_ms: int) -> ItemReceived:
    return ItemReceived(device_id=device_id, item_id=item.item_id, received_ms=received_ms, sha256=sha256(item.body))


def lineage_root(trajectory_ids: Iterable[str]) -> str:
    """One hash over the trajectories of a round, for its adapter's manifest."""
    return sha256("\n".join(sorted(trajectory_ids)).encode())

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
from clawloop_server.errors import DeviceError, VaultError
from clawloop_server.home import Home
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.intake import MAX_TARGET_SIGNALS, Reason, Refused, sort_item
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared.files import sha256
from clawloop_shared.messages import UploadItem
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
    """a round learned from it, and its device was deleted since"""


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


class Shredded(msgspec.Struct, frozen=True):
    """What the deletion of a device destroyed, and which rounds had learned from it before."""

    steps: int
    signals: int
    items: int
    rounds: list[str]


class Vault:
    """The vault of a server, safe to use from any thread."""

    def __init__(self, database: ServerDatabase, *, home: Home, master_key: bytes) -> None:
        self.database = database
        self._home = home
        self._master_key = master_key

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

    def receive(self, device_id: str, items: Sequence[UploadItem], *, now_ms: int | None = None) -> list[str]:
        """Keep what a device sent; the ids of the items that are on disk when this returns (all of them).

        What was sent before counts once. A record that is wrong is set aside with its reason.

        Raises:
            DeviceError: the device is unknown, revoked or deleted; nothing is kept.
            StorageError: nothing could be written; send it again.
        """
        vocabularies = {base.line_id: base.shape.vocab_size for base in list_bases(self._home)}
        now_ms = now_ms or time.time_ns() // 1_000_000
        with self.database.write():
            seal = self._seal_to_write(device_id)
            touched: dict[str, None] = {}
            judged: dict[tuple[Target, bytes], None] = {}
            for item in items:  # one at a time: unpacked, an item may be far larger than it came
                if self._note_item(item, seal=seal, now_ms=now_ms):
                    intake = sort_item(item, vocabularies)
                    for refused in intake.refused:
                        self._set_aside(refused, seal=seal, now_ms=now_ms)
                    touched |= dict.fromkeys(self._keep_steps(intake.steps, seal=seal, now_ms=now_ms))
                    judged |= dict.fromkeys(self._keep_signals(intake.signals, seal=seal, now_ms=now_ms))
            for target, key in judged:
                touched |= dict.fromkeys(self._trajectories_of(target, key))
            self._mark_ready(touched)
        return [item.item_id for item in items]

    def _seal_to_write(self, device_id: str) -> DeviceSeal:
        row = self.database.row("SELECT state FROM devices WHERE device_id = ?", [device_id])
        if row is None or row[0] != "joined":
            raise DeviceError(f"device {device_id} is {row[0] if row else 'unknown'}; nothing of it is kept")
        if not self.database.row("SELECT 1 FROM device_secrets WHERE device_id = ?", [device_id]):
            seal = DeviceSeal.new(vault_id=self.database.vault_id, device_id=device_id)
            self.database.run("INSERT INTO device_secrets VALUES (?, ?)", [device_id, seal.wrap(self._master_key)])
        return self._seal(device_id)

    def _seal(self, device_id: str) -> DeviceSeal:
        row = self.database.row("SELECT wrapped FROM device_secrets WHERE device_id = ?", [device_id])
        if row is None:
            raise DeviceError(f"device {device_id} has no key in the vault; it sent nothing, or was deleted")
        vault_id = self.database.vault_id
        return DeviceSeal.unwrap(row[0], self._master_key, vault_id=vault_id, device_id=device_id)

    def _note_item(self, item: UploadItem, *, seal: DeviceSeal, now_ms: int) -> bool:
        """Whether the item is new; one with a known id and another body is set aside."""
        key, digest = seal.name("item", item.item_id), seal.digest(item.body)
        sql = "SELECT digest FROM items WHERE device_id = ? AND item_key = ?"
        known = self.database.row(sql, [seal.device_id, key])
        if known is not None:
            if known[0] != digest:
                refused = Refused(Reason.CHANGED, "an item with this id was sent before with another body", item.body)
                self._set_aside(refused, seal=seal, now_ms=now_ms)
            return False
        facts = msgspec.msgpack.encode([item.item_id[:256], item.receipt_id[:256], item.kind[:64]])
        self.database.run(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, digest, seal.seal("items", key, plain=facts), len(item.body), now_ms],
        )
        return True

    def _set_aside(self, refused: Refused, *, seal: DeviceSeal, now_ms: int) -> None:
        key = seal.digest(refused.record)
        plain = msgspec.msgpack.encode([refused.detail, refused.record])
        self.database.run(
            "INSERT OR IGNORE INTO set_aside VALUES (?, ?, ?, ?, ?)",
            [seal.device_id, key, refused.reason, seal.seal("set_aside", key, plain=plain), now_ms],
        )

    def _keep_steps(self, steps: Sequence[Step], *, seal: DeviceSeal, now_ms: int) -> Iterator[str]:
        """Keep steps; the trajectories of those that are new."""
        for step in steps:
            yield from self._keep_step(step, seal=seal, now_ms=now_ms)

    def _keep_signals(
        self, signals: Sequence[Signal], *, seal: DeviceSeal, now_ms: int
    ) -> Iterator[tuple[Target, bytes]]:
        """Keep signals; what those that are new judge, by kind and key."""
        for signal in signals:
            yield from self._keep_signal(signal, seal=seal, now_ms=now_ms)

    def _keep_step(self, step: Step, *, seal: DeviceSeal, now_ms: int) -> list[str]:
        plain, key = msgspec.msgpack.encode(step), seal.name("step", step.step_id)
        known = self.database.row(
            "SELECT digest FROM steps WHERE device_id = ? AND step_key = ?", [seal.device_id, key]
        )
        if known is not None:
            self._check_same(plain, known[0], seal=seal, now_ms=now_ms)
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
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, *names, trajectory_id, seal.digest(plain), tokens, sealed],
        )
        return [trajectory_id]

    def _keep_signal(self, signal: Signal, *, seal: DeviceSeal, now_ms: int) -> list[tuple[Target, bytes]]:
        plain, key = msgspec.msgpack.encode(signal), seal.name("signal", signal.signal_id)
        sql = "SELECT digest FROM signals WHERE device_id = ? AND signal_key = ?"
        known = self.database.row(sql, [seal.device_id, key])
        if known is not None:
            self._check_same(plain, known[0], seal=seal, now_ms=now_ms)
            return []
        target = seal.name(signal.target, signal.target_id)
        sql = "SELECT count(*) FROM signals WHERE target_key = ? AND device_id = ?"
        if self.database.count(sql, [target, seal.device_id]) >= MAX_TARGET_SIGNALS:
            refused = Refused(Reason.TOO_MANY, f"its {signal.target} has {MAX_TARGET_SIGNALS} signals", plain)
            self._set_aside(refused, seal=seal, now_ms=now_ms)
            return []
        self.database.run(
            "INSERT INTO signals VALUES (?, ?, ?, ?, ?)",
            [seal.device_id, key, target, seal.digest(plain), seal.seal("signals", key, plain=plain)],
        )
        return [(signal.target, target)]

    def _trajectories_of(self, target: Target, key: bytes) -> list[str]:
        sql = f"SELECT DISTINCT trajectory_id FROM steps WHERE {_COLUMN[target]} = ?"  # noqa: S608 of a table
        return [row[0] for row in self.database.rows(sql, [key])]

    def _check_same(self, plain: bytes, digest: bytes, *, seal: DeviceSeal, now_ms: int) -> None:
        if seal.digest(plain) != digest:
            self._set_aside(Refused(Reason.CHANGED, "sent before with other content", plain), seal=seal, now_ms=now_ms)

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
            return [self._load(trajectory_id, self._seal(device_id)) for trajectory_id, device_id in rows]

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

        Raises:
            VaultError: one of them is not ready any more (consumed by another round, or its device was deleted).
        """
        with (db or self.database).write() as database:
            for trajectory_id in trajectory_ids:
                changed = database.run(
                    "UPDATE trajectories SET state = ?, round_id = ? WHERE trajectory_id = ? AND state = ?",
                    [TrajectoryState.CONSUMED, round_id, trajectory_id, TrajectoryState.READY],
                )
                if changed != 1:
                    raise VaultError(f"round {round_id}: trajectory {trajectory_id} is not ready any more; start anew")

    def lineage(self, round_id: str) -> list[str]:
        """The trajectories that a round consumed, in the order they became ready."""
        sql = "SELECT trajectory_id FROM trajectories WHERE round_id = ? ORDER BY ready_order"
        return [row[0] for row in self.database.rows(sql, [round_id])]

    # forgetting and counting

    def delete_device(self, device_id: str) -> Shredded:
        """Shred all that a device sent: destroy its key, delete its rows, empty the log. Running it again is harmless.

        Raises:
            StorageError: rows are deleted, but the log could not be emptied; run it again.
        """
        with self.database.write() as database:
            counts = [
                database.run(f"DELETE FROM {table} WHERE device_id = ?", [device_id])  # noqa: S608 constant names
                for table in ("steps", "signals", "items", "set_aside", "device_secrets")
            ]
            sql = "SELECT DISTINCT round_id FROM trajectories WHERE device_id = ? AND round_id IS NOT NULL"
            rounds = [row[0] for row in database.rows(sql, [device_id])]
            sql = "DELETE FROM trajectories WHERE device_id = ? AND round_id IS NULL"
            database.run(sql, [device_id])
            sql = "UPDATE trajectories SET state = ? WHERE device_id = ?"
            database.run(sql, [TrajectoryState.SHREDDED, device_id])
        self.database.scrub()
        return Shredded(steps=counts[0], signals=counts[1], items=counts[2], rounds=rounds)

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


def lineage_root(trajectory_ids: Iterable[str]) -> str:
    """One hash over the trajectories of a round, for its adapter's manifest."""
    return sha256("\n".join(sorted(trajectory_ids)).encode())

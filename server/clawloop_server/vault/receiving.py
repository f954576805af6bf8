"""Keeping what one call of one device brought: items, steps, signals, marks, deltas, each once, whatever comes first.

Part of the transaction that is open. Afterwards the trajectories that something came for are brought in line
(`standing`). Knows no clock; what makes a record bad is in `intake`, and of a delta in `delta_intake`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.delta_intake import sort_delta
from clawloop_server.vault.deltas import keep_delta
from clawloop_server.vault.forgetting import Graves
from clawloop_server.vault.groups import TrajectoryState
from clawloop_server.vault.intake import (
    MAX_ASIDE_BYTES,
    MAX_GROUP,
    MAX_TARGET_SIGNALS,
    MAX_TRAJECTORY_STEPS,
    MAX_TRAJECTORY_TOKENS,
    Intake,
    Reason,
    Refused,
    refuse,
    sort_item,
)
from clawloop_server.vault.pins import lose
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared.deltas import DELTA_KIND
from clawloop_shared.lora import ModelShape
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Mark, Signal, Step, Target
from clawloop_shared.signals import RewardRules, trajectory_key

_MARK = msgspec.msgpack.Decoder(Mark)
_COLUMN = {
    Target.RUN: "run_key",
    Target.SESSION: "session_key",
    Target.TRAJECTORY: "named_key",
}


class Receiver:
    """Takes the items of one call."""

    def __init__(
        self,
        database: ServerDatabase,
        seal: DeviceSeal,
        *,
        shapes: Mapping[str, ModelShape],
        rules: RewardRules,
        federate: FederateSettings,
        now_ms: int,
    ) -> None:
        """`shapes`: the model of each line that is trained."""
        self._database, self._seal, self._now_ms = database, seal, now_ms
        self._shapes, self._rules, self._federate = shapes, rules, federate
        self._vocabularies = {line_id: shape.vocab_size for line_id, shape in shapes.items()}
        self._graves = Graves.of(database, seal)
        self._touched: dict[str, None] = {}
        self._judged: dict[tuple[Target, bytes], None] = {}

    def take(self, item: UploadItem) -> int:
        """Keep what is in an item, if it is new; when it first came."""
        received_ms, is_new = self._note_item(item)
        item_key = self._seal.name("item", item.item_id)
        if is_new and item.kind == DELTA_KIND:
            self._keep_delta(item, item_key)
        elif is_new:
            intake = sort_item(item, self._vocabularies, forgotten=self._graves.hold)
            self._keep(intake, item_key=item_key)
        return received_ms

    def finish(self) -> None:
        """Bring in line all that something came for."""
        for target, key in self._judged:
            self._touched |= dict.fromkeys(self._trajectories_of(target, key))
        standing.update(self._database, self._touched, arrived_ms=self._now_ms)

    def _note_item(self, item: UploadItem) -> tuple[int, bool]:
        """When the item came, and whether it is new; one with a known id and another body is set aside."""
        seal = self._seal
        key, digest = seal.name("item", item.item_id), seal.digest(item.body)
        sql = "SELECT digest, received_ms FROM items WHERE device_id = ? AND item_key = ?"
        known = self._database.row(sql, [seal.device_id, key])
        if known is not None and known[0] == digest:
            return known[1], False
        if self._graves.hold_name("item", item.item_id):
            return self._now_ms, False
        if known is not None:
            body = b"" if item.kind == DELTA_KIND else item.body[:MAX_ASIDE_BYTES]
            self._set_aside(Refused(Reason.CHANGED, "an item with this id was sent before with another body", body))
            return self._now_ms, False
        facts = msgspec.msgpack.encode([item.item_id[:256], item.receipt_id[:256], item.kind[:64]])
        self._database.run(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, digest, seal.seal("items", key, plain=facts), len(item.body), self._now_ms],
        )
        return self._now_ms, True

    def _set_aside(self, refused: Refused) -> None:
        seal, key = self._seal, self._seal.digest(refused.record)
        plain = msgspec.msgpack.encode([refused.detail, refused.record])
        name = seal.name(refused.kind, refused.name) if refused.kind else b""
        self._database.run(
            "INSERT OR IGNORE INTO set_aside VALUES (?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, refused.reason, seal.seal("set_aside", key, plain=plain), self._now_ms, name],
        )

    def _keep(self, intake: Intake, *, item_key: bytes) -> None:
        for refused in intake.refused:
            self._set_aside(refused)
        for step in intake.steps:
            self._keep_step(step, item_key)
        for signal in intake.signals:
            self._keep_signal(signal, item_key)
        for mark in intake.marks:
            self._keep_mark(mark)

    def _keep_delta(self, item: UploadItem, item_key: bytes) -> None:
        found = sort_delta(
            item,
            device_id=self._seal.device_id,
            database=self._database,
            shapes=self._shapes,
            settings=self._federate,
            now_ms=self._now_ms,
        )
        if isinstance(found, Refused):
            self._set_aside(found)
            return
        keep_delta(self._database, self._seal, found, item_key=item_key, body=item.body, now_ms=self._now_ms)

    # steps

    def _keep_step(self, step: Step, item_key: bytes) -> None:
        database, seal = self._database, self._seal
        plain, key = msgspec.msgpack.encode(step), seal.name("step", step.step_id)
        sql = "SELECT digest FROM steps WHERE device_id = ? AND step_key = ?"
        known = database.row(sql, [seal.device_id, key])
        if known is not None:
            self._check_same(step, plain, digest=known[0])
            return
        trajectory_id = self._trajectory_of(step)
        if trajectory_id is None:
            self._set_aside(refuse(Reason.LARGE_GROUP, f"its group has {MAX_GROUP} trajectories", record=step))
            return
        tokens = len(step.prompt_ids) + len(step.response_ids)
        if not self._has_room(trajectory_id, tokens):
            limits = f"{MAX_TRAJECTORY_STEPS} steps or {MAX_TRAJECTORY_TOKENS} tokens"
            detail = f"with its {tokens} tokens its trajectory would have more than {limits}"
            self._set_aside(refuse(Reason.LONG_TRAJECTORY, detail, record=step))
            return
        names = [seal.name("run", step.run_id), seal.name("session", step.session_id)]
        names.append(seal.name("trajectory", step.trajectory_id) if step.trajectory_id else b"")
        facts = [trajectory_id, seal.digest(plain), tokens]
        left_out = database.count(
            "SELECT left_out FROM marks WHERE device_id = ? AND step_key = ?", [seal.device_id, key]
        )
        database.run(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, *names, *facts, seal.seal("steps", key, plain=plain), item_key, left_out],
        )
        sql = "UPDATE trajectories SET classified = 0, steps = steps + 1, tokens = tokens + ? WHERE trajectory_id = ?"
        database.run(sql, [tokens, trajectory_id])
        standing.enter(database, trajectory_id, size=step.group_size if step.group_id else 0)
        self._touched[trajectory_id] = None

    def _trajectory_of(self, step: Step) -> str | None:
        """The trajectory that a step belongs to, noted if it is new; None if its group has no room for another."""
        seal, line, channel = self._seal, step.policy.line, step.channel
        in_group = [step.group_id] if step.group_id else []
        trajectory_id = seal.name("rewarded", "\0".join((channel, line, *trajectory_key(step), *in_group))).hex()
        if self._database.row("SELECT 1 FROM trajectories WHERE trajectory_id = ?", [trajectory_id]):
            return trajectory_id
        group_id = trajectory_id
        if in_group:
            group_id = seal.name("group", "\0".join((channel, line, step.group_id))).hex()
            sql = "SELECT count(*) FROM trajectories WHERE group_id = ?"
            if self._database.count(sql, [group_id]) >= MAX_GROUP:
                return None
        self._database.run(
            "INSERT INTO trajectories (trajectory_id, device_id, line_id, channel, state, created_ms, group_id)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            [trajectory_id, seal.device_id, line, channel, TrajectoryState.OPEN, self._now_ms, group_id],
        )
        return trajectory_id

    def _has_room(self, trajectory_id: str, tokens: int) -> bool:
        sql = "SELECT steps, tokens FROM trajectories WHERE trajectory_id = ?"
        ((steps, before),) = self._database.rows(sql, [trajectory_id])
        return bool(steps < MAX_TRAJECTORY_STEPS and before + tokens <= MAX_TRAJECTORY_TOKENS)

    # signals

    def _keep_signal(self, signal: Signal, item_key: bytes) -> None:
        database, seal = self._database, self._seal
        plain, key = msgspec.msgpack.encode(signal), seal.name("signal", signal.signal_id)
        sql = "SELECT digest FROM signals WHERE device_id = ? AND signal_key = ?"
        known = database.row(sql, [seal.device_id, key])
        if known is not None:
            self._check_same(signal, plain, digest=known[0])
            return
        target = seal.name(signal.target, signal.target_id)
        sql = "SELECT count(*) FROM signals WHERE target_key = ? AND device_id = ?"
        if database.count(sql, [target, seal.device_id]) >= MAX_TARGET_SIGNALS:
            self._set_aside(
                refuse(Reason.TOO_MANY, f"its {signal.target} has {MAX_TARGET_SIGNALS} signals", record=signal)
            )
            return
        facts = [target, seal.digest(plain), seal.seal("signals", key, plain=plain), item_key]
        database.run(
            "INSERT INTO signals VALUES (?, ?, ?, ?, ?, ?, ?)",
            [seal.device_id, key, *facts, self._rules.counts(signal)],
        )
        self._judged[signal.target, target] = None

    def _trajectories_of(self, target: Target, key: bytes) -> list[str]:
        found = "SELECT DISTINCT trajectory_id FROM steps WHERE"
        if target is Target.STEP:  # the key of the table, with the device; the others have indexes of their own
            rows = self._database.rows(f"{found} device_id = ? AND step_key = ?", [self._seal.device_id, key])
        else:
            rows = self._database.rows(f"{found} {_COLUMN[target]} = ?", [key])
        return [row[0] for row in rows]

    def _check_same(self, record: Step | Signal, plain: bytes, *, digest: bytes) -> None:
        if self._seal.digest(plain) != digest:
            found = refuse(Reason.CHANGED, "sent before with other content", record=record)
            self._set_aside(msgspec.structs.replace(found, record=found.record[:MAX_ASIDE_BYTES]))

    # marks

    def _keep_mark(self, mark: Mark) -> None:
        """Keep a mark if it is the latest on its step, which need not be here yet, and let the step obey it."""
        database, seal = self._database, self._seal
        key = seal.name("step", mark.step_id)
        known = database.row("SELECT sealed FROM marks WHERE device_id = ? AND step_key = ?", [seal.device_id, key])
        if known is not None and _age(_MARK.decode(seal.unseal("marks", key, sealed=known[0]))) >= _age(mark):
            return
        sealed = seal.seal("marks", key, plain=msgspec.msgpack.encode(mark))
        left_out = not mark.trainable
        if left_out:
            taken = "SELECT trajectory_id FROM steps WHERE device_id = ? AND step_key = ? AND NOT left_out"
            lose(database, taken, [seal.device_id, key])
        database.run("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)", [seal.device_id, key, left_out, sealed])
        found = database.rows(
            "UPDATE steps SET left_out = ? WHERE device_id = ? AND step_key = ? RETURNING trajectory_id",
            [left_out, seal.device_id, key],
        )
        self._touched |= {trajectory_id: None for (trajectory_id,) in found}


def _age(mark: Mark) -> tuple[int, str, bool]:
    """What the latest mark has most of. One id with two contents: that which takes the step out holds."""
    return mark.created_ms, mark.mark_id, not mark.trainable

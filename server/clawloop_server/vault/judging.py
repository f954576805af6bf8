"""What the server's own judge has not looked at yet, and keeping what it says. A trajectory is looked at again when
another step of it comes. What was said goes with the step that it was said of."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared.ids import new_id
from clawloop_shared.records import Channel, Signal, Step, Target
from clawloop_shared.signals import RewardRules

SOURCE = "classifier"
_STEP = msgspec.msgpack.Decoder(Step)


class Answer(msgspec.Struct, frozen=True):
    """The last step of a trajectory that was not judged by the server yet. `value` in [-1, 1], once it was; None: there
    is no judgement of it."""

    trajectory_id: str
    device_id: str
    step: Step
    value: float | None = None


def answers(database: ServerDatabase, seals: DeviceSeals, line_id: str, *, limit: int) -> list[Answer]:
    """Up to `limit` answers that wait for a judgement, the oldest first. In a snapshot.

    Raises:
        StorageError: a record does not open with the keys that are here.
    """
    rows = database.rows(
        "SELECT trajectory_id, device_id FROM trajectories WHERE line_id = ? AND channel = ? AND NOT classified"
        " AND state IN ('open', 'judged') ORDER BY created_ms LIMIT ?",
        [line_id, Channel.TRAIN, limit],
    )
    found = []
    for trajectory_id, device_id in rows:
        seal = seals.open(device_id)
        sealed = database.rows("SELECT step_key, sealed FROM steps WHERE trajectory_id = ?", [trajectory_id])
        steps = [_STEP.decode(seal.unseal("steps", key, sealed=body)) for key, body in sealed]
        found.append(Answer(trajectory_id, device_id, max(steps, key=lambda step: (step.created_ms, step.step_id))))
    return found


def keep_values(
    database: ServerDatabase,
    seals: DeviceSeals,
    judged: Sequence[Answer],
    *,
    weight: float,
    rules: RewardRules,
    now_ms: int,
) -> None:
    """Keep what was said of answers, in the transaction that is open; of what was forgotten meanwhile, nothing."""
    for answer in judged:
        seal = seals.get(answer.device_id)
        key = seal.name("step", answer.step.step_id) if seal else b""
        here = "SELECT 1 FROM steps WHERE device_id = ? AND step_key = ? AND trajectory_id = ?"
        if seal is None or not database.row(here, [answer.device_id, key, answer.trajectory_id]):
            continue
        database.run("UPDATE trajectories SET classified = 1 WHERE trajectory_id = ?", [answer.trajectory_id])
        if answer.value is not None:
            signal = _signal(answer.step, answer.value, weight=weight, now_ms=now_ms)
            _keep(database, seal, signal, target=key, counts=rules.counts(signal))
    standing.update(database, [answer.trajectory_id for answer in judged])


def _signal(step: Step, value: float, *, weight: float, now_ms: int) -> Signal:
    return Signal(
        signal_id=f"{SOURCE}-{new_id()}",
        target=Target.STEP,
        target_id=step.step_id,
        source=SOURCE,
        value=value,
        weight=weight,
        created_ms=now_ms,
        evidence="the server's own classifier",
    )


def _keep(database: ServerDatabase, seal: DeviceSeal, signal: Signal, *, target: bytes, counts: bool) -> None:
    plain, key = msgspec.msgpack.encode(signal), seal.name("signal", signal.signal_id)
    facts = [target, seal.digest(plain), seal.seal("signals", key, plain=plain), b""]
    database.run("INSERT INTO signals VALUES (?, ?, ?, ?, ?, ?, ?)", [seal.device_id, key, *facts, counts])

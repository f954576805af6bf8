"""What a round that runs was given: of which trajectories which steps and signals, and which update learns from each.

What comes while it runs changes nothing of that. What is forgotten meanwhile, or taken out by its owner, is lost to the
round: its pin says so, and what is left of the trajectory waits for the next one. Pins go when their round ends. Knows
no tensor. Format: docs/formats/vault.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from clawloop_server.errors import VaultError
from clawloop_server.vault import standing
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.groups import Stage
from clawloop_server.vault.reading import Names, names_of, read_signals, read_trajectory
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared.errors import StorageError
from clawloop_shared.records import Channel, Trajectory
from clawloop_shared.signals import RewardRules

_BEGAN_AGAIN = "SELECT DISTINCT device_id FROM pins WHERE round_id = ? AND lost = 2"
_NAMES = msgspec.msgpack.Decoder(Names)


class Pin(msgspec.Struct, frozen=True):
    """One trajectory of a round. `at_update`: which update learns from it, from 0; none: it is not planned yet, or
    `reason` says why it is set aside. `lost`: it was forgotten or taken out since."""

    trajectory_id: str
    device_id: str
    at_update: int | None
    reason: str
    lost: bool


class Pins:
    """The pins of all rounds that run."""

    def __init__(self, database: ServerDatabase, seals: DeviceSeals, rules: RewardRules) -> None:
        self._database, self._seals, self._rules = database, seals, rules

    def take(
        self, round_id: str, line_id: str, limit: int, *, deadlines: dict[Stage, int], cohort: str = ""
    ) -> tuple[int, int]:
        """Pin what is ready for a cohort to a round, whole groups, in turns by device; how many trajectories and steps.

        Opens no record, so that it holds up nobody. What the round had before is let go.
        """
        with self._database.write() as database:
            self.release(round_id)
            chosen = standing.chosen(database, line_id, Channel.TRAIN, deadlines=deadlines, limit=limit, cohort=cohort)
            steps = 0
            for trajectory_id, device_id in chosen:
                names = names_of(database, trajectory_id, device_id)
                steps += len(names.steps)
                sql = "SELECT sum(tokens) FROM steps WHERE trajectory_id = ?"
                tokens = database.count(sql, [trajectory_id])
                database.run(
                    "INSERT INTO pins VALUES (?, ?, ?, ?, ?, NULL, NULL, '', 0)",
                    [trajectory_id, round_id, device_id, tokens, msgspec.msgpack.encode(names)],
                )
        return len(chosen), steps

    def plan(self, round_id: str, batches: Sequence[Sequence[str]], *, set_aside: Mapping[str, str]) -> None:
        """Note which update learns from what, in this order, and what is set aside for which reason."""
        places = ((at, place, "", name) for at, batch in enumerate(batches) for place, name in enumerate(batch))
        aside = ((None, None, reason, name) for name, reason in set_aside.items())
        with self._database.write() as database:
            sql = "UPDATE pins SET at_update = ?, place = ?, reason = ? WHERE trajectory_id = ? AND round_id = ?"
            database.run_each(sql, [[*values, round_id] for values in (*places, *aside)])

    def of(self, round_id: str) -> list[Pin]:
        """The pins of a round: those of its updates in their order, then the others."""
        rows = self._database.rows(
            "SELECT trajectory_id, device_id, at_update, reason, lost FROM pins WHERE round_id = ?"
            " ORDER BY at_update IS NULL, at_update, place, trajectory_id",
            [round_id],
        )
        return [Pin(name, device_id, at, reason, bool(lost)) for name, device_id, at, reason, lost in rows]

    def read(self, trajectory_ids: Iterable[str], *, unreadable: dict[str, str] | None = None) -> Iterator[Trajectory]:
        """These trajectories as they were pinned, one at a time; those that are lost are passed by. With `unreadable`,
        so are those that cannot be read: it is told of them, and why.

        Raises:
            StorageError: a record does not open with the keys that are here.
            VaultError: the vault was opened with other `[reward]` settings than those that its server runs with.
        """
        for trajectory_id in trajectory_ids:
            try:
                found = self._read(trajectory_id)
            except (StorageError, VaultError, msgspec.MsgspecError) as error:
                if unreadable is None:
                    raise
                unreadable[trajectory_id] = f"cannot be read: {error}"
                continue
            if found is not None:
                yield found

    def _read(self, trajectory_id: str) -> Trajectory | None:
        try:
            with self._database.snapshot() as database:
                found = self._names(trajectory_id)
                if found is None:
                    return None
                seal, names = found
                return read_trajectory(database, seal, trajectory_id, names=names, rules=self._rules)
        except StorageError:
            # The snapshot may be of before its device was deleted, whose key is gone since.
            if self._database.row("SELECT 1 FROM pins WHERE trajectory_id = ? AND NOT lost", [trajectory_id]) is None:
                return None
            raise

    def rewards(self, trajectory_ids: Iterable[str]) -> list[Trajectory]:
        """What `Vault.consume` asks of these trajectories: their signals, without their steps; of one that cannot be
        read, none."""
        found = []
        for trajectory_id in trajectory_ids:
            try:
                pinned = self._names(trajectory_id)
                signals = read_signals(self._database, *pinned) if pinned else []
            except (StorageError, VaultError, msgspec.MsgspecError):
                signals = []
            found.append(Trajectory(trajectory_id=trajectory_id, steps=[], signals=signals, reward=0.0, weight=1.0))
        return found

    def _names(self, trajectory_id: str) -> tuple[DeviceSeal, Names] | None:
        sql = "SELECT device_id, names FROM pins WHERE trajectory_id = ? AND NOT lost"
        row = self._database.row(sql, [trajectory_id])
        return (self._seals.open(row[0]), _NAMES.decode(row[1])) if row else None

    def set_largest_aside(self, round_id: str, at_update: int | None, *, reason: str) -> str | None:
        """Take the trajectory with the most tokens out of an update of a round, or (None) out of what is not planned;
        its id, or None if there is none. Opens no record."""
        with self._database.write() as database:
            row = database.row(
                "SELECT trajectory_id FROM pins WHERE round_id = ? AND at_update IS ? AND NOT lost AND reason = ''"
                " ORDER BY tokens DESC, trajectory_id LIMIT 1",
                [round_id, at_update],
            )
            if row is not None:
                self.set_aside(round_id, {row[0]: reason})
        return row[0] if row else None

    def set_aside(self, round_id: str, reasons: Mapping[str, str]) -> None:
        """Take trajectories out of the updates of a round, for these reasons."""
        sql = "UPDATE pins SET at_update = NULL, place = NULL, reason = ? WHERE trajectory_id = ? AND round_id = ?"
        with self._database.write() as database:
            database.run_each(sql, [[reason, name, round_id] for name, reason in reasons.items()])

    def begin_again(self, round_id: str, trajectory_ids: Iterable[str]) -> None:
        """Note that a round begins again without these, which are lost.

        A device for which it did so before loses its other places in the round, too: they wait for the next one, so
        that nobody can keep the others' round from ending. Not part of another transaction.
        """
        before = {row[0] for row in self._database.rows(_BEGAN_AGAIN, [round_id])}
        sql = "UPDATE pins SET lost = 2 WHERE trajectory_id = ? AND lost = 1 RETURNING device_id"
        with self._database.write() as database:
            devices = {row[0] for name in trajectory_ids for row in database.rows(sql, [name])}
            for device_id in devices & before:
                sql = "DELETE FROM pins WHERE round_id = ? AND device_id = ? AND NOT lost"
                database.run(sql, [round_id, device_id])

    def release(self, round_id: str) -> None:
        """Let go of all that a round has."""
        with self._database.write() as database:
            database.run("DELETE FROM pins WHERE round_id = ?", [round_id])


def lose(database: ServerDatabase, trajectory_ids: str, values: Sequence[object] = ()) -> None:
    """Note that what rounds have of these trajectories (a subquery) is not to be learned from any more. Part of the
    transaction that is open."""
    sql = f"UPDATE pins SET lost = max(lost, 1), names = x'' WHERE trajectory_id IN ({trajectory_ids})"  # noqa: S608 constant text
    database.run(sql, values)

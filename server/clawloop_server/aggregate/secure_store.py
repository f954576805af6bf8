"""Secure sums under way, in the database: after a restart in their middle they go on, or end, as if there was none.

Devices that took on a task of noised learning are expected with it; as soon as there are enough, a sum of them begins.
What a sum comes to is handed on in the transaction that ends it. Knows no network; the rules are in `secure`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from clawloop_server.aggregate.secure import SecureSum, Status, SumState
from clawloop_server.aggregate.secure_delivery import deliver, terms_of
from clawloop_server.aggregate.secure_totals import FOLDER, Counted, Totals
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.sums import gone_since
from clawloop_shared import secure
from clawloop_shared.deltas import LearnTask, LoraDelta
from clawloop_shared.errors import ClawloopError, StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.lora import ModelShape
from clawloop_shared.messages import SecureReply, SecureRequest
from clawloop_shared.secure import Phase

_log = logging.getLogger(__name__)

PATIENCE_MS = 7 * 24 * 3_600_000
"""how long a sum waits for enough devices: they learn when they are idle, and an outbox holds items for a day"""
ATTEMPTS = 3
"""sums of one task that fail, before its devices are expected no more"""
_TICK_MS = 1000
_TOTAL_EVERY = 8
"""masked vectors, until the total is written again; a hub that is killed asks for as many anew"""
_STATE = msgspec.msgpack.Decoder(SumState)
_TASK = msgspec.msgpack.Decoder(LearnTask)


class Keeper(Protocol):
    """Where a sum goes. Part of the transaction that is open."""

    def __call__(self, sum_id: str, delta: LoraDelta, items: dict[str, str], /) -> str:
        """Keep the mean of these devices' deltas for a round (`items`: what each calls its part); or why not.

        Raises:
            StorageError: it cannot be written.
        """
        ...


class SumFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A sum as it is told of. `members`: the devices whose values are in it."""

    sum_id: str
    task_id: str
    line_id: str
    status: Status
    phase: Phase
    reason: str
    began_ms: int
    ended_ms: int | None
    members: list[str]


class SecureSums:
    """The `Sums` of the dispatcher; safe to use from any thread."""

    def __init__(
        self,
        database: ServerDatabase,
        *,
        settings: FederateSettings,
        shape_of: Callable[[str], ModelShape],
        keep: Keeper,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`shape_of`: the model of a line; raises ClawloopError if there is none."""
        self._database, self._settings, self._shape_of, self._keep_sum = database, settings, shape_of, keep
        self._clock_ms, self._lock, self._ticked_ms = clock_ms, threading.RLock(), 0
        self._sums: dict[str, SecureSum] = {}
        self._totals, self._kept_totals = Totals(database.path.parent / FOLDER), dict[str, int]()
        for (sum_id,) in database.rows("SELECT sum_id FROM secure_sums WHERE status = ?", [Status.RUNNING]):
            self._load(sum_id)
        self._totals.keep_only(self._sums)

    # who is expected

    def expect(self, device_id: str, task: LearnTask) -> None:
        """A device will learn this, for a sum, unless it was in one of that task. Raises StorageError."""
        if not task.secure:
            return
        with self._database.write() as database:
            database.run(
                "INSERT OR IGNORE INTO secure_expected SELECT ?1, ?2, ?3, ?4 WHERE NOT EXISTS (SELECT 1 FROM"
                " secure_members JOIN secure_sums USING (sum_id) WHERE task_id = ?1 AND device_id = ?2)",
                [task.task_id, device_id, msgspec.msgpack.encode(task), self._clock_ms()],
            )

    def gathering(self, task: LearnTask, cohort: str) -> str:
        """The id of a task that is this one but for its id, and for which devices of the cohort wait, none of which was
        in a sum yet; else its own. Those that waited longest count."""
        rows = self._database.rows(
            "SELECT task_id, task FROM secure_expected JOIN devices USING (device_id)"
            " WHERE state = 'joined' AND cohort = ? AND NOT EXISTS (SELECT 1 FROM secure_sums"
            " JOIN secure_members USING (sum_id) WHERE secure_sums.task_id = secure_expected.task_id)"
            " GROUP BY task_id ORDER BY min(since_ms), task_id",
            [cohort],
        )
        wanted = msgspec.structs.replace(task, task_id="")
        same = (name for name, kept in rows if msgspec.structs.replace(_TASK.decode(kept), task_id="") == wanted)
        return next(same, task.task_id)

    # the dispatcher's side

    def due(self, device_id: str) -> SecureRequest | None:
        """What that device is to be asked now; None: nothing, or it has answered."""
        with self._lock:
            now_ms = self._clock_ms()
            if not 0 <= now_ms - self._ticked_ms < _TICK_MS:
                self._ticked_ms = now_ms
                try:
                    self._tick(now_ms)
                except StorageError as error:  # tried again in a second; what is asked meanwhile is what is on disk
                    _log.error("secure sums do not go on: %s", error)
            asked = (each.due(device_id, now_ms=now_ms) for each in self._sums.values())
            return next((request for request in asked if request is not None), None)

    def answered(self, device_id: str, reply: SecureReply) -> None:
        """Keep a device's part, on disk when this returns; of a sum that is over nothing is kept.

        Raises:
            SumError, SignatureInvalid, WireError: it is none, and the device is out of that sum.
            StorageError: it could not be kept; the device is asked again.
        """
        with self._lock:
            found = self._sums.get(reply.sum_id)
            if found is None:
                return
            try:
                found.answered(device_id, reply, now_ms=self._clock_ms())
            finally:
                self._keep(found)

    def tick(self) -> None:
        """Begin what can begin, go on with what has waited long enough. Raises StorageError."""
        with self._lock:
            self._tick(self._clock_ms())

    def _tick(self, now_ms: int) -> None:
        self._leave_gone(now_ms)
        for each in list(self._sums.values()):
            before = each.state.phase, each.state.status
            each.tick(now_ms)
            if (each.state.phase, each.state.status) != before or each.state.status is not Status.RUNNING:
                self._keep(each)
        self._begin(now_ms)

    def _leave_gone(self, now_ms: int) -> None:
        """Who was revoked, or asked to forget everything, takes no part any more; a sum that has the values of one that
        asked that, or was deleted, is none."""
        for each in list(self._sums.values()):
            ids = list(each.state.devices)
            marks = ", ".join("?" * len(ids))
            sql = f"SELECT device_id FROM devices WHERE state = 'joined' AND device_id IN ({marks})"  # noqa: S608 marks alone
            joined = {row[0] for row in self._database.rows(sql, ids)}
            gone = gone_since(self._database, each.state.terms.sum_id, ids)
            leaving = [name for name in ids if name not in each.state.out and (name in gone or name not in joined)]
            for device_id in leaving:
                if device_id in each.members and device_id in gone:
                    each.fail(f"device {device_id} {gone[device_id]}, and its values are in the sum")
                else:
                    each.leave(device_id, gone.get(device_id, "it may not sync any more"), now_ms=now_ms)
                self._keep(each)
                if each.state.status is not Status.RUNNING:
                    break

    # beginning

    def _begin(self, now_ms: int) -> None:
        rows = self._database.rows(
            "SELECT task_id, cohort, count(*) FROM secure_expected JOIN devices USING (device_id)"
            " WHERE state = 'joined' GROUP BY task_id, cohort"
        )
        for task_id, cohort, count in rows:
            of_these = (each for each in self._sums.values() if each.state.terms.task_id == task_id)
            running = next((each for each in of_these if each.state.cohort == cohort), None)
            if running is not None:
                self._add_late(running)
            elif count >= self._settings.secure_min_devices:
                self._begin_one(task_id, cohort, now_ms=now_ms)

    def _expected(self, task_id: str, cohort: str) -> tuple[list[LearnTask], dict[str, bytes]]:
        """The task, and the enrolled keys of the devices that wait with it, the longest waiting first."""
        rows = self._database.rows(
            "SELECT task, device_id, device_key FROM secure_expected JOIN devices USING (device_id)"
            " WHERE task_id = ? AND cohort = ? AND state = 'joined' ORDER BY since_ms, device_id",
            [task_id, cohort],
        )
        return [_TASK.decode(row[0]) for row in rows[:1]], {device_id: key for _, device_id, key in rows}

    def _add_late(self, running: SecureSum) -> None:
        state = running.state
        if state.phase is not Phase.ADVERTISE:
            return
        known = len(state.devices)
        for device_id, key in self._expected(state.terms.task_id, state.cohort)[1].items():
            running.add(device_id, key)
        if len(state.devices) != known:
            self._keep(running)

    def _begin_one(self, task_id: str, cohort: str, *, now_ms: int) -> None:
        (task,), devices = self._expected(task_id, cohort)
        chosen = dict(list(devices.items())[: secure.MAX_MEMBERS])
        try:
            terms = terms_of(
                task,
                self._shape_of(task.line_id),
                sum_id=new_id(),
                min_members=self._settings.secure_min_devices,
            )
        except ClawloopError as error:
            _log.error("no secure sum: %s", error)
            with self._database.write() as database:
                database.run("DELETE FROM secure_expected WHERE task_id = ?", [task_id])
            return
        begun = SecureSum.begin(
            terms,
            chosen,
            cohort=cohort,
            sigma=task.sigma,
            now_ms=now_ms,
            phase_ms=self._phase_ms,
            patience_ms=PATIENCE_MS,
        )
        with self._database.write() as database:
            database.run(
                "INSERT INTO secure_sums (sum_id, task_id, line_id, status, phase, reason, began_ms, state)"
                " VALUES (?, ?, ?, ?, ?, '', ?, ?)",
                [
                    terms.sum_id,
                    task_id,
                    task.line_id,
                    Status.RUNNING,
                    Phase.ADVERTISE,
                    now_ms,
                    msgspec.msgpack.encode(begun.state),
                ],
            )
        self._sums[terms.sum_id] = begun
        _log.info("secure sum %s of task %s begins with %d devices", terms.sum_id, task_id, len(chosen))

    @property
    def _phase_ms(self) -> int:
        return int(self._settings.secure_phase_s * 1000)

    # keeping

    def _load(self, sum_id: str) -> None:
        """A sum as it is on disk. Whose values are not in the total that was kept is asked again, if it is not too
        late."""
        sql = "SELECT state FROM secure_sums WHERE sum_id = ? AND status = ?"
        row = self._database.row(sql, [sum_id, Status.RUNNING])
        self._sums.pop(sum_id, None)
        if row is None:
            return
        state = _STATE.decode(row[0])
        try:
            counted, total = self._totals.read(sum_id, values=state.terms.values + 1)
        except StorageError as error:
            _log.error("secure sum %s: %s", sum_id, error)
            counted, total = Counted(), None
        lost = state.phase in (Phase.CONFIRM, Phase.UNMASK) and counted.places != state.masked
        state.masked, state.items = counted.places, counted.items
        self._kept_totals[sum_id] = len(counted.places)
        self._sums[sum_id] = found = SecureSum(state, phase_ms=self._phase_ms, total=total)
        if lost:
            found.fail("the total of its masked values was lost")

    def _keep(self, each: SecureSum) -> None:
        """Have a sum on disk as it is; if that fails it is again what it was."""
        sum_id = each.state.terms.sum_id
        try:
            self._keep_total(each)
            with self._database.write():
                if each.state.status is Status.RUNNING:
                    self._write(each)
                else:
                    self._end(each)
        except BaseException:
            self._load(sum_id)
            raise
        if each.state.status is not Status.RUNNING:
            self._sums.pop(sum_id, None)
            self._totals.drop(sum_id)

    def _keep_total(self, each: SecureSum) -> None:
        """Before what is known of it is written: after some answers, and when its phase is over, for then nobody can be
        asked for its values again."""
        state, sum_id = each.state, each.state.terms.sum_id
        new = len(state.masked) - self._kept_totals.get(sum_id, 0)
        if state.status is Status.RUNNING and (new >= _TOTAL_EVERY or (new and state.phase is not Phase.MASKED)):
            self._totals.write(sum_id, Counted(state.masked, state.items), each.total)
            self._kept_totals[sum_id] = len(state.masked)

    def _write(self, each: SecureSum) -> None:
        self._database.run(
            "UPDATE secure_sums SET state = ?, phase = ? WHERE sum_id = ?",
            [msgspec.msgpack.encode(each.state), each.state.phase, each.state.terms.sum_id],
        )

    def _end(self, each: SecureSum) -> None:
        state, sum_id = each.state, each.state.terms.sum_id
        self._database.run(
            "UPDATE secure_sums SET status = ?, phase = ?, reason = ?, ended_ms = ?, state = NULL WHERE sum_id = ?",
            [state.status, state.phase, state.reason, self._clock_ms(), sum_id],
        )
        members = each.members
        self._database.run_each(
            "INSERT OR IGNORE INTO secure_members (sum_id, device_id) VALUES (?, ?)",
            [(sum_id, name) for name in members],
        )
        self._forget_expected(each, members)
        if each.result is not None:
            delta = deliver(state.terms, each.result, self._shape_of(state.terms.line_id))
            why_not = self._keep_sum(sum_id, delta, each.items)
            self._database.run("UPDATE secure_sums SET reason = ? WHERE sum_id = ?", [why_not, sum_id])
            _log.info("secure sum %s is done: %d members%s", sum_id, len(members), why_not and f"; {why_not}")
            return
        _log.warning("secure sum %s of task %s: %s", sum_id, state.terms.task_id, state.reason)

    def _forget_expected(self, each: SecureSum, members: Iterable[str]) -> None:
        """Who gave its values, or will not, is not asked into the next sum of that task; after too many nobody is."""
        state = each.state
        unwilling = state.out if state.phase is Phase.ADVERTISE else {}
        done = {*members, *each.culprits, *unwilling}
        self._database.run_each(
            "DELETE FROM secure_expected WHERE task_id = ? AND device_id = ?",
            [(state.terms.task_id, device_id) for device_id in done],
        )
        sql = "SELECT count(*) FROM secure_sums WHERE task_id = ? AND status = ?"
        failed = self._database.count(sql, [state.terms.task_id, Status.FAILED])
        if state.status is Status.FAILED and (failed >= ATTEMPTS or state.phase is Phase.ADVERTISE):
            self._database.run("DELETE FROM secure_expected WHERE task_id = ?", [state.terms.task_id])

    # telling

    def overview(self, *, limit: int = 20) -> list[SumFacts]:
        """The latest sums, the newest first."""
        return overview(self._database, limit=limit)


def overview(database: ServerDatabase, *, limit: int = 20) -> list[SumFacts]:
    """The latest sums, the newest first."""
    rows = database.rows(
        "SELECT sum_id, task_id, line_id, status, phase, reason, began_ms, ended_ms FROM secure_sums"
        " ORDER BY began_ms DESC, sum_id DESC LIMIT ?",
        [limit],
    )
    names = ("sum_id", "task_id", "line_id", "status", "phase", "reason", "began_ms", "ended_ms")
    sql = "SELECT device_id FROM secure_members WHERE sum_id = ? ORDER BY device_id"
    members = ([row[0] for row in database.rows(sql, [found[0]])] for found in rows)
    return [
        msgspec.convert(dict(zip(names, row, strict=True)) | {"members": who}, SumFacts)
        for row, who in zip(rows, members, strict=True)
    ]

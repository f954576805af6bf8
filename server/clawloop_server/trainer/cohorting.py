"""Which cohorts there are, what is known of who agrees with whom, and moving devices that do not into cohorts of their
own. How that is judged is `aggregate.cohorts`; knows no engine and no round but the one that just ended.

A split leaves the largest group where it was: those whose adapter it is, and devices of which nothing is known yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.cohorts import Evidence, find, update, without
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.vault.database import ServerDatabase

_log = logging.getLogger("clawloop.trainer")

_JOINED = "line_id = ? AND state = 'joined'"


class Cohorting:
    """The cohorts of one line."""

    def __init__(self, database: ServerDatabase, *, line_id: str, settings: FederateSettings) -> None:
        self._database, self._line_id, self._settings = database, line_id, settings

    def names(self) -> list[str]:
        """The cohorts that devices are in; the empty name, of all others, among them and first."""
        sql = f"SELECT DISTINCT cohort FROM devices WHERE {_JOINED}"  # noqa: S608 constant text
        return sorted({"", *(row[0] for row in self._database.rows(sql, [self._line_id]))})

    def could_split(self, cohort: str) -> bool:
        """Whether a cohort has devices enough for two, so that it is worth asking whether they agree."""
        if self._settings.cohorts == "off":
            return False
        sql = f"SELECT count(*) FROM devices WHERE {_JOINED} AND cohort = ?"  # noqa: S608 constant text
        return self._database.count(sql, [self._line_id, cohort]) >= 2 * max(2, self._settings.min_devices)

    def heard(self, cohort: str, *conflicts: dict[str, dict[str, float]], version: int = 0) -> list[dict[str, Any]]:
        """Take in what a round found of who agrees with whom; the new cohorts that come of it, each with its name, its
        devices, the reason, and the version `since` which they disagree; empty if none do. Part of the transaction that
        records the round.

        `conflicts`: the cosines of devices' updates, `[x][y]` with x < y, from deltas and from trajectories; `version`:
        of the adapter that the round began with.
        """
        told = [conflict for conflict in conflicts if conflict]
        if self._settings.cohorts == "off" or not told:
            return []
        evidence = self._of_members(cohort, self._evidence(cohort))
        account = Account(method="", robust="", shares=(), conflict=_together(told))
        evidence = update(evidence, account, settings=self._settings, version=version)
        found = find(evidence, self._settings)
        if len(found) < 2:
            self._keep(cohort, evidence)
            return []
        self._keep(cohort, None)
        split = []
        for group in found[1:]:
            name = self._new_name()
            self._move(sorted(group.devices), name)
            _log.warning("%d devices learn apart from now on, as cohort %s: %s", len(group.devices), name, group.why)
            split.append({"cohort": name, "devices": sorted(group.devices), "why": group.why, "since": group.since})
        return split

    def _evidence(self, cohort: str) -> Evidence:
        row = self._database.row("SELECT value FROM meta WHERE name = ?", [self._key(cohort)])
        return msgspec.json.decode(row[0], type=Evidence) if row else Evidence()

    def _of_members(self, cohort: str, evidence: Evidence) -> Evidence:
        """The evidence without devices that have left the cohort, or the server."""
        known = {x for x in evidence.pairs} | {y for pairs in evidence.pairs.values() for y in pairs}
        sql = f"SELECT 1 FROM devices WHERE {_JOINED} AND cohort = ? AND device_id = ?"  # noqa: S608 constant text
        for device_id in sorted(known):
            if self._database.row(sql, [self._line_id, cohort, device_id]) is None:
                evidence = without(evidence, device_id)
        return evidence

    def _keep(self, cohort: str, evidence: Evidence | None) -> None:
        with self._database.write() as database:
            if evidence is None:
                database.run("DELETE FROM meta WHERE name = ?", [self._key(cohort)])
                return
            text = msgspec.json.encode(evidence).decode()
            database.run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [self._key(cohort), text])

    def _key(self, cohort: str) -> str:
        return f"agreement/{self._line_id}/{cohort}"

    def _new_name(self) -> str:
        """A name that no device and no adapter of this line ever had."""
        sql = "SELECT cohort FROM devices WHERE line_id = ?1 UNION SELECT cohort FROM adapters WHERE line_id = ?1"
        taken = {row[0] for row in self._database.rows(sql, [self._line_id])}
        return next(name for n in range(1, len(taken) + 2) if (name := f"cohort-{n}") not in taken)

    def _move(self, device_ids: Sequence[str], name: str) -> None:
        with self._database.write() as database:
            for device_id in device_ids:
                database.run("UPDATE devices SET cohort = ? WHERE device_id = ?", [name, device_id])


def _together(conflicts: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """One table of several: of a pair that is in more than one, the mean."""
    found: dict[tuple[str, str], list[float]] = {}
    for conflict in conflicts:
        for x, row in conflict.items():
            for y, cosine in row.items():
                found.setdefault((x, y), []).append(cosine)
    joined: dict[str, dict[str, float]] = {}
    for (x, y), cosines in sorted(found.items()):
        joined.setdefault(x, {})[y] = sum(cosines) / len(cosines)
    return joined

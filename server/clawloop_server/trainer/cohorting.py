"""Which cohorts there are, what is known of who agrees with whom, and moving devices that do not into cohorts of their
own. How that is judged is `aggregate.cohorts`; knows no engine and no round but the one that just ended.

A split leaves the largest group where it was: those whose adapter it is, and devices of which nothing is known yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.cohorts import Cohort, Evidence, find, names_of, only, update
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.vault.database import ServerDatabase

_log = logging.getLogger("clawloop.trainer")

_JOINED = "line_id = ? AND state = 'joined'"
GO_BACK = 0.4
"""of the devices that were compared, how many must part for those that stay to go back with them: fewer, who may lie,
take nobody else's adapter away"""


class Heard(NamedTuple):
    """What a round told of who agrees with whom in a cohort: all that is known now, the cohorts that it comes to, the
    devices that were in it, and what was known `before`, as it is kept."""

    cohort: str
    evidence: Evidence
    found: list[Cohort]
    members: frozenset[str]
    before: str


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

    def hear(self, cohort: str, *conflicts: dict[str, dict[str, float]], version: int = 0) -> Heard | None:
        """What comes of what a round found of who agrees with whom; None if it found nothing. Changes nothing, and may
        take a moment: it is no part of a transaction.

        `conflicts`: the cosines of devices' updates, `[x][y]` with x < y, from deltas and from trajectories; `version`:
        of the adapter that the round began with.
        """
        told = [conflict for conflict in conflicts if conflict]
        if self._settings.cohorts == "off" or not told:
            return None
        members, before = self._members(cohort), self._kept(cohort)
        evidence = only(_evidence(before), members)
        account = Account(method="", robust="", shares=(), conflict=_among(_together(told), members))
        evidence = update(evidence, account, settings=self._settings, version=version)
        return Heard(cohort, evidence, find(evidence, self._settings), members, before)

    def part(self, heard: Heard) -> list[dict[str, Any]]:
        """Keep what was heard; the new cohorts that come of it, each with its name, its devices, the reason, the
        version `since` which they disagree, and whether those that stay go `back` to it, too; empty if none do. Part of
        the transaction that records the round.

        Where devices came or went since, nobody parts: the next round says it again.
        """
        same = self._kept(heard.cohort) == heard.before and self._members(heard.cohort) == heard.members
        if len(heard.found) < 2 or not same:
            self._keep(heard.cohort, heard.evidence)
            return []
        self._keep(heard.cohort, None)
        parted, now, split = heard.found[1:], heard.evidence.history[-1].version, []
        back = sum(group.part for group in parted) >= GO_BACK and parted[0].since < now
        for group in parted:
            name, devices = self._new_name(), sorted(group.devices)
            self._move(devices, name)
            _log.warning("%d devices learn apart from now on, as cohort %s: %s", len(devices), name, group.why)
            split.append({"cohort": name, "devices": devices, "why": group.why, "since": group.since, "back": back})
        return split

    def _members(self, cohort: str) -> frozenset[str]:
        sql = f"SELECT device_id FROM devices WHERE {_JOINED} AND cohort = ?"  # noqa: S608 constant text
        return frozenset(row[0] for row in self._database.rows(sql, [self._line_id, cohort]))

    def _kept(self, cohort: str) -> str:
        row = self._database.row("SELECT value FROM meta WHERE name = ?", [self._key(cohort)])
        return str(row[0]) if row else ""

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


def _evidence(kept: str) -> Evidence:
    return msgspec.json.decode(kept, type=Evidence) if kept else Evidence()


def _among(conflict: dict[str, dict[str, float]], members: frozenset[str]) -> dict[str, dict[str, float]]:
    """Without devices that have left the cohort, or the server, while the round ran."""
    if names_of(conflict) <= members:
        return conflict
    return {x: {y: c for y, c in row.items() if y in members} for x, row in conflict.items() if x in members}


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

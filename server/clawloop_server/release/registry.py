"""The registry: every round and what came of it, every adapter and what became of it.

Files of an adapter are published once, in adapters/<version>/, and never changed. The database holds the signed
manifest; `manifest.bin` beside the files is a copy. Knows no tensor, no Flower, and signs nothing itself.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from clawloop_server.errors import ReleaseError
from clawloop_server.release.log import ReleaseLog
from clawloop_server.release.records import (
    Act,
    AdapterFacts,
    AdapterRecord,
    AdapterState,
    Candidate,
    Round,
    RoundState,
    UnderWay,
    adapter_of,
    round_of,
    under_way_of,
)
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared import wire
from clawloop_shared.errors import AdapterInvalid, StorageError
from clawloop_shared.files import publish, sha256, sync_folder
from clawloop_shared.ids import new_id
from clawloop_shared.lora import FILES
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import AdapterOffer

MANIFEST_FILE = "manifest.bin"
_DRAFT = ".draft-"
_FETCHED = 16
"""of the released adapters, how many of the newest are given out file by file"""

_ADAPTER = "SELECT version, line_id, state, facts, manifest, created_ms, released_ms, cohort FROM adapters"
_ROUND = (
    "SELECT round_id, line_id, state, base_version, version, trajectories, steps, metrics, reason, started_ms,"
    " finished_ms, attempts, cohort FROM rounds"
)
_UNDER_WAY = (
    "SELECT round_id, base_version, settings, trajectories, steps, attempts, row_tokens, at_update, deaths,"
    " rejected_steps, cohort FROM rounds"
)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Registry:
    """Rounds and adapters; `folder` holds the adapters' files."""

    def __init__(self, database: ServerDatabase, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self.log = ReleaseLog(database)

    # rounds

    def start_round(
        self,
        line_id: str,
        *,
        base_version: int,
        trajectories: int,
        steps: int,
        round_id: str | None = None,
        settings: str = "",
        row_tokens: int = 0,
        cohort: str = "",
        now_ms: int | None = None,
    ) -> str:
        """Note that a round runs; its id. A round of that id that runs already is started anew, and what was known of
        its attempts is gone. `settings`, `row_tokens`: see `UnderWay`; `cohort`: whose adapter it is to make."""
        round_id = round_id or new_id()
        values = [round_id, line_id, RoundState.RUNNING, base_version, trajectories, steps, now_ms or _now_ms()]
        with self._database.write() as database:
            database.run(
                "INSERT OR REPLACE INTO rounds (round_id, line_id, state, base_version, trajectories, steps,"
                " started_ms, metrics, reason, settings, row_tokens, cohort)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, '{}', '', ?, ?, ?)",
                [*values, settings, row_tokens, cohort],
            )
        return round_id

    def under_way(self, line_id: str) -> UnderWay | None:
        """The round of a line that runs, or was cut off."""
        row = self._database.row(
            f"{_UNDER_WAY} WHERE line_id = ? AND state = ? ORDER BY started_ms DESC LIMIT 1",
            [line_id, RoundState.RUNNING],
        )
        return under_way_of(row) if row else None

    def keep(self, under_way: UnderWay) -> None:
        """Note how far a round that runs has come, and how often it was tried."""
        rejected = under_way.rejected_steps
        values = [
            under_way.attempts,
            under_way.row_tokens,
            under_way.at_update,
            msgspec.json.encode(under_way.deaths).decode(),
            "" if rejected is None else msgspec.json.encode(rejected).decode(),
            under_way.round_id,
        ]
        with self._database.write() as database:
            database.run(
                "UPDATE rounds SET attempts = ?, row_tokens = ?, at_update = ?, deaths = ?, rejected_steps = ?"
                " WHERE round_id = ? AND state = 'running'",
                values,
            )

    def finish_round(
        self,
        round_id: str,
        state: RoundState,
        *,
        metrics: dict[str, Any] | None = None,
        version: int | None = None,
        reason: str = "",
        now_ms: int | None = None,
    ) -> None:
        """Note what came of a round. Call it in one transaction with `Vault.consume` and `record_candidate`.

        Raises:
            ReleaseError: no such round is running.
        """
        values = [state, version, msgspec.json.encode(metrics or {}).decode(), reason, now_ms or _now_ms(), round_id]
        with self._database.write() as database:
            changed = database.run(
                "UPDATE rounds SET state = ?, version = ?, metrics = ?, reason = ?, finished_ms = ?"
                " WHERE round_id = ? AND state = 'running'",
                values,
            )
            if changed != 1:
                raise ReleaseError(f"round {round_id} is not running; `clawloop-server rounds list` shows them")

    def rounds(self, *, limit: int = 50) -> list[Round]:
        """The latest rounds, newest first."""
        return [round_of(row) for row in self._database.rows(f"{_ROUND} ORDER BY started_ms DESC LIMIT ?", [limit])]

    def splits(self) -> list[Round]:
        """The rounds that split a cohort, oldest first."""
        sql = f"{_ROUND} WHERE json_type(metrics, '$.split') = 'array' ORDER BY started_ms"
        return [round_of(row) for row in self._database.rows(sql)]

    def round(self, round_id: str) -> Round:
        """The round of that id.

        Raises:
            ReleaseError: there is none.
        """
        row = self._database.row(f"{_ROUND} WHERE round_id = ?", [round_id])
        if row is None:
            raise ReleaseError(f"no round {round_id}; `clawloop-server rounds list` shows them")
        return round_of(row)

    def round_counts(self) -> dict[str, int]:
        """How many rounds are in each state."""
        return dict(self._database.rows("SELECT state, count(*) FROM rounds GROUP BY 1"))

    def count_with_deltas(self, line_id: str, *, cohort: str = "") -> int:
        """How many rounds of a cohort ended that had taken deltas, whatever came of them."""
        return self._database.count(
            "SELECT count(*) FROM rounds r WHERE line_id = ? AND cohort = ? AND state != ?"
            " AND EXISTS (SELECT 1 FROM deltas d WHERE d.round_id = r.round_id)",
            [line_id, cohort, RoundState.RUNNING],
        )

    # adapters

    def record_candidate(self, candidate: Candidate, *, now_ms: int | None = None) -> int:
        """Publish the files of an adapter that passed the gate; its version. Part of a transaction that is open.

        Raises:
            AdapterInvalid: not exactly the files of an adapter.
            StorageError: they cannot be written.
        """
        if sorted(candidate.files) != sorted(FILES):
            raise AdapterInvalid(f"an adapter has the files {list(FILES)}, not {sorted(candidate.files)}")
        facts, cohort = candidate.facts(), candidate.cohort
        return self._record(facts, lambda target: _publish_files(target, candidate.files), cohort=cohort, now_ms=now_ms)

    def copy_adapter(
        self, version: int, *, copy_of: int = 0, cohort: str | None = None, now_ms: int | None = None
    ) -> int:
        """Record an older adapter again as a new candidate, for the same devices or for a `cohort`; its version.
        Versions only grow. With `copy_of`, training does not go on from it; without, it does: the operator went back.

        Raises:
            ReleaseError: no such version.
            StorageError: its files cannot be read or written.
        """
        old, files = self.adapter(version), self.files(version)
        facts = msgspec.structs.replace(old.facts, copy_of=copy_of)
        cohort = old.cohort if cohort is None else cohort
        return self._record(facts, lambda target: _publish_files(target, files), cohort=cohort, now_ms=now_ms)

    def remove_drafts(self) -> None:
        """Remove what a crash left of adapters that were being published. They are published within a write
        transaction, so that within this one nobody else is at it."""
        with self._database.write():
            for draft in self._folder.glob(f"{_DRAFT}*"):
                shutil.rmtree(draft, ignore_errors=True)

    def _record(self, facts: AdapterFacts, put: Callable[[Path], None], *, cohort: str, now_ms: int | None) -> int:
        with self._database.write() as database:
            version = database.count("SELECT max(version) FROM adapters") + 1
            put(self._folder / str(version))
            packed = msgspec.json.encode(facts)
            database.run(
                "INSERT INTO adapters (version, line_id, state, round_id, facts, created_ms, cohort)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    version,
                    facts.line.line_id,
                    AdapterState.CANDIDATE,
                    facts.round_id,
                    packed,
                    now_ms or _now_ms(),
                    cohort,
                ],
            )
        return version

    def adapters(self, *, line_id: str | None = None) -> list[AdapterRecord]:
        """Every adapter, newest first."""
        rows = self._database.rows(f"{_ADAPTER} WHERE ? IN ('', line_id) ORDER BY version DESC", [line_id or ""])
        return [adapter_of(row) for row in rows]

    def adapter(self, version: int) -> AdapterRecord:
        """The adapter of that version.

        Raises:
            ReleaseError: there is none.
        """
        row = self._database.row(f"{_ADAPTER} WHERE version = ?", [version])
        if row is None:
            raise ReleaseError(f"no adapter {version}; `clawloop-server adapters list` shows them")
        return adapter_of(row)

    def candidates(self) -> list[AdapterRecord]:
        """Adapters that passed the gate and wait for their release, oldest first."""
        rows = self._database.rows(f"{_ADAPTER} WHERE state = ? ORDER BY version", [AdapterState.CANDIDATE])
        return [adapter_of(row) for row in rows]

    def current(self, line_id: str | None = None, *, cohort: str = "") -> AdapterRecord | None:
        """The adapter that devices of a cohort should use now: the newest that is released for it, or, as long as there
        is none, for all."""
        row = self._database.row(
            f"{_ADAPTER} WHERE state = ? AND ? IN ('', line_id) AND cohort IN ('', ?)"
            " ORDER BY cohort = ? DESC, version DESC LIMIT 1",
            [AdapterState.RELEASED, line_id or "", cohort, cohort],
        )
        return adapter_of(row) if row else None

    def cohorts(self, line_id: str) -> list[str]:
        """The cohorts that have an adapter of their own; the empty name is all others."""
        sql = "SELECT DISTINCT cohort FROM adapters WHERE line_id = ? ORDER BY cohort"
        return [row[0] for row in self._database.rows(sql, [line_id])]

    def previous_sha256(self, line_id: str) -> str:
        """The hash of the newest manifest of a line, whatever became of its adapter; empty before the first."""
        row = self._database.row(
            "SELECT manifest FROM adapters WHERE line_id = ? AND manifest IS NOT NULL ORDER BY version DESC LIMIT 1",
            [line_id],
        )
        return wire.decode(row[0], SignedManifest).sha256 if row else ""

    def mark_released(
        self, version: int, sign: Callable[[AdapterRecord, str], SignedManifest], *, now_ms: int | None = None
    ) -> SignedManifest:
        """Make a candidate (or held) adapter the newest released one. `sign` is given the record and the hash of the
        manifest before it, inside the transaction, so that the chain cannot fork, and what it signed is put into the
        log in that transaction too: nothing is released that is not in it.

        Raises:
            ReleaseError: it was released before, or a newer version was.
        """
        with self._database.write() as database:
            record = self.adapter(version)
            if record.state is AdapterState.REJECTED:
                raise ReleaseError(
                    f"adapter {version} was rejected {self.rejections()[version].in_words}; it is never released: take"
                    " another of `clawloop-server adapters list`, or wait for the one that the next round makes"
                )
            if record.state not in (AdapterState.CANDIDATE, AdapterState.HELD):
                raise ReleaseError(f"adapter {version} is {record.state}; only a candidate or held one can be released")
            newer = database.count(
                "SELECT max(version) FROM adapters WHERE line_id = ? AND manifest IS NOT NULL AND cohort IN ('', ?)",
                [record.line_id, record.cohort],
            )
            if newer > version:
                raise ReleaseError(f"adapter {version} is older than {newer}, which was released; versions only grow")
            signed = sign(record, self.previous_sha256(record.line_id))
            database.run(
                "UPDATE adapters SET state = ?, manifest = ?, released_ms = ? WHERE version = ?",
                [AdapterState.RELEASED, wire.encode(signed), now_ms or _now_ms(), version],
            )
            self.log.append(record.line_id, version, signed.sha256, now_ms=now_ms or _now_ms())
        publish(self._folder / str(version) / MANIFEST_FILE, wire.encode(signed))
        return signed

    def hold(self, version: int) -> None:
        """Keep a candidate back.

        Raises:
            ReleaseError: it is not a candidate.
        """
        self._move(version, AdapterState.CANDIDATE, to=AdapterState.HELD)

    def mark_rolled_back(self, version: int) -> None:
        """Note that a released adapter was taken back.

        Raises:
            ReleaseError: it is not released.
        """
        self._move(version, AdapterState.RELEASED, to=AdapterState.ROLLED_BACK)

    def mark_rejected(self, version: int, *, who: str, why: str, now_ms: int | None = None) -> None:
        """Rule that a candidate (or held) adapter is never released, and note who did so and why.

        Raises:
            ReleaseError: it is neither.
        """
        with self._database.write() as database:
            held = self.adapter(version).state is AdapterState.HELD
            self._move(version, AdapterState.HELD if held else AdapterState.CANDIDATE, to=AdapterState.REJECTED)
            database.run(
                "INSERT INTO adapter_acts (version, act, who, why, at_ms) VALUES (?, ?, ?, ?, ?)",
                [version, AdapterState.REJECTED, who, why, now_ms or _now_ms()],
            )

    def rejections(self) -> dict[int, Act]:
        """Who rejected which version, when and why."""
        sql = "SELECT version, act, who, why, at_ms FROM adapter_acts WHERE act = ? ORDER BY act_id"
        rows = self._database.rows(sql, [AdapterState.REJECTED])
        return {row[0]: Act(**dict(zip(Act.__struct_fields__, row, strict=True))) for row in rows}

    def _move(self, version: int, state: AdapterState, *, to: AdapterState) -> None:
        with self._database.write() as database:
            found = self.adapter(version)
            if found.state is not state:
                raise ReleaseError(f"adapter {version} is {found.state}, not {state}, and cannot become {to}")
            database.run("UPDATE adapters SET state = ? WHERE version = ?", [to, version])

    def within(self) -> AbstractContextManager[ServerDatabase]:
        """A transaction in which several of these calls are one."""
        return self._database.write()

    # what devices get

    def files(self, version: int) -> dict[str, bytes]:
        """The files of an adapter, as they were published.

        Raises:
            StorageError: one is missing or was changed.
        """
        record, folder = self.adapter(version), self._folder / str(version)
        found: dict[str, bytes] = {}
        for entry in record.facts.files:
            try:
                found[entry.name] = (folder / entry.name).read_bytes()
            except OSError as error:
                raise StorageError(f"cannot read {folder / entry.name}: {error.strerror}; restore it") from error
            if sha256(found[entry.name]) != entry.sha256:
                raise StorageError(f"{folder / entry.name} was changed after it was published; restore it")
        return found

    def file_of(self, sha256: str) -> Path | None:
        """The file with that hash of an adapter that was released, if there is one."""
        rows = self._database.rows(f"{_ADAPTER} WHERE manifest IS NOT NULL ORDER BY version DESC LIMIT ?", [_FETCHED])
        for record in map(adapter_of, rows):
            for entry in record.facts.files:
                if entry.sha256 == sha256:
                    return self._folder / str(record.version) / entry.name
        return None

    def offer(self, version: int) -> AdapterOffer:
        """What is sent to a device: the manifest and the files.

        Raises:
            ReleaseError: it was never released.
            StorageError: a file is missing or was changed.
        """
        record = self.adapter(version)
        if record.manifest is None:
            rejected = record.state is AdapterState.REJECTED
            raise ReleaseError(
                f"adapter {version} is {record.state}{', and never released' if rejected else '; release it first'}"
            )
        return AdapterOffer(manifest=record.manifest, files=self.files(version))


def _publish_files(target: Path, files: dict[str, bytes]) -> None:
    """Write the folder whole. One that a crash left behind, unknown to the database, is replaced.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    draft: Path | None = None
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=target.parent))
        for name, data in files.items():
            publish(draft / name, data)
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        why = error.strerror or error
        raise StorageError(f"cannot write {target}: {why}; make room there, or mend its owner and mode") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)

"""The deltas that devices sent: kept sealed while they wait, given to a round, and what came of each.

The weights are kept as long as a delta waits; once a round took it, or it is not wanted any more, its row alone is
left, so that the round is explained. Of each device the newest waits, and no other. Knows no tensor. Format:
docs/formats/vault.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_shared import wire
from clawloop_shared.deltas import MAX_DELTA_BYTES, LoraDelta
from clawloop_shared.errors import StorageError

_PART_BYTES = 64 << 20
"""what is sealed at once: sealed bytes are opened whole, and at most 256 MiB"""
_PARTS = msgspec.msgpack.Decoder(list[bytes])
_NEWER = "its device sent a newer one"


class DeltaState(StrEnum):
    """What became of a delta."""

    WAITING = "waiting"
    """for a round"""
    REPLACED = "replaced"
    """its device sent a newer one before a round took it"""
    STALE = "stale"
    """too many adapters were made since the one that it was learned beside"""
    REFUSED = "refused"
    """it is broken, or was part of a round that was refused"""
    LEFT_OUT = "left out"
    """a round looked at it and made its adapter without"""
    JOINED = "joined"
    """it is in the adapter of a round"""
    SHREDDED = "shredded"
    """joined, and forgotten or its device deleted since; only the row is left"""


_SETTLE = "UPDATE deltas SET state = ?, reason = ?, round_id = ?, sealed = NULL"
_USABLE = f"('{DeltaState.WAITING}', '{DeltaState.REPLACED}')"


class DeltaFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A delta without its weights. `size_bytes` is what it came as; `reason` says in words why it is not waiting."""

    delta_id: str
    device_id: str
    line_id: str
    base_version: int
    method: str
    level: str
    rank: int
    trajectories: int
    size_bytes: int
    state: DeltaState
    reason: str
    round_id: str | None
    received_ms: int


_OF_COHORT = (
    "device_id IN (SELECT device_id FROM devices WHERE cohort = ?3) OR device_id IN"
    " (SELECT sum_id FROM secure_members JOIN devices USING (device_id) WHERE cohort = ?3)"
)
_COLUMNS = ", ".join(DeltaFacts.__struct_fields__)
_SELECT = f"SELECT {_COLUMNS} FROM deltas"  # noqa: S608 constant names


def _facts(row: tuple[Any, ...]) -> DeltaFacts:
    return msgspec.convert(dict(zip(DeltaFacts.__struct_fields__, row, strict=True)), DeltaFacts)


class Deltas:
    """The table of deltas."""

    def __init__(self, database: ServerDatabase, seals: DeviceSeals) -> None:
        self._database, self._seals = database, seals

    def waiting(self, line_id: str, *, cohort: str | None = None) -> list[DeltaFacts]:
        """The deltas of a line (and of a cohort's devices) that a round can take, the longest waiting first; at most
        one of each device."""
        where = f" WHERE line_id = ?1 AND state = ?2 AND (?3 IS NULL OR {_OF_COHORT})"
        sql = _SELECT + where + " ORDER BY received_ms, delta_id"
        return [_facts(row) for row in self._database.rows(sql, [line_id, DeltaState.WAITING, cohort])]

    def waiting_of(self, device_id: str) -> DeltaFacts | None:
        """The delta of a device that waits."""
        row = self._database.row(f"{_SELECT} WHERE device_id = ? AND state = ?", [device_id, DeltaState.WAITING])
        return _facts(row) if row else None

    def read(self, delta_id: str) -> LoraDelta | None:
        """The delta whole; None if it does not wait any more.

        Raises:
            StorageError: it does not open with the keys that are here.
            WireError: what was sealed is no delta.
        """
        sql = "SELECT device_id, sealed FROM deltas WHERE delta_id = ? AND sealed IS NOT NULL"
        try:
            with self._database.snapshot() as database:
                row = database.row(sql, [delta_id])
                if row is None:
                    return None
                seal = self._seals.open(row[0])
        except StorageError:
            # The snapshot may be of before its device was deleted, whose key is gone since.
            if self._database.row(sql, [delta_id]) is None:
                return None
            raise
        return wire.decode(_opened(seal, delta_id, sealed=row[1]), LoraDelta, max_bytes=MAX_DELTA_BYTES)

    def lost(self, delta_ids: Iterable[str]) -> set[str]:
        """Those of these that may not be in an adapter any more: they were forgotten, or used before. One that was
        replaced may be."""
        sql = f"SELECT 1 FROM deltas WHERE delta_id = ? AND state IN {_USABLE}"  # noqa: S608 constant text
        return {delta_id for delta_id in delta_ids if self._database.row(sql, [delta_id]) is None}

    def use(self, round_id: str, left_out: Mapping[str, str]) -> None:
        """Note that a round made an adapter of these: those without a reason are in it, the others were left out for
        theirs. Part of the transaction that is open."""
        for delta_id, reason in left_out.items():
            state = DeltaState.LEFT_OUT if reason else DeltaState.JOINED
            self._settle(delta_id, state, reason=reason, round_id=round_id)

    def refuse(self, delta_id: str, reason: str, *, round_id: str | None = None) -> None:
        """Note that a delta is not used, for this reason; `round_id`: the round that it was part of."""
        self._settle(delta_id, DeltaState.REFUSED, reason=reason, round_id=round_id)

    def outdate(self, delta_id: str, reason: str) -> None:
        """Note that a delta is too old, for this reason."""
        self._settle(delta_id, DeltaState.STALE, reason=reason, round_id=None)

    def _settle(self, delta_id: str, state: DeltaState, *, reason: str, round_id: str | None) -> None:
        with self._database.write() as database:
            database.run(
                f"{_SETTLE} WHERE delta_id = ? AND state IN {_USABLE}",
                [state, reason[:500], round_id, delta_id],
            )

    def of_round(self, round_id: str) -> list[DeltaFacts]:
        """The deltas that a round looked at, in the order in which they came."""
        sql = f"{_SELECT} WHERE round_id = ? ORDER BY received_ms, delta_id"
        return [_facts(row) for row in self._database.rows(sql, [round_id])]

    def of_device(self, device_id: str) -> list[DeltaFacts]:
        """The deltas of a device, the newest first."""
        sql = f"{_SELECT} WHERE device_id = ? ORDER BY received_ms DESC, delta_id"
        return [_facts(row) for row in self._database.rows(sql, [device_id])]

    def counts(self, line_id: str) -> dict[str, int]:
        """How many deltas of a line are in each state."""
        sql = "SELECT state, count(*) FROM deltas WHERE line_id = ? GROUP BY 1 ORDER BY 1"
        return dict(self._database.rows(sql, [line_id]))


def keep_delta(
    database: ServerDatabase,
    seal: DeviceSeal,
    delta: LoraDelta,
    *,
    item_key: bytes,
    body: bytes,
    now_ms: int | None = None,
) -> str:
    """Keep a delta that came as `body`, in the place of what waits of its device; its id. Part of the transaction that
    is open."""
    delta_id = item_key.hex()
    database.run(
        "UPDATE deltas SET state = ?, reason = ?, sealed = NULL WHERE device_id = ? AND line_id = ? AND state = ?",
        [DeltaState.REPLACED, _NEWER, seal.device_id, delta.line_id, DeltaState.WAITING],
    )
    facts = DeltaFacts(
        delta_id=delta_id,
        device_id=seal.device_id,
        line_id=delta.line_id,
        base_version=delta.base_version,
        method=delta.method,
        level=delta.level,
        rank=delta.rank,
        trajectories=delta.trajectories,
        size_bytes=len(body),
        state=DeltaState.WAITING,
        reason="",
        round_id=None,
        received_ms=now_ms or time.time_ns() // 1_000_000,
    )
    fields = [*msgspec.structs.astuple(facts), item_key, _sealed(seal, delta_id, body=body)]
    marks = ", ".join("?" * len(fields))
    database.run(f"INSERT INTO deltas ({_COLUMNS}, item_key, sealed) VALUES ({marks})", fields)  # noqa: S608 constant names
    return delta_id


def _place(delta_id: str, part: int) -> bytes:
    return f"{delta_id}.{part}".encode()


def _sealed(seal: DeviceSeal, delta_id: str, *, body: bytes) -> bytes:
    cuts = range(0, len(body), _PART_BYTES)
    parts = [seal.seal("deltas", _place(delta_id, n), plain=body[at : at + _PART_BYTES]) for n, at in enumerate(cuts)]
    return msgspec.msgpack.encode(parts)


def _opened(seal: DeviceSeal, delta_id: str, *, sealed: bytes) -> bytes:
    parts = enumerate(_PARTS.decode(sealed))
    return b"".join(seal.unseal("deltas", _place(delta_id, n), sealed=part) for n, part in parts)

"""Whether what a device sent as a delta is one that a round may look at. Reads the registry's table; writes nothing.

A delta is read whole, and every number of it looked at, before it is kept: what is not finite never reaches the
trainer. Whether it is any good is for those who join it to say (`aggregate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.intake import Reason, Refused
from clawloop_shared import wire
from clawloop_shared.deltas import MAX_DELTA_BYTES, LoraDelta, Method, delta_tensors
from clawloop_shared.errors import AdapterInvalid, WireError
from clawloop_shared.levels import Level
from clawloop_shared.lora import WEIGHTS_FILE, ModelShape
from clawloop_shared.manifest import FileEntry
from clawloop_shared.messages import UploadItem
from clawloop_shared.safetensors_header import TensorInfo

PER_HOUR = 60
"""deltas of one device that are read within an hour, whatever came of them"""
HOUR_MS = 3_600_000
DELTA_REASONS = (
    Reason.TOO_LARGE,
    Reason.UNREADABLE,
    Reason.OTHER_LINE,
    Reason.BAD_DELTA,
    Reason.NOT_FINITE,
    Reason.OTHER_BASE,
    Reason.LARGE_RANK,
    Reason.OTHER_LEVEL,
)
MAX_BODY_BYTES = min(MAX_DELTA_BYTES, 900 << 20)
"""a row of SQLite holds less than 10^9 bytes"""
_KEPT_BYTES = 4096
"""of a delta that cannot be read; of one that can, all but the weights"""
_LOOK_NUMBERS = 1 << 20
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""a float whose exponent is all ones is infinite or no number (IEEE 754)"""


class _Adapter(msgspec.Struct, frozen=True):
    """What of an adapter's facts a delta is held against."""

    files: list[FileEntry]
    rank: int
    alpha: float
    target_modules: list[str]


def sort_delta(
    item: UploadItem,
    *,
    device_id: str,
    database: ServerDatabase,
    shapes: Mapping[str, ModelShape],
    settings: FederateSettings,
    now_ms: int,
) -> LoraDelta | Refused:
    """The delta in an item, or why it is set aside. `shapes`: the model of each line that is trained."""
    if _count_lately(database, device_id, now_ms=now_ms) >= PER_HOUR:
        return _refused(item, Reason.MANY_DELTAS, f"{PER_HOUR} deltas of this device came within the hour", record=b"")
    if len(item.body) > MAX_BODY_BYTES:
        detail = f"{len(item.body)} bytes, the limit is {MAX_BODY_BYTES}"
        return _refused(item, Reason.TOO_LARGE, detail, record=item.body[:_KEPT_BYTES])
    try:
        delta = wire.decode(item.body, LoraDelta, max_bytes=MAX_DELTA_BYTES)
    except (WireError, RecursionError) as error:
        return _refused(item, Reason.UNREADABLE, str(error), record=item.body[:_KEPT_BYTES])
    found = (
        _of_line(delta, shapes)
        or _of_level(delta, database, device_id)
        or _of_method(delta, settings)
        or _of_base(delta, database)
        or _of_numbers(delta, shapes[delta.line_id])
    )
    if found is None:
        return delta
    return _refused(item, *found, record=msgspec.msgpack.encode(msgspec.structs.replace(delta, weights=b"")))


def _count_lately(database: ServerDatabase, device_id: str, *, now_ms: int) -> int:
    """How many of the device's deltas came within the last hour, those that were set aside among them."""
    since = [device_id, now_ms - HOUR_MS]
    kept = database.count("SELECT count(*) FROM deltas WHERE device_id = ? AND received_ms > ?", since)
    marks = ", ".join("?" * len(DELTA_REASONS))
    aside = f"SELECT count(*) FROM set_aside WHERE device_id = ? AND received_ms > ? AND reason IN ({marks})"  # noqa: S608 marks alone
    return kept + database.count(aside, [*since, *DELTA_REASONS])


def _refused(item: UploadItem, reason: Reason, detail: str, *, record: bytes) -> Refused:
    return Refused(reason, detail[:500], record, "item", item.item_id)


_Found = tuple[Reason, str] | None


def _of_line(delta: LoraDelta, shapes: Mapping[str, ModelShape]) -> _Found:
    if delta.line_id in shapes:
        return None
    return Reason.OTHER_LINE, f"line {delta.line_id[:32]}, served: {', '.join(shapes) or 'none'}"


def _of_level(delta: LoraDelta, database: ServerDatabase, device_id: str) -> _Found:
    """A device may always be more private than its level, never less; private means noise."""
    (told,) = database.row("SELECT level FROM devices WHERE device_id = ?", [device_id]) or ("",)
    if told in set(Level) and delta.level.rank > Level(told).rank:
        return Reason.OTHER_LEVEL, f"it was made at level {delta.level}, and its device says {told}"
    if delta.level.rank < Level.PRIVATE_DELTAS.rank:
        return Reason.BAD_DELTA, f"at level {delta.level} nothing that was learned leaves a device"
    if delta.level is not Level.PRIVATE_DELTAS:
        return None
    if not (delta.clip > 0 and delta.sigma > 0):
        return Reason.BAD_DELTA, f"a private delta has noise, this one clip {delta.clip:g}, sigma {delta.sigma:g}"
    if not delta.method.is_linear:
        return Reason.BAD_DELTA, f"a noised delta of method {delta.method}: noise on both factors is not noise on B A"
    return None


def _of_method(delta: LoraDelta, settings: FederateSettings) -> _Found:
    free = delta.method in (Method.LORA, Method.FFA) or not delta.base_version
    if free and delta.rank > settings.rank:
        return Reason.LARGE_RANK, f"rank {delta.rank}, [federate] rank is {settings.rank}"
    if delta.method is Method.ROLORA_A and not delta.base_version:
        return Reason.BAD_DELTA, "rolora-a without an adapter: its B is 0, so that A does nothing"
    return None


def _of_base(delta: LoraDelta, database: ServerDatabase) -> _Found:
    """The adapter that it was learned beside is one of ours, with those very weights."""
    version = delta.base_version
    if not version:
        if delta.weights_sha256:
            return Reason.OTHER_BASE, f"weights {delta.weights_sha256[:12]} at version 0, which has none"
        return None
    row = database.row(
        "SELECT facts FROM adapters WHERE version = ? AND line_id = ? AND manifest IS NOT NULL",
        [version, delta.line_id],
    )
    if row is None:
        return Reason.OTHER_BASE, f"adapter {version} was never released here"
    adapter = msgspec.json.decode(row[0], type=_Adapter)
    hashes = {entry.name: entry.sha256 for entry in adapter.files}
    if hashes.get(WEIGHTS_FILE) != delta.weights_sha256:
        return Reason.OTHER_BASE, f"weights {delta.weights_sha256[:12]} are not those of adapter {version}"
    if delta.method in (Method.LORA, Method.FFA):
        return None
    if (delta.rank, set(delta.target_modules)) != (adapter.rank, set(adapter.target_modules)):
        return Reason.BAD_DELTA, f"{delta.method} of rank {delta.rank} does not fit adapter {version} ({adapter.rank})"
    if not math.isclose(delta.alpha, adapter.alpha, rel_tol=1e-9):  # a device reckons it from the task's
        return Reason.BAD_DELTA, f"{delta.method} with alpha {delta.alpha:g} beside one with {adapter.alpha:g}"
    return None


def _of_numbers(delta: LoraDelta, shape: ModelShape) -> _Found:
    try:
        tensors = delta_tensors(delta, shape)
    except AdapterInvalid as error:
        return Reason.BAD_DELTA, str(error)
    broken = next((name for name, tensor in tensors.items() if not is_finite(delta.weights, tensor)), None)
    return (Reason.NOT_FINITE, f"{broken} has a number that is infinite, or none") if broken else None


def is_finite(weights: bytes, tensor: TensorInfo) -> bool:
    """Whether every number of a float tensor (F32, F16 or BF16) in these bytes is finite."""
    kind, exponent = _EXPONENTS[tensor.dtype]
    whole = np.frombuffer(
        weights, kind, offset=tensor.start, count=(tensor.end - tensor.start) // np.dtype(kind).itemsize
    )
    parts = (whole[at : at + _LOOK_NUMBERS] for at in range(0, len(whole), _LOOK_NUMBERS))
    return not any(bool(np.any((part & exponent) == exponent)) for part in parts)

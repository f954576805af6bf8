"""Which of the kept steps and signals may go into one outbox item at level `full`. Reads one snapshot; writes nothing.

Left out: untrainable steps and steps that break their record's rules (the server could not use them), signals that
judge no step that may leave, and everything kept before the level was raised.
"""

import logging
from collections.abc import Iterator

import msgspec

from clawloop_edge.pool.keeper import TARGET_COLUMNS
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Change
from clawloop_edge.privacy.consent import Receipt
from clawloop_shared import wire
from clawloop_shared.errors import RecordError, WireError
from clawloop_shared.records import Signal, Step, StepBatch, check_step

log = logging.getLogger(__name__)

MAX_RECORDS = 256
MAX_RAW_BYTES = 1_000_000
"""of an item before compression: under the wire format's floor (1 MiB), so that its bound on ratios never refuses it"""
_PAGE = 32


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """One item to be, and what it was built on. No body: nothing up to `upto` may leave."""

    receipt_id: str
    cursor: int
    upto: int
    body: bytes | None
    step_ids: list[str]
    signal_ids: list[str]


def draft_batch(reading: Reading, receipt: Receipt, *, cursor: int) -> Draft | None:
    """The next item after `cursor`; None if nothing was kept since."""
    steps: list[Step] = []
    signals: list[Signal] = []
    size, upto = 0, cursor
    for change in _changes(reading, max(cursor, receipt.after_seq)):
        record = change.step or change.signal
        grown = size + len(msgspec.msgpack.encode(record)) if _may_leave(reading, change, receipt=receipt) else size
        if (steps or signals) and (grown > MAX_RAW_BYTES or len(steps) + len(signals) == MAX_RECORDS):
            break
        if grown > size and change.step:
            steps.append(change.step)
        elif grown > size and change.signal:
            signals.append(change.signal)
        size, upto = grown, change.seq
    if upto == cursor:
        return None
    body = _encode(StepBatch(steps=steps, signals=signals), size) if steps or signals else None
    return Draft(
        receipt_id=receipt.receipt_id,
        cursor=cursor,
        upto=upto,
        body=body,
        step_ids=[step.step_id for step in steps],
        signal_ids=[signal.signal_id for signal in signals],
    )


def _changes(reading: Reading, after_seq: int) -> Iterator[Change]:
    while page := reading.changes(after_seq, _PAGE):
        yield from page
        after_seq = page[-1].seq


def _may_leave(reading: Reading, change: Change, *, receipt: Receipt) -> bool:
    if change.signal:
        column = TARGET_COLUMNS[change.signal.target]
        query = f"SELECT 1 FROM steps WHERE {column} = ? AND trainable AND seq > ? LIMIT 1"  # noqa: S608
        parameters = (change.signal.target_id, receipt.after_seq)
        return reading.database.conn.execute(query, parameters).fetchone() is not None
    if change.step is None or not change.step.trainable:
        return False
    try:
        check_step(change.step)
    except RecordError as error:
        log.warning("not put into the outbox: %s", error)
        return False
    return True


def _encode(batch: StepBatch, raw_bytes: int) -> bytes | None:
    """The item's bytes; None for a single record so large and so repetitive that no server would unpack it."""
    body = wire.encode(batch)
    if raw_bytes > MAX_RAW_BYTES:
        try:
            wire.decode(body, StepBatch)
        except WireError as error:
            log.warning("step %s is not put into the outbox: %s", batch.steps[0].step_id, error)
            return None
    return body

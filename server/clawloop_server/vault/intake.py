"""Telling apart, in what a device sent, the records to keep and those to set aside. Pure: no clock, no database.

What is set aside is kept with its reason and acknowledged like the rest, so that it is not sent for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import msgspec

from clawloop_shared import wire
from clawloop_shared.errors import LogprobError, RecordError, WireError
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Mark, Signal, Step, StepBatch, check_signal, check_step

MAX_ITEM_BYTES = 8 << 20
MAX_ASIDE_BYTES = 4096
"""of what is set aside because it is too large, or other than what was sent before"""
MAX_ITEM_RECORDS = 4096
"""a device puts 256 into one; an item of half a million tiny ones would hold up everybody for minutes"""
MAX_NAME_CHARS = 256
MAX_TARGET_SIGNALS = 256
"""of one step, run, session or trajectory; a reward reads them all"""
MAX_GROUP = 4096
"""trajectories of one group, and the largest size that may be told of one"""
MAX_TRAJECTORY_STEPS = 4096
MAX_TRAJECTORY_TOKENS = 16 << 20
"""of all its steps, each counted whole; a round reads a trajectory as one, some 40 bytes a token"""
MAX_COMMENT_CHARS = 16_384
"""four times what a device takes: redaction may lengthen it"""
MAX_EVIDENCE_CHARS = 1024

Record = Step | Signal | Mark


class Reason(StrEnum):
    """Why a record was set aside. Of deltas: `delta_intake`."""

    TOO_LARGE = "too large"
    """the item is over the limit"""
    UNREADABLE = "unreadable"
    """the item is no batch of steps, signals and marks"""
    BAD_STEP = "bad step"
    """a step breaks the rules of its record"""
    BAD_LOGPROB = "bad logprob"
    """a step lacks a logprob of what was sampled, or has a number there that is none"""
    BAD_SIGNAL = "bad signal"
    """a signal breaks the rules of its record"""
    BAD_MARK = "bad mark"
    """a mark breaks the rules of its record"""
    OTHER_LINE = "other model line"
    """sampled by a model that this server does not train"""
    NO_SUCH_TOKEN = "token outside the vocabulary"
    """a token id that the model does not have"""
    NOTHING_LEFT = "nothing left to learn"
    """redaction took every logprob of a step's response"""
    UNTRAINABLE = "untrainable"
    """the device itself says that it must not be learned from"""
    TOO_MANY = "too many signals"
    """its target was judged by so many before that one more tells nothing"""
    LARGE_GROUP = "group too large"
    """its group has so many trajectories that one more is not taken"""
    LONG_TRAJECTORY = "trajectory too long"
    """its trajectory has so many steps or tokens that this one is not taken"""
    BAD_DELTA = "bad delta"
    """a delta lacks a tensor, has one of another shape, or breaks the rules of its method or level"""
    NOT_FINITE = "delta not finite"
    """a number of a delta is infinite, or none"""
    OTHER_BASE = "delta of another adapter"
    """this server never released the adapter that a delta says it was learned beside"""
    LARGE_RANK = "rank of a delta too large"
    """over `[federate] rank`"""
    OTHER_LEVEL = "delta above its device's level"
    """its device lets out less than that, by its own last word"""
    MANY_DELTAS = "too many deltas"
    """its device sent so many within an hour that one more is not read"""
    CHANGED = "changed"
    """the same id was sent before with other content"""


class Refused(msgspec.Struct, frozen=True):
    """A record (or a whole item) that is set aside: why, in words, and its bytes. `kind` (`step`, `signal`) and `name`
    tell which record it is, or is about; an item that is refused whole has none, unless it is a delta (`item`)."""

    reason: Reason
    detail: str
    record: bytes
    kind: str = ""
    name: str = ""


class Intake(msgspec.Struct, frozen=True):
    """What an item came to."""

    steps: list[Step] = []
    signals: list[Signal] = []
    marks: list[Mark] = []
    refused: list[Refused] = []


def sort_item(
    item: UploadItem,
    vocabularies: Mapping[str, int],
    *,
    forgotten: Callable[[Record], bool] = lambda record: False,
) -> Intake:
    """Decode and check an item. `vocabularies`: each line that is trained with its number of tokens (0: unknown).
    Records that are `forgotten` are neither kept nor set aside."""
    if len(item.body) > MAX_ITEM_BYTES:
        detail = f"{len(item.body)} bytes, the limit is {MAX_ITEM_BYTES}"
        return Intake(refused=[Refused(Reason.TOO_LARGE, detail, item.body[:MAX_ASIDE_BYTES])])
    try:
        batch = wire.decode(item.body, StepBatch)
    except (WireError, RecursionError) as error:
        return Intake(refused=[Refused(Reason.UNREADABLE, str(error), item.body)])
    records = len(batch.steps) + len(batch.signals) + len(batch.marks)
    if records > MAX_ITEM_RECORDS:
        detail = f"{records} records, the limit is {MAX_ITEM_RECORDS}"
        return Intake(refused=[Refused(Reason.TOO_LARGE, detail, item.body[:MAX_ASIDE_BYTES])])
    intake = Intake([], [], [], [])
    for step in (step for step in batch.steps if not forgotten(step)):
        refused = _judge_step(step, vocabularies)
        intake.refused.append(refused) if refused else intake.steps.append(step)
    for signal in (signal for signal in batch.signals if not forgotten(signal)):
        refused = _judge_signal(signal, vocabularies)
        intake.refused.append(refused) if refused else intake.signals.append(signal)
    for mark in (mark for mark in batch.marks if not forgotten(mark)):
        refused = _judge_mark(mark)
        intake.refused.append(refused) if refused else intake.marks.append(mark)
    return intake


def _judge_step(step: Step, vocabularies: Mapping[str, int]) -> Refused | None:
    vocabulary = vocabularies.get(step.policy.line)
    if vocabulary is None:
        detail = f"line {step.policy.line[:32]}, served: {', '.join(vocabularies) or 'none'}"
        return refuse(Reason.OTHER_LINE, detail, record=step)
    if step.redacted and all(logprob is None for logprob in step.response_logprobs):
        return refuse(Reason.NOTHING_LEFT, "redaction left no logprob of its response", record=step)
    try:
        check_step(step)
        _check_names(step.step_id, step.session_id, step.run_id, step.trajectory_id, step.group_id)
        _check_size(step)
    except LogprobError as error:
        return refuse(Reason.BAD_LOGPROB, str(error), record=step)
    except RecordError as error:
        return refuse(Reason.BAD_STEP, str(error), record=step)
    if vocabulary and max(max(step.prompt_ids), max(step.response_ids)) >= vocabulary:
        return refuse(Reason.NO_SUCH_TOKEN, f"the vocabulary has {vocabulary} tokens", record=step)
    if not step.trainable:
        return refuse(Reason.UNTRAINABLE, step.untrainable, record=step)
    return None


def _judge_signal(signal: Signal, vocabularies: Mapping[str, int]) -> Refused | None:
    try:
        check_signal(signal)
        _check_names(signal.signal_id, signal.target_id, signal.source)
        _check_length("comment", signal.comment, limit=MAX_COMMENT_CHARS)
        _check_length("evidence", signal.evidence, limit=MAX_EVIDENCE_CHARS)
        if signal.hint is not None:
            _check_names(signal.hint.step_id)
    except RecordError as error:
        return refuse(Reason.BAD_SIGNAL, str(error), record=signal)
    if signal.hint is not None and vocabularies and all(vocabularies.values()):
        # Its step, which may not be here yet, says of which line it is: the trainer looks again.
        largest = max(vocabularies.values())
        if max(signal.hint.token_ids) >= largest:
            return refuse(Reason.NO_SUCH_TOKEN, f"a token of its hint; the vocabulary has {largest}", record=signal)
    return None


def _judge_mark(mark: Mark) -> Refused | None:
    try:
        _check_names(mark.mark_id)
        _check_names(mark.step_id)
    except RecordError as error:
        return refuse(Reason.BAD_MARK, str(error), record=mark)
    return None


def refuse(reason: Reason, detail: str, *, record: Record) -> Refused:
    """`record`, set aside; a mark under the name of its step, so that it is forgotten with it."""
    kind, name = ("signal", record.signal_id) if isinstance(record, Signal) else ("step", record.step_id)
    return Refused(reason, detail[:500], msgspec.msgpack.encode(record), kind, name)


def _check_names(required: str, *names: str) -> None:
    if not required or max(len(name) for name in (required, *names)) > MAX_NAME_CHARS:
        raise RecordError(f"an id is empty or longer than {MAX_NAME_CHARS} characters")
    if any("\0" in name for name in (required, *names)):  # it stands between names where several make one key
        raise RecordError("an id has a NUL in it")


def _check_length(what: str, text: str, *, limit: int) -> None:
    if len(text) > limit:
        raise RecordError(f"its {what} has {len(text)} characters, the limit is {limit}")


def _check_size(step: Step) -> None:
    if not 0 <= step.group_size <= MAX_GROUP:
        raise RecordError(f"group_size {step.group_size} is not in 0..{MAX_GROUP}")

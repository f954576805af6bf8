"""What an export holds in any format: a head, flat records, and a manifest. Pure. Format: docs/formats/export.md.

A record as fields is what a line of JSON has and what a row of a table has, under the same names; a record becomes the
same line in every format, so that one manifest fits them all.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from clawloop_edge.errors import ExportInvalid
from clawloop_edge.pool.codec import from_json, to_json
from clawloop_edge.pool.records import Json, KeptStep
from clawloop_shared.records import Signal

FORMAT = "clawloop.pool.v1"
TEXTS = ("text", "reply", "messages", "tools")
"""fields that an export of tokens alone does not have"""
_STEP = ("step_id", "session_id", "run_id", "parent_id", "trajectory_id", "group_id", "channel")
_KEPT = ("kind", "app", "started_ms", "first_token_ms", "finished_ms")
_POLICY = {"model_line": "line", "adapter_version": "version", "adapter_sha256": "adapter_sha256"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_END = ("finish_reason", "created_ms", "untrainable", "prompt_ids", "response_ids", "response_logprobs", "redacted")
_SIGNAL = ("signal_id", "target", "target_id", "source", "value", "weight", "created_ms", "comment")
SIGNAL_FIELDS = ("type", *_SIGNAL)
STEP_FIELDS = ("type", *_STEP, *_KEPT, *_POLICY, *_SAMPLING, "trainable", *_END)
_TAG = KeptStep.__struct_config__.tag
Record = KeptStep | Signal


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What is exported: these sessions (all, if none is named), steps begun in a time (ms since 1970; `until_ms` is
    outside of it), with what was said in them or the tokens alone."""

    sessions: list[str] = []
    since_ms: int = 0
    until_ms: int | None = None
    text: bool = True


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a file begins with: what it is and where it is from."""

    format: str
    pool_id: str
    exported_ms: int
    clawloop: str
    chosen: Chosen


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a file ends with: how many records it has, and the SHA-256 (hex) of all their lines in order."""

    steps: int
    signals: int
    sha256: str


class Sink(Protocol):
    """Writes one format."""

    def write(self, fields: Json, line: bytes) -> None: ...

    def finish(self, manifest: Manifest) -> None: ...


class Content(Protocol):
    """Reads one format: gives each record with its line; the manifest is there once all were read."""

    head: Head
    manifest: Manifest | None

    def __iter__(self) -> Iterator[tuple[Record, bytes]]: ...


def fields_of(record: Record, *, text: bool = True) -> Json:
    """A record flat, under the names of docs/formats/export.md; a step with `text` or without."""
    if isinstance(record, Signal):
        return {"type": "signal"} | {name: getattr(record, name) for name in _SIGNAL} | {"target": record.target.value}
    step = record.step
    found: Json = {"type": "step"} | {name: getattr(step, name) for name in _STEP} | {"channel": step.channel.value}
    found |= {name: getattr(record, name) for name in _KEPT}
    found |= {name: getattr(step.policy, own) for name, own in _POLICY.items()}
    found |= {name: getattr(step.sampling, name) for name in _SAMPLING}
    found |= {"trainable": step.trainable} | {name: getattr(step, name) for name in _END}
    return found | {name: getattr(record, name) for name in TEXTS} if text else found


def line_of(fields: Json) -> bytes:
    """A record's line of JSON."""
    return to_json(fields) + b"\n"


def record_of(fields: Json) -> Record:
    """The record that `fields_of` was given.

    Raises:
        ExportInvalid: these are not the fields of a step or signal.
    """
    try:
        return _signal_of(fields) if fields["type"] == "signal" else _kept_of(fields)
    except (LookupError, TypeError, msgspec.ValidationError) as error:
        raise ExportInvalid(f"a record has not the fields of a step or signal ({type(error).__name__})") from error


def fields_in(line: bytes) -> Json:
    """The fields that a line holds.

    Raises:
        ExportInvalid: it is no JSON object.
    """
    try:
        found: Any = from_json(line)
    except (ValueError, RecursionError) as error:
        raise ExportInvalid("a line is not JSON") from error
    if not isinstance(found, dict):
        raise ExportInvalid("a line is no JSON object")
    return found


def _signal_of(fields: Json) -> Signal:
    return msgspec.convert({name: fields[name] for name in _SIGNAL}, Signal)


def _kept_of(fields: Json) -> KeptStep:
    if fields["type"] != "step" or fields["trainable"] != (not fields["untrainable"]):
        raise ExportInvalid("a record is neither step nor signal, or says two things about being trainable")
    step: Json = {name: fields[name] for name in (*_STEP, *_END)}
    step["policy"] = {own: fields[name] for name, own in _POLICY.items()}
    step["sampling"] = {name: fields[name] for name in _SAMPLING}
    said = {name: fields[name] for name in TEXTS} if TEXTS[0] in fields else {"reply": {}, "messages": []}
    kept = {name: fields[name] for name in _KEPT}
    return msgspec.convert({"type": _TAG, "step": step, **kept, **said}, KeptStep)

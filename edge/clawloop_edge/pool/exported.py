"""What an export holds in any format: a head, flat records, and a manifest. Pure. Format: docs/formats/export.md.

A record as fields is what a line of JSON has and what a row of a table has, under the same names; a record becomes the
same line in every format, so that one manifest fits them all.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec

from clawloop_edge.errors import ExportInvalid
from clawloop_edge.pool.codec import from_json, to_json
from clawloop_edge.pool.curation import Curation, Word, flat
from clawloop_edge.pool.picking import Picked
from clawloop_edge.pool.records import Json, KeptStep
from clawloop_shared.records import Signal
from clawloop_shared.signals import RewardRules

FORMAT = "clawloop.pool.v2"
TEXTS = ("text", "reply", "messages", "tools")
"""fields that an export of tokens alone does not have"""
_STEP = ("step_id", "session_id", "run_id", "parent_id", "trajectory_id", "group_id", "group_size", "channel")
_KEPT = ("kind", "app", "started_ms", "first_token_ms", "finished_ms")
_POLICY = {"model_line": "line", "adapter_version": "version", "adapter_sha256": "adapter_sha256"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_END = ("finish_reason", "created_ms", "untrainable", "prompt_ids", "response_ids", "response_logprobs", "redacted")
_SIGNAL = ("signal_id", "target", "target_id", "source", "value", "weight", "created_ms", "comment", "evidence", "hint")
_CURATION = tuple(name for name in Curation.__struct_fields__ if name != "word")
_WORD = Word.__struct_fields__
SIGNAL_FIELDS = ("type", *_SIGNAL)
CURATION_FIELDS = ("type", *_CURATION, *_WORD)
STEP_FIELDS = ("type", *_STEP, *_KEPT, *_POLICY, *_SAMPLING, "trainable", *_END)
_TAG = KeptStep.__struct_config__.tag
Record = KeptStep | Signal | Curation


class Chosen(Picked, frozen=True, kw_only=True):
    """What is exported: the picked steps, with what was said in them or the tokens alone."""

    text: bool = True


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """By what right this is a file: an export is its owner's own command on their own device, at any level. `level` is
    what might have left by itself when it was made, `receipt_id` the consent that said so; empty if there is none."""

    basis: str = "the owner's own command on this device"
    level: str = "off"
    receipt_id: str = ""


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is and where it is from. `reward` are the rules by which rewards were reckoned."""

    format: str
    pool_id: str
    exported_ms: int
    clawloop: str
    chosen: Chosen
    consent: Basis = Basis()
    reward: RewardRules = RewardRules()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a file ends with: how many records it has, of how many sessions, and the SHA-256 (hex) of all their lines in
    order."""

    steps: int
    signals: int
    curations: int
    sessions: int
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
    if isinstance(record, Curation):
        return {"type": "curation"} | flat(record) | {"target": record.target.value}
    if isinstance(record, Signal):
        found: Json = {"type": "signal"} | {name: getattr(record, name) for name in _SIGNAL}
        return found | {"target": record.target.value, "hint": msgspec.to_builtins(record.hint)}
    step = record.step
    found = {"type": "step"} | {name: getattr(step, name) for name in _STEP} | {"channel": step.channel.value}
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
        ExportInvalid: these are not the fields of a step, a signal or a word on them.
    """
    makers: dict[str, Callable[[Json], Record]] = {"signal": _signal_of, "curation": _curation_of}
    try:
        return makers.get(fields["type"], _kept_of)(fields)
    except (LookupError, TypeError, msgspec.ValidationError) as error:
        raise ExportInvalid(f"a record has not the fields of any that there are ({type(error).__name__})") from error


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


def _curation_of(fields: Json) -> Curation:
    word = {name: fields[name] for name in _WORD}
    return msgspec.convert({name: fields[name] for name in _CURATION} | {"word": word}, Curation)


def _kept_of(fields: Json) -> KeptStep:
    if fields["type"] != "step" or fields["trainable"] != (not fields["untrainable"]):
        raise ExportInvalid("a record is neither step nor signal, or says two things about being trainable")
    step: Json = {name: fields[name] for name in (*_STEP, *_END)}
    step["policy"] = {own: fields[name] for name, own in _POLICY.items()}
    step["sampling"] = {name: fields[name] for name in _SAMPLING}
    said = {name: fields[name] for name in TEXTS} if TEXTS[0] in fields else {"reply": {}, "messages": []}
    kept = {name: fields[name] for name in _KEPT}
    return msgspec.convert({"type": _TAG, "step": step, **kept, **said}, KeptStep)

"""What the registry keeps: rounds, candidates, adapters, and the states they can be in. Frozen values."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_shared import wire
from clawloop_shared.files import sha256
from clawloop_shared.manifest import Evaluation, FileEntry, Probe, SignedManifest
from clawloop_shared.model_line import ModelLine


class RoundState(StrEnum):
    """How far a round is."""

    RUNNING = "running"
    """the trainer is at it"""
    PASSED = "passed"
    """its adapter passed the gate"""
    REFUSED = "refused"
    """its adapter did not pass the gate"""
    FAILED = "failed"
    """it came to no adapter"""


class AdapterState(StrEnum):
    """What became of an adapter."""

    CANDIDATE = "candidate"
    """passed the gate, not released yet"""
    HELD = "held"
    """kept back by the operator"""
    RELEASED = "released"
    """signed and offered to devices"""
    ROLLED_BACK = "rolled_back"
    """was released, and a later version took its place because it was bad"""
    REJECTED = "rejected"
    """the operator ruled that it is never released; nothing is learned on from it"""

    @property
    def is_gone(self) -> bool:
        """Whether the operator does not want what it learned: training does not go on from it."""
        return self in (AdapterState.ROLLED_BACK, AdapterState.REJECTED)


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody did with an adapter. `who` is their name on the server's machine, `why` their own words."""

    version: int
    act: str
    who: str
    why: str
    at_ms: int

    @property
    def in_words(self) -> str:
        """By whom, when (local time) and why."""
        at = datetime.fromtimestamp(self.at_ms / 1000).astimezone()
        return f"by {self.who} on {at:%Y-%m-%d %H:%M}{f': {self.why}' if self.why else ''}"


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One update of the server."""

    round_id: str
    line_id: str
    state: RoundState
    base_version: int
    version: int | None
    trajectories: int
    steps: int
    metrics: dict[str, Any]
    reason: str
    started_ms: int
    finished_ms: int | None
    attempts: int
    cohort: str = ""
    """the devices that it is for; empty: all that are in no cohort"""


class UnderWay(msgspec.Struct, frozen=True, kw_only=True):
    """A round that runs, as far as it must be known to go on with it after a crash.

    `settings` is a hash of what its numbers depend on; `attempts` counts how often it was begun or gone on with;
    `at_update` is the update that is being worked on, from 0, as many as there are updates for what comes after the
    last; `deaths` counts by update how often the process ended hard in it; `row_tokens` is the budget of its rows;
    `rejected_steps` is there once it is planned.
    """

    round_id: str
    base_version: int
    settings: str
    trajectories: int
    steps: int
    attempts: int = 0
    row_tokens: int = 0
    at_update: int | None = None
    deaths: dict[int, int] = {}
    rejected_steps: dict[str, int] | None = None
    cohort: str = ""


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest will say of an adapter, besides its place in the chain and its dates."""

    round_id: str
    line: ModelLine
    files: list[FileEntry]
    rank: int
    alpha: float
    target_modules: list[str]
    probe: Probe
    evaluation: Evaluation
    lineage_root: str
    copy_of: int = 0
    """the version that this is a copy of, made for its dates or its place alone: training does not go on from it"""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What a round hands over: the adapter's files and what is known of them."""

    round_id: str
    line: ModelLine
    files: dict[str, bytes]
    rank: int
    alpha: float
    target_modules: list[str]
    probe: Probe
    evaluation: Evaluation
    lineage_root: str
    cohort: str = ""

    def facts(self) -> AdapterFacts:
        """The same with each file's size and hash in the place of its bytes."""
        entries = [FileEntry(name, len(data), sha256(data)) for name, data in sorted(self.files.items())]
        named = set(AdapterFacts.__struct_fields__) & set(self.__struct_fields__) - {"files"}
        fields = {name: getattr(self, name) for name in named}
        return AdapterFacts(files=entries, **fields)


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter of the registry. `manifest` is there once it was released."""

    version: int
    line_id: str
    state: AdapterState
    facts: AdapterFacts
    manifest: SignedManifest | None
    created_ms: int
    released_ms: int | None
    cohort: str = ""
    """the devices that it is for; empty: all that have no adapter of a cohort of their own"""

    @property
    def origin(self) -> int:
        """The version that a round made, or that the operator went back to, of which this is it or a copy."""
        return self.facts.copy_of or self.version


def round_of(row: tuple[Any, ...]) -> Round:
    """A round from its row."""
    fields = dict(zip(Round.__struct_fields__, row, strict=True))
    return msgspec.convert({**fields, "metrics": msgspec.json.decode(fields["metrics"])}, Round)


def under_way_of(row: tuple[Any, ...]) -> UnderWay:
    """A round that runs from its row."""
    fields = dict(zip(UnderWay.__struct_fields__, row, strict=True))
    for name in ("deaths", "rejected_steps"):
        fields[name] = msgspec.json.decode(fields[name]) if fields[name] else None
    return msgspec.convert(fields, UnderWay, strict=False)


def adapter_of(row: tuple[Any, ...]) -> AdapterRecord:
    """An adapter from its row."""
    version, line_id, state, facts, manifest, created_ms, released_ms, cohort = row
    return AdapterRecord(
        version=version,
        line_id=line_id,
        state=AdapterState(state),
        facts=msgspec.json.decode(facts, type=AdapterFacts),
        manifest=wire.decode(manifest, SignedManifest) if manifest else None,
        created_ms=created_ms,
        released_ms=released_ms,
        cohort=cohort,
    )

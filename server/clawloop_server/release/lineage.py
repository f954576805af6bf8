"""What lies between two adapters: the rounds that only one of them came from, and where their manifests differ.

Knows no tensor: how far their numbers are apart is told by `aggregate.difference`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from clawloop_server.errors import ReleaseError
from clawloop_server.release.records import AdapterRecord, Round
from clawloop_server.release.registry import Registry
from clawloop_shared.manifest import Manifest

_SHOWN_APART = frozenset({"files", "probe", "evaluation", "rank", "target_modules"})
"""of the manifest's fields, those that are shown by themselves, or by a hash"""


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """A round, and what it was counted to have learned from."""

    round_id: str
    version: int | None
    base_version: int
    trajectories: int
    steps: int
    deltas: int
    finished_ms: int | None


class Between(msgspec.Struct, frozen=True, kw_only=True):
    """The rounds that `b` came from and `a` did not, those of `a` alone, oldest first, and the newest adapter that both
    came from (0: the model line as it is)."""

    common: int
    b_alone: list[Added]
    a_alone: list[Added]


def between(registry: Registry, a: AdapterRecord, b: AdapterRecord) -> Between:
    """What lies between two adapters of a line.

    Raises:
        ReleaseError: they are of different lines.
    """
    if a.line_id != b.line_id:
        raise ReleaseError(
            f"adapter {a.version} is of line {a.line_id} and {b.version} of {b.line_id}; only those of one are compared"
        )
    of_a, of_b = ancestry(registry, a), ancestry(registry, b)
    common = next((version for round_id, version, _ in of_b if round_id in {name for name, _, _ in of_a}), 0)
    return Between(
        common=common,
        b_alone=_alone(registry, of_b, of_a),
        a_alone=_alone(registry, of_a, of_b),
    )


Ancestor = tuple[str, int, Round | None]
"""a round's id, the version of the adapter that it made (or of the one that was begun with), and what is known of it"""


def ancestry(registry: Registry, record: AdapterRecord) -> list[Ancestor]:
    """The rounds that an adapter came from, the latest first. A copy is of the same round."""
    found: list[Ancestor] = []
    while True:
        round_id = record.facts.round_id
        try:
            made = registry.round(round_id)
        except ReleaseError:  # one that no round made
            return [*found, (round_id, record.version, None)]
        found.append((round_id, record.version, made))
        if not made.base_version:
            return found
        record = registry.adapter(made.base_version)


def _alone(registry: Registry, mine: list[Ancestor], others: list[Ancestor]) -> list[Added]:
    known = {round_id for round_id, _, _ in others}
    return [_added(round_id, made) for round_id, _, made in reversed(mine) if round_id not in known]


def _added(round_id: str, made: Round | None) -> Added:
    deltas = made.metrics.get("deltas") if made else None
    return Added(
        round_id=round_id,
        version=made.version if made else None,
        base_version=made.base_version if made else 0,
        trajectories=made.trajectories if made else 0,
        steps=made.steps if made else 0,
        deltas=sum(not why for why in deltas.values()) if isinstance(deltas, dict) else 0,
        finished_ms=made.finished_ms if made else None,
    )


def manifest_changes(a: AdapterRecord, b: AdapterRecord) -> dict[str, tuple[Any, Any]]:
    """The fields in which both manifests differ, by name, with either value; none where one was never released."""
    if a.manifest is None or b.manifest is None:
        return {}
    old, new = _fields(a.manifest.body), _fields(b.manifest.body)
    return {name: (old.get(name), new.get(name)) for name in sorted(old | new) if old.get(name) != new.get(name)}


def _fields(body: bytes) -> dict[str, Any]:
    """The fields of a manifest that the registry holds, hashes in the place of what is long."""
    fields = msgspec.to_builtins(msgspec.json.decode(body, type=Manifest))
    line, files = fields.pop("line"), fields["files"]
    named = {f"line {name}": value for name, value in line.items()}
    hashes = {f"{entry['name']} sha256": entry["sha256"] for entry in files}
    return named | hashes | {name: value for name, value in fields.items() if name not in _SHOWN_APART}

"""How two adapters differ, in words and tables for a terminal, and as facts. Pure functions of what was found."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_server.cli.common import counted, when
from clawloop_server.cli.explaining import evaluation_in_words
from clawloop_server.release.lineage import Added, Between

if TYPE_CHECKING:
    from clawloop_server.aggregate.difference import Difference
    from clawloop_server.release.records import AdapterRecord

Row = tuple[object, ...]
LAYER_COLUMNS = ("layer", "norm of a", "norm of b", "change", "of a", "cosine")
ROUND_COLUMNS = ("of", "round", "adapter", "trajectories", "steps", "deltas", "finished")
_BAR = 8
_BARS = " ▏▎▍▌▋▊▉█"


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Two adapters and all that lies between them."""

    a: AdapterRecord
    b: AdapterRecord
    between: Between
    overall: Difference
    layers: list[Difference]
    manifest: dict[str, tuple[Any, Any]]


def as_facts(found: Compared) -> dict[str, object]:
    """All of it for programs; a number that there is none of is null."""
    return {
        "a": _side(found.a),
        "b": _side(found.b),
        "lineage": found.between,
        "overall": _numbers(found.overall),
        "layers": [{"layer": layer.layer} | _numbers(layer) for layer in found.layers],
        "manifest": {name: {"a": a, "b": b} for name, (a, b) in found.manifest.items()},
    }


def side_rows(found: Compared) -> list[Row]:
    """What either is: state, round, evaluation, rank, targets, bytes."""
    sides = [_shown(record) for record in (found.a, found.b)]
    return [(name, sides[0][name], sides[1][name]) for name in sides[0]]


def lineage_in_words(found: Compared) -> str:
    """Where both part, and what was learned since."""
    line, a, b = found.between, found.a.version, found.b.version
    common = f"adapter {line.common}" if line.common else "the model line as it is"
    told = [f"{b} has {_sums(line.b_alone)} that {a} has not"]
    if line.a_alone:
        told.append(f"{a} has {_sums(line.a_alone)} that {b} has not")
    if not line.a_alone and not line.b_alone:
        return f"both are of the same rounds, the latest of {common}"
    return f"both go back to {common}; {', and '.join(told)}"


def manifest_rows(found: Compared) -> list[Row]:
    """A row for each field in which the manifests differ."""
    rows: list[Row] = []
    for name, values in found.manifest.items():
        if name.endswith("_ms"):
            rows.append((name.removesuffix("_ms"), *(when(value) for value in values)))
        else:
            rows.append((name if " " in name else name.replace("_", " "), *values))
    return rows


def round_rows(found: Compared) -> list[Row]:
    """A row for each round that only one of both came from."""
    sides = ((found.a.version, found.between.a_alone), (found.b.version, found.between.b_alone))
    return [
        (v, r.round_id, f"{r.base_version} → {r.version or ''}", r.trajectories, r.steps, r.deltas, when(r.finished_ms))
        for v, rounds in sides
        for r in rounds
    ]


def layer_rows(found: Compared) -> list[Row]:
    """All layers together, then each; a bar shows the change beside the largest one."""
    most = max((layer.change for layer in found.layers), default=0.0)
    rows = [_layer_row(found.overall, "all", bar="")]
    for layer in sorted(found.layers, key=_place):
        name = layer.layer.removeprefix("model.layers.")
        rows.append(_layer_row(layer, name, bar=f" {_bar(layer.change / most if most else 0.0)}"))
    return rows


def _place(layer: Difference) -> tuple[tuple[int, str], ...]:
    """Layer 2 comes before layer 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in layer.layer.split("."))


def _layer_row(found: Difference, name: str, *, bar: str) -> Row:
    norms = (f"{value:.4g}" for value in (found.norm_a, found.norm_b))
    relative = "new" if math.isinf(found.relative) else f"{found.relative:.1%}"
    cosine = "" if math.isnan(found.cosine) else f"{found.cosine:+.4f}"
    return (name, *norms, f"{found.change:<9.4g}{bar}".rstrip(), relative, cosine)


def _bar(part: float) -> str:
    eighths = round(part * _BAR * 8)
    return _BARS[8] * (eighths // 8) + (_BARS[eighths % 8] if eighths % 8 else "")


def _numbers(found: Difference) -> dict[str, float | None]:
    named = {
        "norm_a": found.norm_a,
        "norm_b": found.norm_b,
        "change": found.change,
        "relative": found.relative,
        "cosine": found.cosine,
    }
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def _size_bytes(record: AdapterRecord) -> int:
    return sum(entry.size_bytes for entry in record.facts.files)


def _side(record: AdapterRecord) -> dict[str, object]:
    facts = record.facts
    return {
        "version": record.version,
        "state": record.state.value,
        "round_id": facts.round_id,
        "cohort": record.cohort,
        "evaluation": facts.evaluation,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "target_modules": facts.target_modules,
        "size_bytes": _size_bytes(record),
        "released_ms": record.released_ms,
    }


def _shown(record: AdapterRecord) -> dict[str, str]:
    facts = record.facts
    return {
        "state": record.state.value.replace("_", " "),
        "round": facts.round_id,
        "cohort": record.cohort or "all that are in none",
        "made": when(record.created_ms),
        "released": when(record.released_ms),
        "evaluation": evaluation_in_words(facts.evaluation if facts.evaluation.episodes else None),
        "rank, alpha": f"{facts.rank}, {facts.alpha:g}",
        "targets": ", ".join(facts.target_modules),
        "bytes": f"{_size_bytes(record):,}",
    }


def _sums(rounds: list[Added]) -> str:
    if not rounds:
        return "nothing"
    named = {"trajectory": "trajectories", "step": "steps", "delta": "deltas"}
    told = [counted(sum(getattr(r, many) for r in rounds), one) for one, many in named.items()]
    return f"{counted(len(rounds), 'round')} ({', '.join(told)})"

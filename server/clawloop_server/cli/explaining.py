"""What a round did, in words and tables for a terminal: facts, its updates, what was left out, and each reward.

Metrics are shown by whatever names they have, those that are known first; a round that lacks some is shown without.
Pure functions of what the registry, the vault and the trainer's file told. Never content.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_server.cli.common import counted, when
from clawloop_shared.manifest import Evaluation

if TYPE_CHECKING:
    from clawloop_server.release.records import Act, AdapterRecord, Round
    from clawloop_server.vault.deltas import DeltaFacts
    from clawloop_server.vault.store import Lesson

Row = tuple[object, ...]
Update = Mapping[str, Any]

_FIRST = ("reward", "kept", "ess", "entropy", "k3", "mean_log_ratio", "max_log_ratio", "gradient_norm", "loss", "lr")
"""the metrics that say most, in this order"""
_BOOKKEEPING = frozenset({"event", "round_id", "at_ms", "update", "round_update", "round_updates"})
_MASK = "kept_"
_MOST_NAMED = 5
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTHS = (8, 40)
"""of the shortest and the longest course that is drawn"""
_NUMBER_WIDTH = 7
_BORDERS = 18
"""columns of a table of six that are between their contents, and one to spare"""
_Z95 = 1.96
"""of a normal distribution: 95 % of it lies within so many standard errors"""


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a round. `built_on` and `made` are the adapters before and after it, if there are any;
    `updates` have also what was measured of their time, as far as the trainer's file reaches back."""

    round: Round
    built_on: AdapterRecord | None
    made: AdapterRecord | None
    updates: list[Update]
    trajectories: list[Lesson]
    deltas: list[DeltaFacts] = []
    rejection: Act | None = None
    """of the adapter that it made"""

    @property
    def evaluation(self) -> Evaluation | None:
        """What the gate measured; None if it played nothing."""
        told = self.round.metrics.get("evaluation")
        if not isinstance(told, dict):
            return None
        try:
            found = msgspec.convert(told, Evaluation)
        except msgspec.ValidationError:
            return None
        return found if found.episodes else None


def with_times(updates: Sequence[Update], timed: Sequence[Update]) -> list[Update]:
    """The updates that the database keeps of a round, with what the trainer's file has besides; those of the file alone
    while the round runs."""
    if not updates:
        return [_metrics(update) for update in timed]
    besides = {update.get("update"): _metrics(update) for update in timed}
    return [{**besides.get(update.get("update"), {}), **_metrics(update)} for update in updates]


def round_facts(found: Explained) -> dict[str, object]:
    """What the round was, what it was built on, what came of it and why."""
    round_, evaluation = found.round, found.evaluation
    took = f", {(round_.finished_ms - round_.started_ms) / 1000:.1f} s" if round_.finished_ms else ""
    facts: dict[str, object] = {
        "round": round_.round_id,
        "state": round_.state.value,
        "verdict": round_.metrics.get("verdict", "none yet" if round_.finished_ms is None else "none"),
        "why": round_.reason,
        "cohort": round_.cohort or "all devices that are in none",
        "built on": _adapter(found.built_on, otherwise="the model line as it is"),
        "made": _adapter(found.made, otherwise="no adapter"),
        **({"rejected": found.rejection.in_words} if found.rejection else {}),
        "took": learned_from(round_),
        "updates": f"{len(found.updates)}{_attempts(round_)}",
        "started": f"{when(round_.started_ms)}{took}",
    }
    reward = round_.metrics.get("reward")
    if isinstance(reward, int | float):
        facts["mean reward"] = f"{reward:+.3f}"
    if set_aside := _mapping(round_.metrics, "set_aside"):
        named = [f"{name[:12]} ({reason})" for name, reason in list(set_aside.items())[:_MOST_NAMED]]
        more = [f"{len(set_aside) - _MOST_NAMED} more"] if len(set_aside) > _MOST_NAMED else []
        facts["set aside"] = ", ".join([*named, *more])
    if round_.finished_ms is not None:
        facts["evaluation"] = evaluation_in_words(evaluation)
    return facts


def learned_from(round_: Round) -> str:
    """How much a round took, in words."""
    deltas = round_.metrics.get("deltas")
    told = f"{counted(round_.trajectories, 'trajectory')}, {counted(round_.steps, 'step')}"
    if not isinstance(deltas, dict) or not deltas:
        return told
    used = sum(not why for why in deltas.values())
    told = f"{told}, " if round_.trajectories else ""
    return f"{told}{counted(used, 'delta')}{f', {len(deltas) - used} left out' if used < len(deltas) else ''}"


def evaluation_in_words(evaluation: Evaluation | None) -> str:
    """What the gate measured, and how sure it is: the difference with its 95 % interval."""
    if evaluation is None:
        return "not played"
    gain, error = evaluation.reward - evaluation.reward_before, evaluation.standard_error
    sure = f"95 % within {gain - _Z95 * error:+.3f} .. {gain + _Z95 * error:+.3f}" if error else "no spread to judge by"
    scores = f"{evaluation.reward_before:.3f} before, {evaluation.reward:.3f} after: {gain:+.3f}, {sure}"
    return f"{scores}; {counted(evaluation.episodes, 'episode')} of {evaluation.suite}"


def metric_rows(updates: Sequence[Update], *, width: int) -> list[Row]:
    """For each metric: its name, its first and last value, its lowest and highest, and its course over the updates; a
    table of at most `width` columns, if the names allow.

    Masks that let every token pass and what was 0 throughout are left out: `passed_masks` and `zeros` name them.
    """
    names = _names(updates).difference(zeros(updates), (_MASK + mask for mask in passed_masks(updates)))
    room = width - max(map(len, names), default=0) - 4 * _NUMBER_WIDTH - _BORDERS
    spark_width = min(max(room, _SPARK_WIDTHS[0]), _SPARK_WIDTHS[1])
    rows: list[Row] = []
    for name in sorted(names, key=_place):
        values = [_number(update.get(name)) for update in updates]
        known = [value for value in values if value is not None]
        if not known:
            continue
        ends = (known[0], known[-1], min(known), max(known))
        rows.append(
            (
                name.replace("_", " "),
                *(number(value).rjust(_NUMBER_WIDTH) for value in ends),
                sparkline(values, width=spark_width),
            )
        )
    return rows


def passed_masks(updates: Sequence[Update]) -> list[str]:
    """The masks that stopped no token in any update."""
    masks = sorted({name for update in updates for name in update if name.startswith(_MASK)})
    return [n.removeprefix(_MASK) for n in masks if all(update.get(n, 1.0) == 1.0 for update in updates)]


def zeros(updates: Sequence[Update]) -> list[str]:
    """The metrics that were 0 in every update that has them; those that say most are not among them: 0 says a lot."""
    names = sorted(name for name in _names(updates).difference(_FIRST) if not name.startswith(_MASK))
    columns = {name: [_number(update.get(name)) for update in updates] for name in names}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    return [name for name, values in known.items() if values and not any(values)]


def sparkline(values: Sequence[float | None], *, width: int) -> str:
    """The course of some numbers, lowest to highest, a blank where there is none; more than `width` drawn as means."""
    if len(values) > width:
        edges = [len(values) * at // width for at in range(width + 1)]
        values = [_mean(values[a:b]) for a, b in itertools.pairwise(edges)]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, most = min(known), len(_BARS) - 1
    span = (max(known) - low) or 1.0
    return "".join(" " if value is None else _BARS[round((value - low) / span * most)] for value in values)


def number(value: float) -> str:
    """A number in seven characters or so: `12,345`, `0.0421`, `1.2e-07`."""
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def left_out_rows(found: Explained) -> list[Row]:
    """What the round could not use: trajectories and steps by the reason against them, and the names of the first."""
    set_aside, rejected = _mapping(found.round.metrics, "set_aside"), _mapping(found.round.metrics, "rejected_steps")
    named: dict[str, list[str]] = {}
    for trajectory_id, reason in set_aside.items():
        named.setdefault(str(reason), []).append(trajectory_id)
    rows: list[Row] = [
        (counted(len(ids), "trajectory"), reason, " ".join(i[:12] for i in ids)) for reason, ids in named.items()
    ]
    most = Counter({str(reason): int(number) for reason, number in rejected.items()}).most_common()
    return rows + [(counted(number, "step"), reason, "") for reason, number in most]


def lesson_rows(found: Explained) -> tuple[tuple[str, ...], list[Row]]:
    """The columns and rows of the table of trajectories; the group has one where there is any."""
    grouped = any(lesson.group_id for lesson in found.trajectories)
    set_aside = _mapping(found.round.metrics, "set_aside")
    columns = ("trajectory", "device", *(("group",) if grouped else ()), "reward", "weight", "how it came about")
    return columns, [_lesson_row(lesson, set_aside, grouped=grouped) for lesson in found.trajectories]


def _lesson_row(lesson: Lesson, set_aside: Mapping[str, Any], *, grouped: bool) -> Row:
    named = (lesson.trajectory_id[:12], lesson.device_id[-8:], *((lesson.group_id[:12],) if grouped else ()))
    if lesson.account is None or lesson.account.reward is None:
        return (*named, "", "", "forgotten since" if lesson.state == "shredded" else "not kept, or forgotten since")
    reward = lesson.account.reward
    voices = ", ".join(f"{v.source[:32]} {v.value:+.2f} ({v.share:.0%})" for v in lesson.account.voices)
    unused = f"not learned from ({set_aside[lesson.trajectory_id]}): " if lesson.trajectory_id in set_aside else ""
    return (*named, f"{reward.value:+.3f}", f"{reward.weight:.2f}", unused + voices)


def adapter_facts(record: AdapterRecord | None) -> dict[str, object] | None:
    """An adapter, as far as it concerns a round."""
    if record is None:
        return None
    return {"version": record.version, "state": record.state.value, "round_id": record.facts.round_id}


def _attempts(round_: Round) -> str:
    return f", cut off and gone on with {round_.attempts - 1} times" if round_.attempts > 1 else ""


def _adapter(record: AdapterRecord | None, *, otherwise: str) -> str:
    return f"adapter {record.version} ({record.state.value.replace('_', ' ')})" if record else otherwise


def _place(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return _FIRST.index(name), name
    return (_FIRST.index("kept"), name) if name.startswith(_MASK) else (len(_FIRST), name)


def _names(updates: Sequence[Update]) -> set[str]:
    return {name for update in updates for name in update} - _BOOKKEEPING


def _metrics(update: Update) -> dict[str, Any]:
    return {name: value for name, value in update.items() if name not in ("event", "round_id", "at_ms")}


def _mapping(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = metrics.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

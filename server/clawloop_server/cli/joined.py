"""What joining did, in words and tables for a terminal: whose update counted how much, what was cut, who disagrees.

Pure functions of a round's metrics, which hold the account of `aggregate`, and of the deltas' rows. Never content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clawloop_server.vault.deltas import DeltaFacts

Row = tuple[object, ...]
Metrics = Mapping[str, Any]

SHARE_COLUMNS = (
    "device",
    "learned beside",
    "method",
    "weight",
    "behind",
    "norm",
    "cut to",
    "cosine",
    "what became of it",
)
OWN = "own"
"""of the server's own update, as `aggregate` names it"""
MOST_PAIRS = 8


def share_rows(metrics: Metrics, deltas: Sequence[DeltaFacts]) -> list[Row]:
    """One row for each update that was looked at: the server's own first, the heaviest next, those left out last."""
    shares = {str(share.get("source")): share for share in _list(_account(metrics), "shares")}
    fates, rows = _mapping(metrics, "deltas"), {delta.delta_id: delta for delta in deltas}
    names = dict.fromkeys([*shares, *fates, *rows])
    found = [(name, shares.get(name, {}), rows.get(name)) for name in names]
    found.sort(key=lambda one: (one[0] != OWN, -_number(one[1], "weight"), one[0]))
    return [_share_row(name, share, fates, row) for name, share, row in found]


def _share_row(name: str, share: Metrics, fates: Metrics, row: DeltaFacts | None) -> Row:
    device = "the server itself" if name == OWN else str(share.get("device_id") or (row.device_id if row else ""))[-8:]
    numbers = [_shown(share, key) for key in ("norm", "cut_to", "cosine_own")]
    weight = f"{_number(share, 'weight'):.3f}" if share else ""
    learned = (f"adapter {row.base_version}" if row.base_version else "the line") if row else ""
    why = str(share.get("left_out") or fates.get(name) or "")
    alike = share.get("alike") or []
    fate = f"left out: {why}" if why else "in it" if name == OWN else row.state.value if row else "forgotten since"
    if row is not None and row.reason and row.reason != why:
        fate = f"{row.state.value}: {row.reason}"
    copies = f" (it stands for {len(alike)} copies)" if alike else ""
    return (
        device,
        learned,
        row.method if row else "",
        weight,
        int(_number(share, "staleness")),
        *numbers,
        fate + copies,
    )


def account_facts(metrics: Metrics) -> dict[str, object]:
    """How it was joined, and what that cost."""
    account = _account(metrics)
    if not account:
        return {"joined": "nothing"}
    devices = _list(account, "devices")
    facts: dict[str, object] = {
        "method": f"{account.get('method')}, defence {account.get('robust')}",
        "devices": f"{len(devices)} whose data count",
        "norm": _shown(account, "norm"),
        "tail": _with_worst(account, "tail", "of the update was lost by the cut to the rank"),
        "rho": _with_worst(account, "rho", "would have been wrong, had the factors been averaged"),
    }
    cosines = [cosine for _, _, cosine in _pairs(account)]
    if cosines:
        facts["conflict"] = f"cosines of devices {min(cosines):+.2f} to {max(cosines):+.2f}, {len(cosines)} pairs"
    notes = [str(note) for note in _list(account, "notes")]
    return facts | ({"notes": "; ".join(notes)} if notes else {})


def split_lines(metrics: Metrics) -> list[str]:
    """The cohorts that came of a round, and why."""
    splits = _list(metrics, "split")
    return [
        f"{len(_list(split, 'devices'))} devices learn apart from now on, as {split.get('cohort')}: {split.get('why')}"
        for split in splits
    ]


def conflict_rows(metrics: Metrics) -> list[Row]:
    """The pairs of devices that pull apart, by their deltas or by the gradients of what they sent, the worst first."""
    both = [*_pairs(_account(metrics)), *_pairs(metrics)]
    pairs = sorted((cosine, one, other) for one, other, cosine in both if cosine < 0)
    return [(one[-8:], other[-8:], f"{cosine:+.3f}") for cosine, one, other in pairs[:MOST_PAIRS]]


def _with_worst(account: Metrics, name: str, what: str) -> str:
    layer = account.get(f"{name}_worst_layer")
    worst = f"; {_number(account, f'{name}_worst'):.1%} in {layer}" if layer else ""
    return f"{_number(account, name):.1%} {what}{worst}"


def _pairs(account: Metrics) -> list[tuple[str, str, float]]:
    conflict = _mapping(account, "conflict")
    return [(one, other, float(cosine)) for one, row in conflict.items() for other, cosine in dict(row).items()]


def _account(metrics: Metrics) -> Metrics:
    return _mapping(metrics, "joined")


def _mapping(metrics: Metrics, name: str) -> Metrics:
    found = metrics.get(name)
    return found if isinstance(found, dict) else {}


def _list(metrics: Metrics, name: str) -> list[Any]:
    found = metrics.get(name)
    return list(found) if isinstance(found, list | tuple) else []


def _number(metrics: Metrics, name: str) -> float:
    found = metrics.get(name)
    return float(found) if isinstance(found, int | float) else 0.0


def _shown(metrics: Metrics, name: str) -> str:
    found = metrics.get(name)
    return f"{found:.3g}" if isinstance(found, int | float) else ""

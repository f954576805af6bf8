"""What a delta in the outbox is, as a person can look at it: numbers have no words in them, but sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from clawloop_edge.cli.context import console, count, home_of, print_json, shown
from clawloop_shared import wire
from clawloop_shared.deltas import DELTA_KIND, MAX_DELTA_BYTES, LoraDelta
from clawloop_shared.files import sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.items import DeltaFacts, OutboxItem

_BARS = "▁▂▃▄▅▆▇█"


def held_by(delta: DeltaFacts) -> str:
    """An item in a few words."""
    noised = f", noise {delta.sigma:.3g} x {delta.clip:g}" if delta.sigma else ""
    learned = "trajectory" if delta.trajectories == 1 else "trajectories"
    return f"delta of {delta.trajectories} {learned}, {delta.method} of rank {delta.rank}{noised}"


def learned_from(item: OutboxItem) -> str:
    """What stands where other items have their session."""
    return f"(learned from {count(len(item.sessions), 'session')})"


def show_delta(context: typer.Context, pool: Pool, item: OutboxItem, *, body: bytes, fate: str, as_json: bool) -> None:
    """Print a delta: everything in it but the numbers themselves, and how large those are."""
    from safetensors.numpy import load

    if item.kind != DELTA_KIND:
        show_masked(item, size_bytes=len(body), fate=fate, as_json=as_json)
        return
    delta = wire.decode(body, LoraDelta, max_bytes=MAX_DELTA_BYTES)
    factors = load(delta.weights)
    norms = {name: _norm(each) for name, each in factors.items()}
    if as_json:
        tensors = {
            name: {"dtype": str(each.dtype), "shape": each.shape, "norm": norms[name]} for name, each in factors.items()
        }
        print_json({**_plain(delta), "tensors": tensors})
        return
    console.print(shown(f"item {item.item_id}: what this device learned for task {delta.task_id}", style="bold"))
    console.print(shown(fate, style="dim"))
    console.print(shown(f"learned beside adapter {delta.base_version} from {learned_from(item).strip('()')[13:]}"))
    for line in (*_said(delta), *_noise(context, pool, delta, numbers=sum(each.size for each in factors.values()))):
        console.print(shown(line))
    for line in picture(norms):
        console.print(shown(line))
    console.print("--raw gives its very bytes", style="dim")


def show_masked(item: OutboxItem, *, size_bytes: int, fate: str, as_json: bool) -> None:
    """Print what went into a secure sum: one vector in which no number says anything without those of all others."""
    if as_json:
        print_json({"kind": item.kind, "delta": item.delta, "size_bytes": size_bytes, "sha256": item.sha256})
        return
    console.print(shown(f"item {item.item_id}: what this device gave to a secure sum", style="bold"))
    console.print(shown(fate, style="dim"))
    console.print(shown(f"{size_bytes:,} bytes, masked: only the sum of all devices can be read"))
    console.print("--raw gives its very bytes", style="dim")


def picture(norms: dict[str, float]) -> list[str]:
    """One line a kind of factor: a bar a layer, by its size against the largest of all, and the norm over all layers.

    `norms` are L2 norms by tensor name, layers in their order.
    """
    kinds: dict[str, list[float]] = {}
    for name, norm in sorted(norms.items(), key=lambda each: _layer(each[0])):
        parts = name.split(".")
        kinds.setdefault(f"{parts[-3]} {parts[-2].removeprefix('lora_')}", []).append(norm)
    largest = max(norms.values(), default=0.0) or 1.0
    width = max(map(len, kinds), default=0)
    top = len(_BARS) - 1
    return [
        f"{kind:<{width}} {''.join(_BARS[min(top, int(norm / largest * top + 0.5))] for norm in each)}"
        f" {math.hypot(*each):.3g}"
        for kind, each in kinds.items()
    ]


def _plain(delta: LoraDelta) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(delta, weights=b""))
    del fields["weights"]
    return {**fields, "weights_bytes": len(delta.weights), "weights_of_delta_sha256": sha256(delta.weights)}


def _said(delta: LoraDelta) -> list[str]:
    """What leaves beside the numbers."""
    told = [] if delta.reward is None else [f"judged {delta.reward:+.2f} on average"]
    told += [f"hash of that adapter {delta.weights_sha256[:12] or 'none'}", f"alpha {delta.alpha:g}"]
    return [f"it tells: {delta.trajectories} trajectories, {', '.join(told)}"]


def _noise(context: typer.Context, pool: Pool, delta: LoraDelta, *, numbers: int) -> list[str]:
    """What hides in it, and what that cost."""
    from clawloop_edge.privacy.ledger import Ledger

    if not delta.sigma:
        return [f"{numbers:,} numbers as they were learned: parts of what was said can be recovered from them"]
    budget = home_of(context).load_config().privacy.epsilon
    spent = Ledger(pool, epsilon=budget).spent(delta.line_id)
    hidden = f"{numbers:,} numbers, cut to norm {delta.clip:g}, each with noise of {delta.sigma * delta.clip:.3g}"
    return [
        hidden,
        f"the ledger counts {count(spent.releases, 'release')} of this model: epsilon {spent.epsilon:.2f} of"
        f" {budget:g}",
    ]


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def _norm(values: NDArray[np.floating[Any]]) -> float:
    return math.sqrt(float((values.astype("f8") ** 2).sum()))

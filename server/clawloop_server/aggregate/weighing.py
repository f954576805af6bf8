"""Who counts in a joined round, and how much: every rule looks at the Gram matrix of the updates, and none at a layer.

In this order: what is too old, replaced or without weight; copies of each other count as one; weights and norms are
bounded by the usual ones; then the defence of `[federate] robust`. Pure. What each rule is for: docs/federation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low

import msgspec
from torch import Tensor

from clawloop_server.aggregate import robust
from clawloop_server.aggregate.account import Share
from clawloop_server.aggregate.cohorts import compared
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import OWN, Contribution

MOST_TIMES = 1.0
"""no device's trajectories count more than so many times the usual number: how many there were is its own word, which
may make it count less, and never more than most"""
WILD = 5.0
"""an update so many times longer than the longest that may be is no long one, and is left out; others are cut"""
TOO_FEW = "too few devices count:"
"""what begins the reason against deltas that nothing is wrong with, and that may wait for others"""
LEAST_FOR_CENTRE = 3
"""of fewer updates there is no majority"""
LEAST_FOR_WILD = 3
"""of fewer lengths none is the usual one, so that none is wild: one tiny update would else throw out an honest one"""


@dataclass
class Member:
    """A contribution on its way through the rules. `left_out`: why it does not count; `broken`: it would in no
    round; `weight` is not normalised."""

    contribution: Contribution
    norm: float = 0.0
    cut_to: float = 0.0
    weight: float = 0.0
    cosine_own: float | None = None
    left_out: str = ""
    alike: tuple[str, ...] = ()
    broken: bool = False

    @property
    def counts(self) -> bool:
        """Whether no rule has left it out."""
        return not self.left_out

    @property
    def is_own(self) -> bool:
        """Whether it is the server's own update, which the server believes."""
        return self.contribution.source == OWN

    @property
    def damping(self) -> float:
        """What its age leaves of it (FedBuff, https://arxiv.org/abs/2106.06639)."""
        return float((1 + self.contribution.staleness) ** -0.5)

    @property
    def devices(self) -> frozenset[str]:
        """Whose data it was learned from."""
        return (self.contribution.devices | {self.contribution.device_id}) - {""}

    @property
    def size(self) -> int:
        """How many devices it is of: a secure sum is of several."""
        return max(1, len(self.devices))

    @property
    def share(self) -> Share:
        """What became of it."""
        return Share(
            source=self.contribution.source,
            device_id=self.contribution.device_id,
            weight=self.weight if self.counts else 0.0,
            staleness=self.contribution.staleness,
            norm=self.norm,
            cut_to=self.cut_to if self.counts else 0.0,
            cosine_own=self.cosine_own,
            left_out=self.left_out,
            alike=self.alike,
            by_others=not self.counts and not self.broken,
        )


class Weighed(msgspec.Struct, frozen=True):
    """What the rules found: shares in the order of the contributions, cosines by device, and what to tell."""

    shares: tuple[Share, ...]
    conflict: dict[str, dict[str, float]]
    notes: tuple[str, ...]


def weigh(
    contributions: Sequence[Contribution], gram: Tensor, unusable: Sequence[str], *, settings: FederateSettings
) -> Weighed:
    """The share of each contribution. `gram` (N, N) is zero where `unusable` says why an update cannot be used."""
    cosines, norms = robust.cosines_of(gram), robust.norms_of(gram)
    members = [
        Member(c, norm=norm, cut_to=norm, weight=c.weight, left_out=why)
        for c, norm, why in zip(contributions, norms, unusable, strict=True)
    ]
    _leave_out_what_cannot_count(members, settings)
    for member in members:
        member.broken = not member.counts
    for n in [n for n, member in enumerate(members) if member.is_own][:1]:
        for at, member in enumerate(members):
            member.cosine_own = float(cosines[at, n])
    _merge_copies(members, cosines, settings)
    _bound_weights(members)
    _clip(members, settings)
    conflict = _conflict(members, cosines)
    notes = _DEFENCES[settings.robust](members, gram, settings) if any(m.counts for m in members) else ""
    notes_of = [notes, _too_few_devices(members, settings)]
    _normalise(members)
    return Weighed(tuple(m.share for m in members), conflict, tuple(note for note in notes_of if note))


def _leave_out_what_cannot_count(members: Sequence[Member], settings: FederateSettings) -> None:
    newest: dict[str, Member] = {}
    for member in members:
        c = member.contribution
        if not member.counts:
            continue
        if not 0 < c.weight < float("inf"):
            member.left_out = f"it says that it was learned from {c.weight:g} trajectories"
        elif member.norm == 0:
            member.left_out = "it changes nothing"
        elif c.staleness > settings.max_staleness:
            member.left_out = f"{c.staleness} versions old, over max_staleness {settings.max_staleness}"
        elif c.device_id:
            _replace(newest, member)


def _replace(newest: dict[str, Member], member: Member) -> None:
    """One a device: the least stale, of those the later."""
    device = member.contribution.device_id
    older = newest.get(device)
    if older is not None and older.contribution.staleness < member.contribution.staleness:
        older, member = member, older
    if older is not None:
        older.left_out = f"replaced by {member.contribution.source} of the same device"
    newest[device] = member


def _conflict(members: Sequence[Member], cosines: Tensor) -> dict[str, dict[str, float]]:
    """The cosine of each pair of devices whose updates are sound, the smaller name first: whom the defence leaves out
    for where it points is among them, and who sent no number, a copy, or something far too long is not."""
    sound = {m.contribution.device_id: n for n, m in enumerate(members) if m.counts and m.contribution.device_id}
    named = [(device, sound[device]) for device in sorted(compared(sound))]
    values = cosines.tolist()
    return {
        device: {other: round(values[n][m], 6) for other, m in named[at + 1 :]}
        for at, (device, n) in enumerate(named[:-1])
    }


def _merge_copies(members: Sequence[Member], cosines: Tensor, settings: FederateSettings) -> None:
    """Of updates that are copies the shortest one counts, with the usual weight of them."""
    at = [n for n, m in enumerate(members) if m.counts and m.contribution.device_id]
    devices = [members[n].contribution.device_id for n in at]
    for group in robust.copies(cosines[at][:, at], devices, settings.duplicate_cosine):
        alike = [members[at[n]] for n in group]
        kept = min(alike, key=lambda m: (m.norm, m.contribution.source))
        kept.weight = median_low(m.weight for m in alike)
        kept.alike = tuple(m.contribution.source for m in alike if m is not kept)
        for member in alike:
            if member is not kept:
                member.left_out = f"a copy of {kept.contribution.source}: counted once"


def _bound_weights(members: Sequence[Member]) -> None:
    """No update has more than `MOST_TIMES` the usual weight of a device for each device that it is of."""
    counted = [m.weight / m.size for m in members if m.counts]
    most = MOST_TIMES * robust.usual(counted) if counted else 0.0
    for member in members:
        if member.counts and not member.is_own:
            member.weight = min(member.weight, most * member.size)


def _clip(members: Sequence[Member], settings: FederateSettings) -> None:
    """No device's update is longer than `max_norm` times the usual: the median, or the server's own of fewer than 3,
    and of two without it the shorter; one far beyond is left out, where there are lengths enough to tell."""
    lengths = [m.norm for m in members if m.counts and not m.is_own]
    own = [m.norm for m in members if m.counts and m.is_own]
    if not lengths:
        return
    most = settings.max_norm * (own[0] if own and len(lengths) < LEAST_FOR_WILD else robust.usual(lengths))
    tells = len(lengths) + len(own) >= LEAST_FOR_WILD
    for member in members:
        if not member.counts or member.is_own:
            continue
        if member.norm > WILD * most and tells:
            member.left_out = f"its norm is {member.norm / most:.3g} times the most that counts ({most:.3g})"
        else:
            member.cut_to = member.norm * robust.clip_scale(member.norm, most)


def _gate(members: Sequence[Member], gram: Tensor, settings: FederateSettings) -> str:
    """Updates against the server's own are left out; where it has none, those against what most agree on."""
    if any(m.is_own and m.counts for m in members):
        _leave_out_below(members, settings.min_cosine, "the server's own update")
        return ""
    at = [n for n, m in enumerate(members) if m.counts]
    if len(at) < LEAST_FOR_CENTRE:
        return f"the server has no update of its own, and {len(at)} others are no majority: nothing tells who lies"
    clipped = _clipped(members, gram, at)
    weights = robust.geometric_median(clipped, [members[n].weight for n in at])
    for n, cosine in zip(at, robust.centre_cosines(clipped, weights), strict=True):
        members[n].cosine_own = cosine
    _leave_out_below(members, settings.min_cosine, "what most agree on")
    return ""


def _leave_out_below(members: Sequence[Member], least: float, what: str) -> None:
    for member in members:
        if member.counts and not member.is_own and member.cosine_own is not None and member.cosine_own < least:
            member.left_out = f"its cosine with {what} is {member.cosine_own:.2f}, below min_cosine {least:g}"


def _multi_krum(members: Sequence[Member], gram: Tensor, settings: FederateSettings) -> str:
    at = [n for n, m in enumerate(members) if m.counts]
    attackers = robust.most_attackers(len(at), settings.attackers)
    if not attackers:
        return f"multi-krum of {len(at)} updates: it takes 5 to tell one that lies"
    kept = {at[n] for n in robust.multi_krum(_clipped(members, gram, at), attackers)}
    for n in at:
        if n not in kept and not members[n].is_own:
            members[n].left_out = f"multi-krum: among the {attackers} that are farthest from the others"
    return ""


def _geometric_median(members: Sequence[Member], gram: Tensor, settings: FederateSettings) -> str:
    at = [n for n, m in enumerate(members) if m.counts]
    chosen = robust.geometric_median(_clipped(members, gram, at), [members[n].weight for n in at])
    whole = sum(members[n].weight for n in at)
    for n, weight in zip(at, chosen, strict=True):
        members[n].weight = weight * whole
    return ""


def _mean(members: Sequence[Member], gram: Tensor, settings: FederateSettings) -> str:
    return ""


_DEFENCES: dict[str, Callable[[Sequence[Member], Tensor, FederateSettings], str]] = {
    "gate": _gate,
    "multi-krum": _multi_krum,
    "geometric-median": _geometric_median,
    "mean": _mean,
}


def _clipped(members: Sequence[Member], gram: Tensor, at: Sequence[int]) -> Tensor:
    """The Gram matrix of those updates as they were cut."""
    chosen = gram[list(at)][:, list(at)]
    scales = gram.new_tensor([members[n].cut_to / members[n].norm for n in at])
    return chosen * scales[:, None] * scales[None, :]


def _too_few_devices(members: Sequence[Member], settings: FederateSettings) -> str:
    """Deltas of too few devices are left out: what they changed would tell of each."""
    deltas = [m for m in members if m.counts and not m.is_own]
    devices = frozenset[str]().union(*(m.devices for m in members if m.counts))
    if not deltas or len(devices) >= settings.min_devices:
        return ""
    for member in deltas:
        member.left_out = f"{TOO_FEW} {len(devices)}, min_devices is {settings.min_devices}"
    return f"{len(devices)} devices count, min_devices is {settings.min_devices}: no delta is used"


def _normalise(members: Sequence[Member]) -> None:
    """Weights become parts of the mean, damped by age: as in FedBuff, a round of old updates makes a smaller step."""
    whole = sum(m.weight for m in members if m.counts)
    for member in members:
        member.weight = member.weight / whole * member.damping if member.counts else 0.0

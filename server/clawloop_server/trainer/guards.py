"""What a round must not be published with, whatever a gate measures. Pure functions of what was logged."""

import math
from collections.abc import Mapping, Sequence

from clawloop_server.trainer.settings import TrainSettings

ENTROPY_DECAY = 0.9
MOST_CUT = 0.5

Metrics = Mapping[str, float]


def unhealthy(updates: Sequence[Metrics], settings: TrainSettings) -> str:
    """Why the outcome of a round with these updates' metrics must not be published; empty if it may."""
    if not updates or not sum(update["trajectories"] for update in updates):
        return "no trajectory could be learned from"
    taught = [update for update in updates if update.get("tokens", 1.0) > 0]
    if not taught:
        return "no trajectory had anything to teach: every group agreed in itself"
    if reason := _broken(taught) or _far(taught, settings):
        return reason
    if (fall := entropy_fall(taught)) > settings.max_entropy_fall:
        return (
            f"entropy fell by {fall:.0%}, over [train] max_entropy_fall {settings.max_entropy_fall:g}:"
            " the policy collapses; lower [train] lr, or look at what is rewarded"
        )
    if (rise := entropy_rise(taught)) > settings.max_entropy_rise:
        return (
            f"entropy rose by {rise:.0%}, over [train] max_entropy_rise {settings.max_entropy_rise:g}:"
            " the policy falls apart; lower [train] lr, or look at what is judged bad"
        )
    return ""


def _broken(taught: Sequence[Metrics]) -> str:
    """What of these updates is no number, or made the policy none."""
    skipped = sum(1 for update in taught if update.get("skipped_steps", 0.0))
    if 2 * skipped > len(taught):
        return (
            f"the gradient of {skipped} of {len(taught)} updates was not finite, so that these did nothing;"
            " lower [train] lr, or see [train] dtype"
        )
    for metric in ("ess", "kept", "entropy", "surprise", "k3"):
        if not all(math.isfinite(update.get(metric, 0.0)) for update in taught):
            return f"{metric} of an update is not finite: the policy or its data are broken; lower [train] lr"
    return ""


def _far(taught: Sequence[Metrics], settings: TrainSettings) -> str:
    """How the data are too far from the policy."""
    ess, kept = mean(taught, "ess"), mean(taught, "kept")
    cut = mean(taught, "clipped") if settings.loss.policy == "tis" else 0.0
    if ess < settings.min_ess:
        return f"effective sample size {ess:.2f} is below {settings.min_ess}: the data are too far from the policy"
    if cut > MOST_CUT:  # weights that are all cut are equal: the effective sample size does not see it
        return f"the ratio of {cut:.0%} of the tokens is above [train.loss] tis_cap: the data are too far off"
    if kept < settings.min_kept:
        return f"only {kept:.2f} of the tokens could be used, below {settings.min_kept}: the data are too stale"
    return ""


def entropy_fall(updates: Sequence[Metrics]) -> float:
    """The part of its entropy that the policy lost, in [0, 1]; 0 where nothing can be said. A policy that is driven to
    what was rewarded now and then ends in a few answers."""
    now, before, sampled = _entropies(updates)
    return max(0.0, 1.0 - now / min(before, sampled)) if min(before, sampled) > 0 else 0.0


def entropy_rise(updates: Sequence[Metrics]) -> float:
    """By what part of it the policy's entropy rose; 0 where nothing can be said. A policy that is pushed away from all
    that it does forgets the form first, and then says anything."""
    now, before, sampled = _entropies(updates)
    return max(0.0, now / max(before, sampled) - 1.0) if min(before, sampled) > 0 else 0.0


def _entropies(updates: Sequence[Metrics]) -> tuple[float, float, float]:
    """The policy's entropy in the round's last half, and the two measures that it is compared with; both must say the
    same, since each alone is fooled.

    One is the larger of its entropy in the round's first half and the running mean of earlier rounds: it changes when
    other work comes in, of which there is less or more to say. The other is the mean of -log mu on the very tokens of
    the last half, which is the entropy of the policy that sampled: but of few tokens it is noise. A round of one update
    has its entropy from before that update; what it did itself is seen in the next.
    """
    half = max(1, len(updates) // 2)
    last, first = updates[-half:], updates[: len(updates) - half][:half]
    before = max(by_tokens(first, "entropy"), updates[0].get("entropy_before", 0.0))
    return by_tokens(last, "entropy"), before, by_tokens(last, "surprise")


def running_entropy(before: float, update: Metrics) -> float:
    """The running mean of entropy after an update; one without tokens, or of which it is not known,
    leaves it as it was."""
    if not update["tokens"] or not math.isfinite(update["entropy"]):
        return before
    return ENTROPY_DECAY * before + (1 - ENTROPY_DECAY) * update["entropy"] if before else update["entropy"]


def by_tokens(updates: Sequence[Metrics], metric: str) -> float:
    """The mean of a metric over the tokens of these updates; 0 if there are none."""
    weights = [update.get("tokens", 1.0) for update in updates]
    total = sum(weights)
    return sum(w * u.get(metric, 0.0) for w, u in zip(weights, updates, strict=True)) / total if total else 0.0


def mean(updates: Sequence[Metrics], metric: str) -> float:
    """The mean of a metric over the updates that have it; 0 if none has."""
    found = [update[metric] for update in updates if metric in update]
    return sum(found) / len(found) if found else 0.0

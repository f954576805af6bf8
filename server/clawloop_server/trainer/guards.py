"""What a round must not be published with, whatever a gate measures. Pure functions of what was logged."""

from collections.abc import Mapping, Sequence

from clawloop_server.trainer.settings import TrainSettings

ENTROPY_DECAY = 0.9

Metrics = Mapping[str, float]


def unhealthy(updates: Sequence[Metrics], settings: TrainSettings) -> str:
    """Why the outcome of a round with these updates' metrics must not be published; empty if it may."""
    if not updates or not sum(update["trajectories"] for update in updates):
        return "no trajectory could be learned from"
    taught = [update for update in updates if update.get("tokens", 1.0) > 0]
    if not taught:
        return "no trajectory had anything to teach: every group agreed in itself"
    if all(update.get("skipped_steps", 0.0) for update in taught):
        return f"the gradient of none of {len(taught)} updates was finite; lower [train] lr, or see [train] dtype"
    ess, kept, fall = mean(taught, "ess"), mean(taught, "kept"), entropy_fall(taught)
    if ess < settings.min_ess:
        return f"effective sample size {ess:.2f} is below {settings.min_ess}: the data are too far from the policy"
    if kept < settings.min_kept:
        return f"only {kept:.2f} of the tokens could be used, below {settings.min_kept}: the data are too stale"
    if fall > settings.max_entropy_fall:
        return (
            f"entropy fell by {fall:.0%}, over [train] max_entropy_fall {settings.max_entropy_fall:g}:"
            " the policy collapses; lower [train] lr, or look at what is rewarded"
        )
    return ""


def entropy_fall(updates: Sequence[Metrics]) -> float:
    """The part of its entropy that the policy lost, in [0, 1]; 0 where nothing can be said.

    By two measures, of which the smaller counts, since each alone is fooled. From the larger of the round's first half
    and the running mean of earlier rounds to the round's last half: falls when other work comes in, of which there is
    less to say. And from -log mu to the policy's entropy on the very same tokens of the last half: the mean of the one
    is the entropy of the policy that sampled, but of few tokens it is noise. A round of one update has its measure from
    before that update; what it did itself is seen in the next.
    """
    half = max(1, len(updates) // 2)
    last, first = updates[-half:], updates[: len(updates) - half][:half]
    now, before = by_tokens(last, "entropy"), max(by_tokens(first, "entropy"), updates[0].get("entropy_before", 0.0))
    sampled = by_tokens(last, "surprise")
    if before <= 0.0 or sampled <= 0.0:
        return 0.0
    return max(0.0, 1.0 - now / min(before, sampled))


def running_entropy(before: float, update: Metrics) -> float:
    """The running mean of entropy after an update; one without tokens leaves it as it was."""
    if not update["tokens"]:
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

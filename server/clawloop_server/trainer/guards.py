"""What a round must not be published with, whatever a gate measures. Pure functions of what was logged."""

from collections.abc import Mapping, Sequence

from clawloop_server.trainer.settings import TrainSettings


def unhealthy(updates: Sequence[Mapping[str, float]], settings: TrainSettings) -> str:
    """Why the outcome of a round with these updates' metrics must not be published; empty if it may."""
    if not updates or not sum(update["trajectories"] for update in updates):
        return "no trajectory could be learned from"
    ess, kept = mean(updates, "ess"), mean(updates, "kept")
    if ess < settings.min_ess:
        return f"effective sample size {ess:.2f} is below {settings.min_ess}: the data are too far from the policy"
    if kept < settings.min_kept:
        return f"only {kept:.2f} of the tokens could be used, below {settings.min_kept}: the data are too stale"
    return ""


def mean(updates: Sequence[Mapping[str, float]], metric: str) -> float:
    """The mean of a metric over the updates that have it; 0 if none has."""
    found = [update[metric] for update in updates if metric in update]
    return sum(found) / len(found) if found else 0.0

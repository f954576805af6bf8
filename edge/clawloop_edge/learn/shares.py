"""How much of what is learned each trajectory has, and that none has too much. Pure; knows no model.

A trajectory's part in an update is the sum of the absolute slopes of the loss by its tokens' logprobs, as the task's
own settings, the rewards and the weights made them: whatever a server asks for, it is measured on what is learned.
"""

import math
from collections.abc import Mapping, Sequence

MOST = 0.25
"""the largest part of one trajectory, where that many are learned from that it can be held to"""
_SLACK = 1e-3
"""of rounding"""


def most_share(least: int) -> float:
    """The largest part that one of at least `least` trajectories may have: a quarter, or twice an equal part."""
    return max(MOST, min(1.0, 2.0 / least))


def scales(masses: Sequence[float], most: float) -> list[float]:
    """What each trajectory's slopes are multiplied with, so that none has more than `most` of the sum after that; of so
    few that this cannot be, none has more than two equal parts.

    The largest ones are cut to one height c: if k of them are, c = most * (k c + the sum of the rest).
    """
    count = sum(mass > 0 for mass in masses)
    if not count or not math.isfinite(sum(masses)):
        return [1.0] * len(masses)
    if count * most < 1:
        most = min(1.0, 2.0 / count)
    ordered, height = sorted(masses, reverse=True), math.inf
    for cut, mass in enumerate(ordered):
        height = most * math.fsum(ordered[cut:]) / (1 - cut * most)
        if mass <= height * (1 + 1e-12):
            break
    return [min(1.0, height / mass) if mass > 0 else 1.0 for mass in masses]


def largest(shares: Mapping[str, float], masses: Mapping[str, float]) -> float:
    """The largest part of one trajectory in all updates together: each as much as the other, and each by its size."""
    parts = (max(values.values(), default=0.0) / (sum(values.values()) or 1.0) for values in (shares, masses))
    return max(parts)


def too_large(share: float, most: float) -> bool:
    """Whether that is more than it may be, but for rounding."""
    return share > most * (1 + _SLACK)

"""From rewards to advantages: how much better a trajectory went than was to be expected. Pure functions of values.

There is no group of answers to one prompt in live traffic, so the expectation is tracked over time. A baseline never
contains the reward it is subtracted from. The state is a frozen value that a checkpoint holds as JSON.
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from clawloop_shared.errors import ConfigError

KAPPA = 4.0
PRIOR = 0.5
RHO_LOW, RHO_HIGH = 0.875, 0.96
DRIFT_HALF = 0.06
EMA_DECAY = 0.9
RMS_FLOOR = 0.1
CLIP = 3.0
LARGE_BATCH = 64

Key = tuple[str, ...]
ROOT: Key = ()


class Rewarded(msgspec.Struct, frozen=True):
    """A trajectory as the baseline sees it: reward in [0, 1], confidence in (0, 1], and what it is compared with.

    `key` is a path from the general to the particular, e.g. `("assistant", "code")`; the empty path is the root alone.
    """

    reward: float
    confidence: float = 1.0
    key: Key = ROOT


class Node(msgspec.Struct, frozen=True):
    """Discounted weight of rewards (alpha) and of what they lacked to 1 (beta)."""

    alpha: float = 0.0
    beta: float = 0.0


class AdvantageState(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between updates. Node names are the keys' parts joined by `/`; the root's is empty."""

    nodes: dict[str, Node] = {}
    scale: float | None = None
    """running RMS of the advantages"""
    mean: float | None = None
    """running mean of the rewards of batches"""
    drift: float = 0.0
    """mean k3 between the policies that sampled and the current one, of the last update"""


Result = tuple[list[float], AdvantageState]
Advantage = Callable[[Sequence[Rewarded], AdvantageState], Result]


def tracker(batch: Sequence[Rewarded], state: AdvantageState) -> Result:
    """A_i = r_i - v(key_i), v a discounted mean shrunk to its parent's, read before r_i updates it; then scaled.

    Sources: SPO, https://arxiv.org/abs/2509.13232 (tracker, discount by drift); SPIRAL, https://arxiv.org/abs/2506.24119
    (baseline from before the update).
    """
    nodes, rho = dict(state.nodes), discount(state.drift)
    raw = []
    for one in batch:
        raw.append(one.reward - value_of(nodes, one.key))
        for name in _path(one.key):
            node = nodes.get(name, Node())
            alpha = rho * node.alpha + one.confidence * one.reward
            nodes[name] = Node(alpha, rho * node.beta + one.confidence * (1.0 - one.reward))
    scaled, scale = _scaled(raw, batch, before=state.scale)
    return scaled, msgspec.structs.replace(state, nodes=nodes, scale=scale)


def ema(batch: Sequence[Rewarded], state: AdvantageState) -> Result:
    """A_i = r_i - m, m the running mean of earlier batches (at the beginning the first batch's own mean); scaled.

    A reward counts as far as it can be trusted: what was hardly judged does not move what the rest is compared with.
    """
    if not batch:
        return [], state
    own = sum(one.confidence * one.reward for one in batch) / sum(one.confidence for one in batch)
    before = own if state.mean is None else state.mean
    scaled, scale = _scaled([one.reward - before for one in batch], batch, before=state.scale)
    return scaled, msgspec.structs.replace(state, mean=EMA_DECAY * before + (1 - EMA_DECAY) * own, scale=scale)


ADVANTAGES: dict[str, Advantage] = {"tracker": tracker, "ema": ema}


def advantage_named(name: str) -> Advantage:
    """The function of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ADVANTAGES:
        raise ConfigError(f"[train] advantage = {name!r}; known are {', '.join(sorted(ADVANTAGES))}")
    return ADVANTAGES[name]


def value_of(nodes: dict[str, Node], key: Key) -> float:
    """The expected reward at `key`, in [0, 1]: a node's own mean, with the weight of KAPPA rewards on its parent's."""
    value = PRIOR
    for name in _path(key):
        node = nodes.get(name, Node())
        value = (node.alpha + KAPPA * value) / (node.alpha + node.beta + KAPPA)
    return value


def discount(drift: float) -> float:
    """rho: how much of the past is kept at each reward; less if the policy moved far from the one that sampled."""
    return min(RHO_HIGH, max(RHO_LOW, math.exp2(-drift / DRIFT_HALF)))


def rescale(reward: float, *, low: float, high: float) -> float:
    """A reward in [low, high] as one in [0, 1]; beyond the bounds it is cut."""
    return min(1.0, max(0.0, (reward - low) / (high - low)))


def _path(key: Key) -> list[str]:
    return ["/".join(key[:depth]) for depth in range(len(key) + 1)]


def _scaled(
    raw: Sequence[float], batch: Sequence[Rewarded], *, before: float | None
) -> tuple[list[float], float | None]:
    """Advantages over their RMS by confidence (at least RMS_FLOOR), clipped to +-CLIP; a small batch uses the running
    RMS."""
    if not raw:
        return [], before
    total = sum(one.confidence for one in batch)
    own = math.sqrt(sum(one.confidence * a * a for a, one in zip(raw, batch, strict=True)) / total)
    running = own if before is None else EMA_DECAY * before + (1 - EMA_DECAY) * own
    scale = max(own if len(raw) >= LARGE_BATCH else running, RMS_FLOOR)
    return [min(CLIP, max(-CLIP, a / scale)) for a in raw], running

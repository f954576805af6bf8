"""From rewards to advantages: how much better something went than was to be expected. Pure functions of values.

Where several trajectories of one task are in an update (a group), each is compared with the others. Live traffic has no
such groups, so there the expectation is tracked over time. What a reward is subtracted from never contains that reward,
but for the group means of `dr-grpo` and `grpo`, which their papers define so. The state is a frozen value that a
checkpoint holds as JSON; its size is bounded. Knows no trajectory, signal or tensor.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec

from clawloop_shared.errors import ConfigError

KAPPA = 4.0
RHO_LOW, RHO_HIGH = 0.875, 0.96
DRIFT_HALF = 0.06
EMA_DECAY = 0.9
RMS_FLOOR = 0.1
CLIP = 3.0
LARGE_BATCH = 64
FLAT = 1e-9
"""rewards of a group that differ by no more are one reward"""
MAX_NODES = 2048
"""the tracker forgets what it has not heard of for longest"""
MAX_POSITION = 31
"""what is remembered of later steps is remembered as of this one"""

Key = tuple[str, ...]
ROOT: Key = ()


class Rewarded(msgspec.Struct, frozen=True):
    """What a baseline sees of a trajectory, or of one of its steps: its reward (or return) and how sure that is, in
    (0, 1].

    `key` is a path from the general to the particular of what is known before anything was sampled; `group` names the
    task that others in the update share, if any do; `position` is how many steps came before; `trajectory` numbers the
    trajectories of the update (None: this is the only one of its own).
    """

    reward: float
    confidence: float = 1.0
    key: Key = ROOT
    group: str = ""
    position: int = 0
    trajectory: int | None = None


class Node(msgspec.Struct, frozen=True):
    """Discounted weight of rewards, and their sum by it (alpha + beta, and alpha, where rewards are in [0, 1])."""

    total: float = 0.0
    weight: float = 0.0


class AdvantageState(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between updates. `nodes` are in the order in which they were last heard of."""

    nodes: dict[str, Node] = {}
    means: dict[int, float] = {}
    """running mean of the rewards of batches, by position"""
    scale: float | None = None
    """running RMS of the advantages"""
    drift: float = 0.0
    """mean k3 between the policies that sampled and the current one, of the last update"""


Raw = list[float | None]
"""advantages before they are scaled; None where there is nothing to compare with"""
Baseline = Callable[[Sequence[Rewarded], AdvantageState], tuple[Raw, AdvantageState]]
GroupAdvantage = Callable[[Sequence[Rewarded]], list[float]]


class Advantages(msgspec.Struct, frozen=True, kw_only=True):
    """One value for each that was given; None: it teaches nothing. `groups` were compared within themselves, `flat` of
    them all agreed."""

    values: Raw
    state: AdvantageState
    groups: int = 0
    flat: int = 0


def advantages_of(
    batch: Sequence[Rewarded], state: AdvantageState, *, advantage: str, group_advantage: str = "none"
) -> Advantages:
    """The advantages of an update, by the functions of these names, over one scale and clipped.

    A group of two or more is compared within itself, position by position; one that agrees at every position teaches
    nothing (DAPO's dynamic sampling, https://arxiv.org/abs/2503.14476), and neither moves the baseline. The rest is
    compared with the baseline. One scale for all keeps a group's advantages to the others' as their rewards are; what
    `grpo` divided by its own deviation has one already.

    Raises:
        ConfigError: there is no function of that name.
    """
    baseline = advantage_named(advantage)
    cells = {} if group_advantage == "none" else _cells(batch)
    raw = _compared(batch, cells, group_advantage)
    grouped = {index for cell in cells.values() for index in cell}
    rest = [index for index in range(len(batch)) if index not in grouped]
    values, state = baseline([batch[index] for index in rest], state)
    for index, value in zip(rest, values, strict=True):
        raw[index] = value
    flat = _flat_groups(batch, cells) - {batch[index].group for index in rest}
    raw = [None if one.group in flat else value for one, value in zip(batch, raw, strict=True)]
    own = grouped if group_advantage == "grpo" else set()
    scaled, scale = _scaled(raw, batch, before=state.scale, own=own)
    state = msgspec.structs.replace(state, scale=scale)
    return Advantages(values=scaled, state=state, groups=len({group for group, _ in cells}), flat=len(flat))


_Cells = dict[tuple[str, int], list[int]]
"""which of an update are compared with each other: of one group, at one position, from two or more trajectories"""


def _cells(batch: Sequence[Rewarded]) -> _Cells:
    cells: _Cells = {}
    for index, one in enumerate(batch):
        if one.group:
            cells.setdefault((one.group, one.position), []).append(index)
    return {name: cell for name, cell in cells.items() if len(cell) > 1}  # a trajectory is at a position once


def _compared(batch: Sequence[Rewarded], cells: _Cells, name: str) -> Raw:
    """The advantages of those that are in a cell."""
    raw: Raw = [None] * len(batch)
    for cell in cells.values():
        values = group_advantage_named(name)([batch[index] for index in cell])
        for index, value in zip(cell, values, strict=True):
            raw[index] = value
    return raw


def _flat_groups(batch: Sequence[Rewarded], cells: _Cells) -> set[str]:
    """The groups that agree wherever they can be compared."""
    split = set()
    for (group, _), cell in cells.items():
        rewards = [batch[index].reward for index in cell]
        if max(rewards) - min(rewards) > FLAT:
            split.add(group)
    return {group for group, _ in cells} - split


# groups


def dr_grpo(group: Sequence[Rewarded]) -> list[float]:
    """A_i = r_i - mean(r), the mean by confidence. Source: Dr. GRPO, https://arxiv.org/abs/2503.20783."""
    mean = _mean(group)
    return [one.reward - mean for one in group]


def loo(group: Sequence[Rewarded]) -> list[float]:
    """A_i = r_i - mean of the others', by confidence. Source: RLOO, https://arxiv.org/abs/2402.14740."""
    total = sum(one.confidence * one.reward for one in group)
    weight = sum(one.confidence for one in group)
    return [
        one.reward - (total - one.confidence * one.reward) / max(weight - one.confidence, math.ulp(weight))
        for one in group
    ]


def grpo(group: Sequence[Rewarded]) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r), both by confidence; 0 without any spread. Source:
    https://arxiv.org/abs/2402.03300."""
    mean = _mean(group)
    total = sum(one.confidence for one in group)
    std = math.sqrt(sum(one.confidence * (one.reward - mean) ** 2 for one in group) / total)
    return [(one.reward - mean) / std if std > FLAT else 0.0 for one in group]


GROUP_ADVANTAGES: dict[str, GroupAdvantage] = {"dr-grpo": dr_grpo, "loo": loo, "grpo": grpo}


def group_advantage_named(name: str) -> GroupAdvantage:
    """The function of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in GROUP_ADVANTAGES:
        raise ConfigError(f"[train] group_advantage = {name!r}; known are {', '.join(sorted(GROUP_ADVANTAGES))}, none")
    return GROUP_ADVANTAGES[name]


# trajectories of no group


def ema(batch: Sequence[Rewarded], state: AdvantageState) -> tuple[Raw, AdvantageState]:
    """A_i = r_i - m, m the running mean of the batches before this one, of the same position; in the first batch the
    mean of the others.

    A reward counts as far as it can be trusted: what was hardly judged does not move what the rest is compared with.
    """
    expected = _expected(batch, state.means)
    raw: Raw = [None if v is None else one.reward - v for one, v in zip(batch, expected, strict=True)]
    return raw, msgspec.structs.replace(state, means=_moved(batch, state.means))


def tracker(batch: Sequence[Rewarded], state: AdvantageState) -> tuple[Raw, AdvantageState]:
    """A_i = r_i - v(key_i): along the key's path a discounted mean each, shrunk to its parent's; the root is the slow
    mean of `ema`. Read before r_i moves it.

    Were the root a node like the others, each key's rewards would discount it: it would know the last 8 to 25 rewards
    of anyone, however many keys there are, and hold on to a prior. Sources: SPO, https://arxiv.org/abs/2509.13232
    (tracker, discount by drift); SPIRAL, https://arxiv.org/abs/2506.24119 (baseline from before the update).
    """
    nodes, rho = dict(state.nodes), discount(state.drift)
    raw: Raw = []
    expected = _expected(batch, state.means)
    for own in _by_trajectory(batch):
        for one, root in zip(batch[own.start : own.stop], expected[own.start : own.stop], strict=True):
            known = None if root is None else value_of(nodes, one.key, root=root, position=one.position)
            raw.append(None if known is None else one.reward - known)
        for one in batch[own.start : own.stop]:
            for name in reversed(_path(one.key, one.position)):  # so that a parent is forgotten after its children
                node = nodes.pop(name, Node())
                total = rho * node.total + one.confidence * one.reward
                nodes[name] = Node(total, rho * node.weight + one.confidence)
    kept = dict(list(nodes.items())[-MAX_NODES:])
    return raw, msgspec.structs.replace(state, nodes=kept, means=_moved(batch, state.means))


ADVANTAGES: dict[str, Baseline] = {"tracker": tracker, "ema": ema}


def advantage_named(name: str) -> Baseline:
    """The function of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ADVANTAGES:
        raise ConfigError(f"[train] advantage = {name!r}; known are {', '.join(sorted(ADVANTAGES))}")
    return ADVANTAGES[name]


def value_of(nodes: dict[str, Node], key: Key, *, root: float, position: int = 0) -> float:
    """The expected reward at `key`: each node's own mean, with the weight of KAPPA rewards on its parent's."""
    value = root
    for name in _path(key, position):
        node = nodes.get(name, Node())
        value = (node.total + KAPPA * value) / (node.weight + KAPPA)
    return value


def discount(drift: float) -> float:
    """rho: how much of the past is kept at each reward; less if the policy moved far from the one that sampled."""
    return min(RHO_HIGH, max(RHO_LOW, math.exp2(-drift / DRIFT_HALF)))


def _path(key: Key, position: int) -> list[str]:
    """The names of the nodes from below the root to the key's own; each position has nodes of its own, up to the last
    that is told apart."""
    at = f"@{min(position, MAX_POSITION)}" if position else ""
    return ["/".join(key[:depth]) + at for depth in range(1, len(key) + 1)]


def _mean(batch: Sequence[Rewarded]) -> float:
    return sum(one.confidence * one.reward for one in batch) / sum(one.confidence for one in batch)


def _by_trajectory(batch: Sequence[Rewarded]) -> list[range]:
    """Where the steps of each trajectory are, which stand together."""
    starts = [
        at
        for at, one in enumerate(batch)
        if not at or one.trajectory is None or one.trajectory != batch[at - 1].trajectory
    ]
    return [range(start, end) for start, end in pairwise([*starts, len(batch)])]


def _at_positions(batch: Sequence[Rewarded]) -> dict[int, list[Rewarded]]:
    found: dict[int, list[Rewarded]] = {}
    for one in batch:
        found.setdefault(min(one.position, MAX_POSITION), []).append(one)
    return found


def _expected(batch: Sequence[Rewarded], means: dict[int, float]) -> list[float | None]:
    """What each is compared with: the running mean of its position, or, where there is none yet, the mean of the other
    trajectories; None for one that has no others."""
    others = {position: iter(_others(own)) for position, own in _at_positions(batch).items() if position not in means}
    positions = [min(one.position, MAX_POSITION) for one in batch]
    return [next(others[p]) if p in others else means[p] for p in positions]


def _others(batch: Sequence[Rewarded]) -> list[float | None]:
    """For each the mean of what is of other trajectories."""
    sums: dict[int, Node] = {}
    names = [-1 - at if one.trajectory is None else one.trajectory for at, one in enumerate(batch)]
    for name, one in zip(names, batch, strict=True):
        own = sums.get(name, Node())
        sums[name] = Node(own.total + one.confidence * one.reward, own.weight + one.confidence)
    if len(sums) < 2:
        return [None] * len(batch)
    total, weight = sum(own.total for own in sums.values()), sum(own.weight for own in sums.values())
    return [(total - sums[name].total) / max(weight - sums[name].weight, math.ulp(weight)) for name in names]


def _moved(batch: Sequence[Rewarded], means: dict[int, float]) -> dict[int, float]:
    own = {position: _mean(at) for position, at in _at_positions(batch).items()}
    moved = {p: EMA_DECAY * means.get(p, mean) + (1 - EMA_DECAY) * mean for p, mean in own.items()}
    return dict(sorted((means | moved).items()))


# rewards


def rescale(reward: float, *, low: float, high: float) -> float:
    """A reward in [low, high] as one in [0, 1]; beyond the bounds it is cut."""
    return min(1.0, max(0.0, (reward - low) / (high - low)))


def returns_to_go(
    rewards: Sequence[tuple[float, float] | None], *, discount: float
) -> list[tuple[float, float] | None]:
    """For each step G_t = sum_{k >= t} discount^(k - t) c_k r_k / C_t with C_t = max_{k >= t} c_k, and C_t.

    `rewards` are (r_k, c_k) in order; None where a step was not judged: it has only what comes after, and none of its
    own if nothing does (or `discount` is 0). Source: reward-to-go, Sutton & Barto, 2nd ed., 13.3; the weights are ours,
    so that a faint word beside a sure one counts as little as in the reward of a whole trajectory.
    """
    found: list[tuple[float, float] | None] = []
    total, surest = 0.0, 0.0
    for judged in reversed(rewards):
        total, surest = discount * total, surest if discount else 0.0
        if judged is not None:
            total, surest = total + judged[0] * judged[1], max(surest, judged[1])
        found.append((total / surest, surest) if surest else None)
    return found[::-1]


# scale


def _scaled(raw: Raw, batch: Sequence[Rewarded], *, before: float | None, own: set[int]) -> tuple[Raw, float | None]:
    """Advantages over their RMS by confidence (at least RMS_FLOOR), clipped to +-CLIP; a small batch uses the running
    RMS. Those of `own` have a scale of their own."""
    known = {i: (a, batch[i].confidence) for i, a in enumerate(raw) if a is not None and i not in own}
    scale, running = 1.0, before
    if known:
        rms = math.sqrt(sum(c * a * a for a, c in known.values()) / sum(c for _, c in known.values()))
        running = rms if before is None else EMA_DECAY * before + (1 - EMA_DECAY) * rms
        scale = max(rms if len(known) >= LARGE_BATCH else running, RMS_FLOOR)
    scales = [1.0 if i in own else scale for i in range(len(raw))]
    return [None if a is None else min(CLIP, max(-CLIP, a / s)) for a, s in zip(raw, scales, strict=True)], running

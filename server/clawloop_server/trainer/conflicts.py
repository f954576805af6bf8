"""Whether what devices sent would move the adapter the same way: the gradient of each device's own trajectories.

Devices whose deltas are joined show that by their updates; of those that send trajectories it is asked here, before the
round trains, on a few trajectories of each. Rewards are compared within a device, so that one with harder tasks does
not look like an opponent. Knows no round and no database.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import msgspec
import torch
from torch import Tensor

from clawloop_server.trainer.engine import TrainEngine, UnusableSamples
from clawloop_shared.lessons import rewards_of, spread
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Limits, Sample, make_samples, screen

ASKED = 16
"""trajectories of a device that are looked at"""
LEAST = 2
"""trajectories that a device must have: one alone is not better or worse than others"""

Conflict = dict[str, dict[str, float]]
"""`[x][y]`: the cosine of devices x < y"""


def by_device(trajectories: Iterable[Trajectory], *, most: int = ASKED) -> dict[str, list[Trajectory]]:
    """Up to `most` trajectories of each device, those with the lowest ids, which the vault draws by hashing."""
    found: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: t.trajectory_id):
        own = found.setdefault(trajectory.device_id, [])
        if len(own) < most:
            own.append(trajectory)
    return {device_id: own for device_id, own in sorted(found.items()) if len(own) >= LEAST}


def conflict(
    engine: TrainEngine, devices: Mapping[str, Sequence[Trajectory]], *, version: int, limits: Limits
) -> Conflict:
    """The cosine of the gradients of each two devices under the adapter that the engine has. A device that teaches
    nothing, or whose logprobs are not finite, is not in it. The engine is left as it was."""
    found: dict[str, Tensor] = {}
    for device_id, trajectories in devices.items():
        direction = _direction(engine, screen(list(trajectories), limits).trajectories, version=version, limits=limits)
        if direction is not None:
            found[device_id] = direction
    return cosines(found)


def cosines(directions: Mapping[str, Tensor]) -> Conflict:
    """The cosine of each two vectors (any shape, all alike); zero vectors have none."""
    unit = {
        name: flat / norm
        for name, direction in directions.items()
        if (norm := torch.linalg.vector_norm(flat := direction.detach().double().flatten())) > 0
    }
    pairs: Conflict = {}
    for one, other in combinations(sorted(unit), 2):
        pairs.setdefault(one, {})[other] = float(unit[one] @ unit[other])
    return pairs


def _direction(
    engine: TrainEngine, trajectories: Sequence[Trajectory], *, version: int, limits: Limits
) -> Tensor | None:
    """Minus the gradient of the policy term alone: what holds the policy back is the same for all devices."""
    samples = _compared_within(trajectories, engine, version=version, limits=limits)
    if not samples:
        return None
    loss = msgspec.structs.replace(engine.settings.loss, kl_beta=0.0, anchor=0.0)
    try:
        engine.forward_backward(samples, loss)
    except UnusableSamples:
        return None
    gradient = engine.take_gradient()
    return -torch.cat([gradient[name].float().flatten() for name in sorted(gradient)])


def _compared_within(
    trajectories: Sequence[Trajectory], engine: TrainEngine, *, version: int, limits: Limits
) -> list[Sample]:
    places, rewarded = rewards_of(trajectories, engine.settings, rules=limits.rules)
    if not rewarded:
        return []
    mean = sum(one.reward for one in rewarded) / len(rewarded)
    advantages = spread(trajectories, places, [one.reward - mean for one in rewarded], hinted=())
    samples = make_samples(trajectories, advantages, version=version)
    return [sample for sample in samples if any(sample.advantages)]

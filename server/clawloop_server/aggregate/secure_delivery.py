"""Between a round's tasks and secure sums: the terms of a task's sum, and the delta that a sum is to a round."""

from __future__ import annotations

import math

import numpy as np

from clawloop_server.aggregate.secure_unmasking import Total
from clawloop_shared.deltas import MAX_TRAJECTORIES, LearnTask, LoraDelta, delta_shapes
from clawloop_shared.errors import SumError
from clawloop_shared.flat import unflatten
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.secure import MAX_VALUES, Terms


def terms_of(task: LearnTask, shape: ModelShape, *, sum_id: str, min_members: int) -> Terms:
    """What a sum of what devices learn by this task is.

    Raises:
        SumError: it is no task for a sum, or what is learned is too large for one message.
        AdapterInvalid: a target is no linear layer of this model.
    """
    if not task.secure or not task.method.is_linear or not task.clip:
        raise SumError(f"task {task.task_id} is not for a secure sum: method {task.method}, clip {task.clip}")
    values = sum(math.prod(size) for size in _shapes(task, shape).values())
    if values > MAX_VALUES:
        raise SumError(
            f"task {task.task_id}: {values} values do not fit one message of a secure sum ({MAX_VALUES}); lower"
            " [federate] rank, or name fewer target modules"
        )
    return Terms(
        sum_id=sum_id,
        task_id=task.task_id,
        line_id=task.line_id,
        base_version=task.base_version,
        weights_sha256=task.weights_sha256,
        method=task.method,
        rank=task.rank,
        alpha=task.alpha,
        target_modules=task.target_modules,
        values=values,
        clip=task.clip,
        min_members=min_members,
    )


def deliver(terms: Terms, total: Total, shape: ModelShape) -> LoraDelta:
    """The mean of the members' deltas as one delta, for a round to join: learned from all their trajectories, with the
    noise that is left in the mean.

    The method is linear, so the mean of what was sent is what was sent for the mean of the updates. Its norm is cut to

        clip * (1 + sqrt(values) * usual_sigma / count)

    the most that a mean of updates within the clip has, and the norm that their noise is expected to have (of d normal
    numbers: sqrt(d)), if no member has more noise than the median of them: nobody's own word makes room for it.
    """
    mean = total.values / total.count
    most = terms.clip * (1.0 + math.sqrt(len(mean)) * total.usual_sigma / total.count)
    norm = float(np.linalg.norm(mean))
    if norm > most:
        mean *= most / norm
    return LoraDelta(
        task_id=terms.task_id,
        line_id=terms.line_id,
        base_version=terms.base_version,
        weights_sha256=terms.weights_sha256,
        method=terms.method,
        level=Level.PRIVATE_DELTAS,
        rank=terms.rank,
        alpha=terms.alpha,
        target_modules=terms.target_modules,
        weights=unflatten(mean, _shapes(terms, shape)),
        trajectories=min(total.trajectories, MAX_TRAJECTORIES),
        clip=terms.clip,
        sigma=total.sigma / total.count,
    )


def _shapes(asked: LearnTask | Terms, shape: ModelShape) -> dict[str, tuple[int, int]]:
    return delta_shapes(asked.target_modules, shape, rank=asked.rank, method=asked.method)

"""How much of a delta is of one trajectory: what moved nothing is not counted, and what moved most is held down."""

import math
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import NotLearnable
from clawloop_edge.learn.job import MASKED, Job
from clawloop_edge.learn.opening import open_job
from clawloop_edge.learn.shares import largest, most_share, scales, too_large
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Policy, Trajectory

from .home_jobs import LINE, a_job, finish

OPEN = LossSettings(kl_beta=0.0, opsm_delta=math.inf, veto=0.0)


def sampled_by(trajectory: Trajectory, version: int) -> Trajectory:
    steps = [msgspec.structs.replace(step, policy=Policy(LINE, version)) for step in trajectory.steps]
    return msgspec.structs.replace(trajectory, steps=steps)


def eight(model: Path, loss: LossSettings, *, version: int = 0, batch: int = 8) -> Job:
    job = a_job(model, count=8, batch_trajectories=batch, updates=2, loss=loss)
    return msgspec.structs.replace(job, task=msgspec.structs.replace(job.task, base_version=version))


def test_what_a_mask_leaves_out_is_not_counted_as_learned_from(random_model: Path) -> None:
    job = eight(random_model, msgspec.structs.replace(OPEN, max_staleness_versions=0), version=3)
    mixed = [sampled_by(t, 3 if number == 1 else 2) for number, t in enumerate(job.trajectories)]
    learned = finish(open_job(msgspec.structs.replace(job, trajectories=mixed), kept=b"", memory_bytes=0)).result()
    assert learned.trajectory_ids == ["t01"]
    assert learned.reward == 1.0
    assert learned.set_aside == {f"t{number:02}": MASKED for number in range(8) if number != 1}


def test_a_delta_of_one_trajectory_among_eight_is_none(random_model: Path) -> None:
    job = eight(random_model, msgspec.structs.replace(OPEN, max_staleness_versions=0), version=3)
    mixed = [sampled_by(t, 3 if number == 1 else 2) for number, t in enumerate(job.trajectories)]
    job = msgspec.structs.replace(job, trajectories=mixed, min_trajectories=8)
    with pytest.raises(NotLearnable, match=r"one trajectory is 1.00 of what was learned, and may be 0.25"):
        finish(open_job(job, kept=b"", memory_bytes=0)).result()


def test_none_of_eight_is_more_than_a_quarter_of_an_update_whatever_the_rewards(random_model: Path) -> None:
    job = eight(random_model, msgspec.structs.replace(OPEN, max_trajectory_share=1.0))
    lone = [
        msgspec.structs.replace(t, reward=-1.0 if n == 2 else 1.0, weight=1.0) for n, t in enumerate(job.trajectories)
    ]
    free = finish(open_job(msgspec.structs.replace(job, trajectories=lone), kept=b"", memory_bytes=0))
    held = msgspec.structs.replace(job, trajectories=lone, min_trajectories=8)
    bound = finish(open_job(held, kept=b"", memory_bytes=0))
    assert free.progress.shares["t02"] / 2 > 0.4
    assert bound.progress.shares["t02"] / 2 == pytest.approx(0.25)
    assert sorted(bound.result().trajectory_ids) == [f"t{number:02}" for number in range(8)]


def test_updates_of_one_trajectory_each_count_by_their_size(random_model: Path) -> None:
    job = eight(random_model, OPEN, batch=1)
    job = msgspec.structs.replace(job, task=msgspec.structs.replace(job.task, updates=2), min_trajectories=8)
    with pytest.raises(NotLearnable, match="one trajectory"):
        finish(open_job(job, kept=b"", memory_bytes=0)).result()


@pytest.mark.parametrize(
    "masses",
    [
        [1.0] * 8,
        [1e9, *[1.0] * 7],
        [1e9, 1e8, 1e7, *[1e-9] * 5],
        [5.0, 4.0, 0.0, 0.0, 3.0, 2.0],
        [1.0, 1.0, 9.0, 9.0, 9.0],
    ],
)
def test_scales_hold_each_to_its_part_and_touch_no_small_one(masses: list[float]) -> None:
    found = scales(masses, 0.25)
    cut = [mass * scale for mass, scale in zip(masses, found, strict=True)]
    assert max(cut) <= 0.25 * sum(cut) * (1 + 1e-9)
    assert all(0 < scale <= 1 for scale in found)
    assert all(scale == pytest.approx(1.0) for scale, one in zip(found, cut, strict=True) if one < 0.999 * max(cut))


def test_few_and_odd_masses_are_left_to_the_last_check() -> None:
    assert scales([3.0, 1.0], 0.25) == [1.0, 1.0]
    assert scales([math.nan, 1.0], 0.25) == [1.0, 1.0]
    assert scales([0.0, 0.0], 0.25) == [1.0, 1.0]
    assert scales([], 0.25) == []
    nine = scales([9.0, 1.0, 1.0], 0.25)
    assert 9.0 * nine[0] / (9.0 * nine[0] + 2.0) == pytest.approx(2 / 3)


def test_the_largest_part_is_by_updates_or_by_size() -> None:
    assert most_share(8) == most_share(1000) == 0.25
    assert (most_share(4), most_share(2), most_share(1)) == (0.5, 1.0, 1.0)
    assert largest({"a": 1.0, "b": 1.0}, {"a": 9.0, "b": 1.0}) == pytest.approx(0.9)
    assert largest({}, {}) == 0.0
    assert too_large(0.26, 0.25)
    assert not too_large(0.25 * (1 + 1e-6), 0.25)

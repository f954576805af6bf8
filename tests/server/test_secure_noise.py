"""A member's own word of how much noise it has makes no room for it in the mean."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from clawloop_server.aggregate.secure import MOST_SIGMA, SecureSum, Status
from clawloop_server.aggregate.secure_delivery import deliver
from clawloop_shared.flat import flatten, unflatten
from clawloop_shared.secure import Phase

from .secure_fleet import SHAPE, SIZES, TERMS, VALUES, Device, Play

USUAL = 0.5


def test_who_says_that_it_has_far_more_noise_is_left_out_and_named() -> None:
    play = Play(7)
    play.devices["d03"] = Device(3, sigma=1000.0)
    done = play.run()
    play.is_right()
    assert sorted(done.members) == ["d00", "d01", "d02", "d04", "d05", "d06"]
    assert done.state.out == {"d03": "its sigma 1000 is over 16 times the usual 0.5"}
    assert done.culprits == ["d03"], "and not asked into the next one"


def test_it_does_not_count_as_one_of_those_that_are_enough() -> None:
    play = Play(5)
    play.devices["d00"] = Device(0, sigma=1000.0)
    play.step()
    assert play.sum.state.phase is Phase.ADVERTISE
    assert play.sum.state.loud == ["d00"]


@pytest.mark.parametrize(("asked", "stays"), [(0.0, False), (USUAL, False), (10.0, True)])
def test_the_usual_is_the_larger_of_the_task_s_noise_and_that_of_half_of_them(asked: float, *, stays: bool) -> None:
    play = Play(6)
    keys = dict(play.sum.state.devices)
    play.sum = SecureSum.begin(TERMS, keys, now_ms=0, phase_ms=1000, patience_ms=10_000, sigma=asked)
    play.devices["d05"] = Device(5, sigma=1.01 * MOST_SIGMA * USUAL)
    play.step()
    assert ("d05" in play.sum.state.out) is not stays


def test_where_all_have_much_noise_none_is_left_out() -> None:
    play = Play(6, sigma=20.0)
    assert play.run().state.status is Status.DONE
    assert len(play.sum.members) == 6


def test_the_mean_is_cut_to_the_clip_and_the_noise_that_is_to_be_expected() -> None:
    play, liar = Play(7), Device(0, sigma=10 * USUAL)
    pushed = np.zeros(VALUES)
    pushed[:9] = 30.0
    liar.delta = msgspec.structs.replace(liar.delta, weights=unflatten(pushed, SIZES))
    play.devices["d00"] = liar
    result = play.run().result
    assert result is not None, "its own noise would make as much"
    mean = flatten(deliver(TERMS, result, SHAPE).weights)
    most = 1.0 + np.sqrt(VALUES) * USUAL / np.sqrt(7)
    assert np.linalg.norm(result.values / 7) > 4 * most
    assert np.linalg.norm(mean) == pytest.approx(most, rel=1e-5)
    assert np.allclose(mean / most, result.values / np.linalg.norm(result.values), atol=1e-5), "its direction stays"


def test_a_mean_within_that_is_left_as_it_is() -> None:
    result = Play(7).run().result
    assert result is not None
    assert np.allclose(flatten(deliver(TERMS, result, SHAPE).weights), result.values / 7, atol=1e-6)

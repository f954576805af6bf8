"""A sum of whole numbers modulo 2^32 is the sum of the values, within a bound that is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clawloop_shared.errors import SumError
from clawloop_shared.fixed_point import MAX_SUM, error_of, from_ring, most, step, to_ring

BOUNDS = st.floats(1e-6, 1e6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), BOUNDS, st.data())
def test_the_sum_is_right_within_the_bound(members: int, bound: float, data: st.DataObject) -> None:
    within = st.floats(-np.float32(bound).item() / 2, np.float32(bound).item() / 2, width=32)
    values = data.draw(arrays(np.float32, (members, 7), elements=within))
    total = np.zeros(7, np.uint32)
    for row in values:
        total += to_ring(row, bound, members=members)
    exact = values.astype(np.float64).sum(axis=0)
    assert np.abs(from_ring(total, bound, members=members) - exact).max() <= error_of(members, bound, members=members)


@pytest.mark.parametrize("members", [1, 2, 3, 5, 100, 128, 1 << 16])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_sum_of_extremes_wraps(members: int, sign: float) -> None:
    """Values far beyond the bound are cut to it; all members together stay within a signed number of 32 bits."""
    extreme = to_ring(np.array([sign * 3e38], np.float32), 1.0, members=members)
    assert abs(int(extreme.view(np.int32)[0])) == most(members)
    total = extreme * np.uint32(members)
    assert abs(int(total.view(np.int32)[0])) == members * most(members) <= MAX_SUM
    assert from_ring(total, 1.0, members=members)[0] == pytest.approx(sign * members)


def test_a_step_is_what_is_told_apart() -> None:
    width = step(8.0, members=100)
    assert width == 8.0 / (MAX_SUM // 100)
    assert np.array_equal(
        to_ring(np.array([0.0, width, 1.4 * width, -width]), 8.0, members=100).view(np.int32), [0, 1, 1, -1]
    )


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(SumError, match="not finite"):
        to_ring(np.array([0.0, wrong], np.float32), 1.0, members=3)


def test_impossible_sums_are_refused() -> None:
    for members in (0, (1 << 16) + 1):
        with pytest.raises(ValueError, match="members"):
            most(members)
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bounded"):
            step(bound, members=3)

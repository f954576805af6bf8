"""Numbers of a device as whole numbers modulo 2^32, whose sum over all members is theirs and cannot wrap.

With n members and values within `bound`, a value x becomes q = round(x * Q / bound) with Q = floor((2^31 - 1) / n), cut
to [-Q, Q]; what is beyond the bound is cut to it. The sum of n of them lies within n * Q <= 2^31 - 1, so a sum modulo
2^32, read as a signed number, is the sum itself. Each device is at most half a step, bound / (2 Q), beside its value,
so a sum of k of them at most k / 2 steps: with 100 members 2.3e-8 of the bound each.
"""

import numpy as np
from numpy.typing import NDArray

from clawloop_shared.errors import SumError

Ring = NDArray[np.uint32]
"""whole numbers modulo 2^32: numpy's additions and subtractions wrap by themselves"""
MAX_SUM = (1 << 31) - 1


def most(members: int) -> int:
    """Q: the largest whole number that one of `members` may give.

    Raises:
        ValueError: there is no member, or so many that nothing is left of a value.
    """
    if not 1 <= members <= 1 << 16:
        raise ValueError(f"a sum of {members} members; at least 1 and at most {1 << 16} are possible")
    return MAX_SUM // members


def step(bound: float, *, members: int) -> float:
    """The difference of two values that are just told apart."""
    if not 0 < bound < float("inf"):
        raise ValueError(f"values cannot be bounded by {bound}")
    return bound / most(members)


def to_ring(values: NDArray[np.float32], bound: float, *, members: int) -> Ring:
    """The values (any shape) of one of `members` as whole numbers modulo 2^32; what is beyond `bound` is cut to it.

    Raises:
        SumError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise SumError("a value that is not finite cannot be summed")
    width = step(bound, members=members)
    whole = np.rint(values / np.float64(width))
    limit = float(most(members))
    return np.clip(whole, -limit, limit, out=whole).astype(np.int32).view(np.uint32)


def from_ring(total: Ring, bound: float, *, members: int) -> NDArray[np.float64]:
    """The sum of what up to `members` members gave to `to_ring`, but for `error_of`."""
    return total.view(np.int32) * np.float64(step(bound, members=members))


def error_of(count: int, bound: float, *, members: int) -> float:
    """How far the sum of `count` members' values is at most from that of the values themselves, each number of it.

    Half a step for each, and what float64 rounds: a number of at most 2^31 steps is right to 2^-52 of itself, and so
    is each value that was divided.
    """
    return step(bound, members=members) * (count / 2 + MAX_SUM * 2.0**-50)

"""Sharing a secret of 32 bytes so that any `threshold` shares give it back and fewer tell nothing (Shamir 1979).

A polynomial over the integers modulo the smallest prime above 2^256, whose value at 0 is the secret; share number x is
its value at x, x = 1, 2, ... All shares have one length. Python's integers are not constant in time: that matters to
somebody who can time this process, which then can read its memory as well.
"""

import secrets
from collections.abc import Mapping, Sequence

from clawloop_shared.errors import SumError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, *, threshold: int, shares: int) -> list[bytes]:
    """`shares` shares of a secret; the first is that of x = 1. Each call draws another polynomial.

    Raises:
        ValueError: the secret has not 32 bytes, or `threshold` is not in 1..shares.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= shares:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be shared {threshold} of {shares}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return [_value(coefficients, int.from_bytes(secret), x=x).to_bytes(SHARE_BYTES) for x in range(1, shares + 1)]


def _value(coefficients: list[int], constant: int, *, x: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value + coefficient) * x % PRIME
    return (value + constant) % PRIME


class Combiner:
    """Puts secrets together from the shares of the same holders: their weights are computed once."""

    def __init__(self, holders: Sequence[int]) -> None:
        """`holders`: the x of the shares, as many as the threshold.

        Raises:
            SumError: there is none, one occurs twice, or is not above 0.
        """
        if not holders or len(set(holders)) != len(holders) or min(holders) < 1:
            raise SumError(f"shares of holders {list(holders)} cannot be put together: each must be another, above 0")
        self.weights = {x: _weight(x, holders) for x in holders}
        """what the share of each holder is multiplied with"""

    def combine(self, shares: Mapping[int, bytes]) -> bytes:
        """The secret whose shares these are, by the x of each; shares of other holders are not looked at.

        Raises:
            SumError: a share is missing or is none, or they are not of one secret of 32 bytes (not always seen).
        """
        secret = 0
        for x, weight in self.weights.items():
            share = shares.get(x, b"")
            if len(share) != SHARE_BYTES or int.from_bytes(share) >= PRIME:
                raise SumError(f"the share of holder {x} is missing or is none")
            secret = (secret + int.from_bytes(share) * weight) % PRIME
        if secret >> 8 * SECRET_BYTES:
            raise SumError(f"the shares of holders {sorted(self.weights)} are not of one secret")
        return secret.to_bytes(SECRET_BYTES)


def _weight(x: int, holders: Sequence[int]) -> int:
    """Lagrange's polynomial of x at 0."""
    above = below = 1
    for other in holders:
        if other != x:
            above = above * other % PRIME
            below = below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME

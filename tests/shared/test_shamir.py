"""Enough shares give a secret back, and fewer tell nothing."""

import secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_shared.errors import SumError
from clawloop_shared.shamir import PRIME, SHARE_BYTES, Combiner, split


def test_the_modulus_is_the_smallest_prime_above_all_secrets() -> None:
    def is_prime(number: int) -> bool:
        """Miller and Rabin, with the first 40 primes as bases."""
        bases = [p for p in range(2, 174) if all(p % q for q in range(2, p))]
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in bases:
            power = pow(base, odd, number)
            if power not in (1, number - 1) and all(
                (power := pow(power, 2, number)) != number - 1 for _ in range(twos - 1)
            ):
                return False
        return True

    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_of_the_shares_gives_the_secret(secret: bytes, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 24))
    threshold = data.draw(st.integers(1, count))
    shares = dict(enumerate(split(secret, threshold=threshold, shares=count), start=1))
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    holders = data.draw(st.permutations(list(shares)))[:threshold]
    assert Combiner(holders).combine(shares) == secret


def test_a_share_too_few_fits_every_secret() -> None:
    """Whatever the secret, there is one last share that makes the others be of it: so they tell nothing."""
    shares = dict(enumerate(split(secrets.token_bytes(32), threshold=3, shares=5), start=1))
    combiner = Combiner([1, 2, 5])
    for wanted in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        at_zero = {x: shares.get(x, bytes(SHARE_BYTES)) for x in (1, 2)} | {5: bytes(SHARE_BYTES)}
        known = sum(int.from_bytes(at_zero[x]) * combiner.weights[x] for x in (1, 2)) % PRIME
        last = (int.from_bytes(wanted) - known) * pow(combiner.weights[5], -1, PRIME) % PRIME
        assert combiner.combine(at_zero | {5: last.to_bytes(SHARE_BYTES)}) == wanted


def test_two_sharings_of_one_secret_have_nothing_in_common() -> None:
    one, other = (split(bytes(32), threshold=2, shares=8) for _ in range(2))
    assert not set(one) & set(other)


def test_what_is_no_share_is_refused() -> None:
    shares = dict(enumerate(split(b"s" * 32, threshold=2, shares=3), start=1))
    for wrong in (b"", b"short", PRIME.to_bytes(33), b"\xff" * 33):
        with pytest.raises(SumError, match="holder 2"):
            Combiner([1, 2]).combine(shares | {2: wrong})
    with pytest.raises(SumError, match="holder 3"):
        Combiner([1, 3]).combine({1: shares[1]})
    for holders in ([], [1, 1], [0, 1], [-1, 2]):
        with pytest.raises(SumError, match="put together"):
            Combiner(holders)
    for size, threshold, count in ((31, 2, 3), (32, 4, 3), (32, 0, 3)):
        with pytest.raises(ValueError, match="cannot be shared"):
            split(bytes(size), threshold=threshold, shares=count)


def test_shares_of_another_secret_do_not_pass_where_it_can_be_seen() -> None:
    """A wrong share gives a number at random below the prime; of these 297 in 2^256 are seen here, the others by what
    the secret must be."""
    over = (2**256).to_bytes(33)
    with pytest.raises(SumError, match="not of one secret"):
        Combiner([1]).combine({1: over})

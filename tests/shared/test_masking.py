"""Masks vanish from a sum, hide what is under them, and nobody else can make them."""

import ast
import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_shared import masking
from clawloop_shared.errors import SumError

PACKAGES = [Path(__file__).parents[2] / name for name in ("edge", "server", "shared")]


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_masks_of_pairs_vanish_from_the_sum(members: int, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**32, (members, length), dtype=np.uint32)
    plus, minus = ([list[bytes]() for _ in range(members)] for _ in range(2))
    for one, other in combinations(range(members), 2):
        plus[one].append(key(f"{one}-{other}"))
        minus[other].append(key(f"{one}-{other}"))
    masked = [masking.add_masks(row, plus=p, minus=m) for row, p, m in zip(values, plus, minus, strict=True)]
    assert np.array_equal(sum(masked, np.zeros(length, np.uint32)), values.sum(axis=0, dtype=np.uint32))


def test_a_mask_is_the_keystream_of_aes_whatever_the_length() -> None:
    for length in (1, 3, (1 << 18) - 1, 1 << 18, (1 << 18) + 5, 3 * (1 << 18) + 1):
        stream = Cipher(algorithms.AES256(key("k")), modes.CTR(bytes(16))).encryptor().update(bytes(4 * length))
        zeros = np.zeros(length, np.uint32)
        assert masking.add_masks(zeros, plus=[key("k")]).tobytes() == stream
        assert not zeros.any(), "the values themselves stay as they are"


def test_a_masked_vector_is_noise() -> None:
    """What the server sees of one member: its bytes are uniform, and have nothing to do with the values."""
    rng = np.random.default_rng(0)
    plain = (rng.normal(size=200_000) * 1000).astype(np.int32).view(np.uint32)
    masked = masking.add_masks(plain, plus=[key("a"), key("b")], minus=[key("c")])
    for each in (masked, masked - plain):
        counts = np.bincount(np.frombuffer(each.tobytes(), np.uint8), minlength=256)
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 160 < chi_square < 360, "255 degrees of freedom: mean 255, standard deviation 22.6"
    correlation = np.corrcoef(plain.view(np.int32), masked.view(np.int32))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(plain))
    counts = np.bincount(np.frombuffer(plain.tobytes(), np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() > 1e5, "the same test finds the plain values"


def test_two_parties_derive_one_key_and_anything_else_another() -> None:
    one, other, third = (masking.new_secret() for _ in range(3))
    keys = masking.public_of(one), masking.public_of(other)
    agreed = masking.agree(one, keys[1])
    assert agreed == masking.agree(other, keys[0]) != masking.agree(third, keys[0])

    def derived(secret: bytes = agreed, purpose: str = "p", sum_id: str = "s", roster: bytes = b"r", parties=keys):  # type: ignore[no-untyped-def]
        return masking.derive(secret, purpose=purpose, sum_id=sum_id, roster=roster, parties=parties)

    others = [derived(purpose="q"), derived(sum_id="t"), derived(roster=b"q"), derived(parties=keys[::-1])]
    others += [derived(purpose="ps", sum_id=""), derived(secret=bytes(32)), derived(parties=())]
    assert len({derived(), *others}) == 1 + len(others)
    assert derived() == derived()


@pytest.mark.parametrize("low_order", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_agrees_on_nothing_secret_is_refused(low_order: bytes) -> None:
    with pytest.raises(SumError, match="nothing can be agreed"):
        masking.agree(masking.new_secret(), low_order)


def test_what_is_sealed_opens_only_as_it_was_meant() -> None:
    sealed = masking.seal(key("k"), b"shares", bound_to=b"1 to 2")
    assert masking.unseal(key("k"), sealed, bound_to=b"1 to 2") == b"shares"
    assert masking.seal(key("k"), b"shares", bound_to=b"1 to 2") != sealed
    for secret, body, bound_to in (
        (key("l"), sealed, b"1 to 2"),
        (key("k"), sealed, b"2 to 1"),
        (key("k"), sealed[:-1], b"1 to 2"),
        (key("k"), sealed[:-1] + bytes([sealed[-1] ^ 1]), b"1 to 2"),
        (key("k"), b"", b"1 to 2"),
    ):
        with pytest.raises(SumError, match="do not open"):
            masking.unseal(secret, body, bound_to=bound_to)


def test_flowers_masks_are_imported_nowhere() -> None:
    """They are drawn from 32 bits. (https://github.com/flwrlabs/flower/issues/7522)"""
    found = []
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [f"{path}: {name}" for name in names if name.startswith("flwr") and "secagg" in name.lower()]
            found += [f"{path}: {name}" for name in names if "secure_aggregation" in name]
    assert not found

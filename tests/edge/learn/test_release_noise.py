"""The noise of a delta: its size, shape and source, and the norm of what it hides. Fixed keys, so no test flakes."""

import hashlib
import math
import os

import numpy as np
import pytest
from numpy.typing import NDArray

from clawloop_edge.learn import noise

KEY = hashlib.sha256(b"a key that no device has").digest()
ZEROS = {"a": np.zeros((300, 400), np.float32), "b": np.zeros((40, 2000), np.float32)}


def values(found: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([each.ravel() for each in found.values()]).astype(np.float64)


@pytest.mark.parametrize(("clip", "sigma"), [(1.0, 10.6), (0.25, 0.05), (100.0, 3.0), (1e-4, 700.0)])
def test_noise_is_gaussian_of_the_stated_size(clip: float, sigma: float) -> None:
    found = values(noise.hidden(ZEROS, clip=clip, sigma=sigma, key=KEY)) / (clip * sigma)
    count = len(found)
    assert count == 200_000
    assert abs(found.mean()) < 5 / math.sqrt(count)
    assert abs(found.std() - 1) < 5 / math.sqrt(2 * count)
    # Kolmogorov and Smirnov: the greatest distance from the normal law, beyond this once in ten million draws.
    steps = np.arange(1, count + 1) / count
    law = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in np.sort(found)])
    assert np.abs(steps - law).max() < 2.9 / math.sqrt(count)
    assert abs((found**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(count)


def test_what_is_hidden_is_cut_to_the_clip_over_all_factors_together() -> None:
    rng = np.random.default_rng(1)
    factors = {"a": rng.normal(0, 3, (30, 4)).astype(np.float32), "b": rng.normal(0, 1, (5, 50)).astype(np.float32)}
    cut = noise.clipped(factors, 2.0)
    assert noise.norm_of(cut) == pytest.approx(2.0, rel=1e-12)
    ratio = cut["a"] / factors["a"]
    assert np.allclose(ratio, ratio.flat[0])
    assert np.allclose(cut["b"] / factors["b"], ratio.flat[0]), "one factor for all, so the direction stays"
    small = {name: each / np.float32(1000) for name, each in factors.items()}
    assert noise.norm_of(noise.clipped(small, 2.0)) == pytest.approx(noise.norm_of(small), rel=1e-12)
    noised = noise.hidden(factors, clip=2.0, sigma=1.0, key=KEY)
    bare = noise.hidden({name: np.zeros_like(each) for name, each in factors.items()}, clip=2.0, sigma=1.0, key=KEY)
    for name in factors:
        assert np.abs((noised[name] - bare[name]) - cut[name]).max() <= 2.0 * noise.GRID


def test_what_leaves_lies_on_a_grid_that_does_not_tell_what_was_hidden() -> None:
    deviation = 0.3 * 0.7
    grid = 2.0 ** math.floor(math.log2(deviation * noise.GRID))
    for hidden in (np.float32(0.0), np.float32(0.1), np.float32(1 / 3)):
        found = noise.hidden({"a": np.full((50, 50), hidden)}, clip=0.3, sigma=0.7, key=KEY)["a"].astype(np.float64)
        assert np.array_equal(found / grid, np.rint(found / grid))
    assert grid <= deviation / 1000


def test_each_key_gives_other_noise_and_the_same_key_the_same() -> None:
    one, same, other = (noise.hidden(ZEROS, clip=1.0, sigma=1.0, key=key) for key in (KEY, KEY, os.urandom(32)))
    assert all(np.array_equal(one[name], same[name]) for name in ZEROS)
    assert abs(np.corrcoef(values(one), values(other))[0, 1]) < 0.02
    assert not np.array_equal(one["a"].ravel()[:100], one["b"].ravel()[:100])


@pytest.mark.parametrize(
    ("clip", "sigma", "key"), [(0.0, 1.0, KEY), (1.0, 0.0, KEY), (1.0, math.inf, KEY), (1, 1, b"")]
)
def test_what_would_hide_nothing_is_refused(clip: float, sigma: float, key: bytes) -> None:
    with pytest.raises(ValueError, match="hides nothing"):
        noise.hidden(ZEROS, clip=clip, sigma=sigma, key=key)

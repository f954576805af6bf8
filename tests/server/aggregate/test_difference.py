"""How far two updates are apart, by their factors, is how far the matrices are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.aggregate.difference import differences
from clawloop_server.aggregate.updates import Factors

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


def update(seed: int, ranks: tuple[int, ...], *, size: float = 1.0) -> dict[str, Factors]:
    made = torch.Generator().manual_seed(seed)
    return {
        path: Factors(size * torch.randn(12, rank, generator=made), torch.randn(rank, 9, generator=made))
        for path, rank in zip(PATHS, ranks, strict=True)
        if rank
    }


def dense(update: dict[str, Factors]) -> torch.Tensor:
    zero = torch.zeros(12, 9, dtype=torch.float64)
    return torch.stack([update[p].b.double() @ update[p].a.double() if p in update else zero for p in PATHS])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_norms_change_and_cosine_are_those_of_the_matrices(seed: int, ranks: list[int], size: float) -> None:
    a, b = update(seed, tuple(ranks[:3])), update(seed + 1, tuple(ranks[3:]), size=size)
    overall, layers = differences(a, b)
    whole_a, whole_b = dense(a), dense(b)
    by_path = {layer.layer: layer for layer in layers}
    assert by_path.keys() == a.keys() | b.keys()
    for found, x, y in [(overall, whole_a, whole_b)] + [
        (by_path[path], whole_a[n], whole_b[n]) for n, path in enumerate(PATHS) if path in by_path
    ]:
        assert found.norm_a == pytest.approx(float(x.norm()), rel=1e-6)
        assert found.norm_b == pytest.approx(float(y.norm()), rel=1e-6)
        assert found.change == pytest.approx(float((y - x).norm()), rel=1e-6)
        if x.any() and y.any():
            assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
            assert found.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
        else:
            assert math.isnan(found.cosine)
            assert found.relative == (math.inf if y.any() else 1.0 if x.any() else 0.0)


def test_equal_updates_are_nothing_apart_and_opposite_ones_twice_their_norm() -> None:
    a = update(1, (2, 3, 4))
    overall, layers = differences(a, {path: Factors(f.b.clone(), f.a.clone()) for path, f in a.items()})
    assert [overall.change, *(layer.change for layer in layers)] == [0.0] * 4
    assert overall.cosine == pytest.approx(1.0)
    opposite, _ = differences(a, {path: Factors(-f.b, f.a) for path, f in a.items()})
    assert opposite.relative == pytest.approx(2.0)
    assert opposite.cosine == pytest.approx(-1.0)


def test_what_is_nearly_equal_is_told_apart_from_rounding() -> None:
    a = update(1, (2, 3, 4))
    b = {path: Factors(f.b * (1 + 1e-5), f.a) for path, f in a.items()}
    wanted = float((dense(b) - dense(a)).norm() / dense(a).norm())
    assert differences(a, b)[0].relative == pytest.approx(wanted, rel=1e-6)

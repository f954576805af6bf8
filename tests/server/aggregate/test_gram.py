"""Inner products and the error of averaged factors, from factors alone, are those of dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.aggregate.gram import factor_mean_error, inner_products, layer_inner_products, weighted_norm
from clawloop_server.aggregate.updates import Factors

from .aggregates import dense, factors

ranks = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(ranks, st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_inner_products_are_those_of_the_dense_matrices(ranks: list[int], outputs: int, inputs: int, seed: int) -> None:
    layer = [factors(seed + n, outputs, inputs, rank) for n, rank in enumerate(ranks)]
    flat = torch.stack([dense(pair).flatten() for pair in layer])
    torch.testing.assert_close(layer_inner_products(layer), flat @ flat.T, rtol=1e-9, atol=1e-9)


def test_inner_products_go_over_all_layers_and_a_missing_one_is_zero() -> None:
    x = {"q": factors(0, 8, 6, 2), "v": factors(1, 4, 6, 3)}
    y = {"q": factors(2, 8, 6, 1)}
    gram = inner_products([x, y])
    both = float((dense(x["q"]) * dense(y["q"])).sum())
    own = float(dense(x["q"]).norm() ** 2 + dense(x["v"]).norm() ** 2)
    torch.testing.assert_close(gram, torch.tensor([[own, both], [both, float(dense(y["q"]).norm() ** 2)]]).double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_the_error_of_averaged_factors_is_the_dense_one(count: int, rank: int, seed: int) -> None:
    layer = [factors(seed + n, 15, 11, rank) for n in range(count)]
    weights = [float(n + 1) for n in range(count)]
    found = factor_mean_error(list(zip(weights, layer, strict=True)), layer_inner_products(layer))
    parts = [weight / sum(weights) for weight in weights]
    exact = sum((w * dense(p) for w, p in zip(parts, layer, strict=True)), torch.zeros(15, 11).double())
    b = sum((w * p.b.double() for w, p in zip(parts, layer, strict=True)), torch.zeros(15, rank).double())
    a = sum((w * p.a.double() for w, p in zip(parts, layer, strict=True)), torch.zeros(rank, 11).double())
    assert found == pytest.approx(float((exact - b @ a).norm()), abs=1e-6 * float(exact.norm()))
    covariance = sum(
        (w * (p.b.double() - b) @ (p.a.double() - a) for w, p in zip(parts, layer, strict=True)),
        torch.zeros(15, 11).double(),
    )
    torch.testing.assert_close(exact - b @ a, covariance)
    assert weighted_norm(layer_inner_products(layer), parts) == pytest.approx(float(exact.norm()))


def test_averaged_factors_are_exact_where_one_factor_is_shared() -> None:
    first = factors(0, 9, 7, 3)
    layer = [first, *(Factors(factors(n, 9, 7, 3).b, first.a) for n in range(1, 4))]
    found = factor_mean_error([(1.0, pair) for pair in layer], layer_inner_products(layer))
    assert found < 1e-7 * float(sum(dense(pair).norm() for pair in layer))

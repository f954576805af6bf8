"""Stacks are exact, and cutting them loses what Eckart and Young say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.aggregate import stack as stacking
from clawloop_server.aggregate.stack import stacked, truncated
from clawloop_server.aggregate.updates import Factors

from .aggregates import dense, factors

ranks = st.lists(st.integers(1, 6), min_size=1, max_size=7)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=40, deadline=None)
@given(ranks, sizes, st.integers(0, 1000))
def test_a_stack_is_the_dense_sum_whatever_the_ranks(ranks: list[int], size: tuple[int, int], seed: int) -> None:
    terms = [(1.0 / (n + 1), factors(seed + n, *size, rank)) for n, rank in enumerate(ranks)]
    whole = sum(weight * dense(pair) for weight, pair in terms)
    stack = stacked(terms)
    assert stack.rank == sum(ranks)
    torch.testing.assert_close(dense(stack), whole, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(ranks, sizes, st.integers(1, 8), st.integers(0, 1000))
def test_what_a_cut_loses_is_the_tail_of_the_singular_values(
    ranks: list[int], size: tuple[int, int], rank: int, seed: int
) -> None:
    stack = stacked([(1.0, factors(seed + n, *size, each)) for n, each in enumerate(ranks)])
    cut = truncated(stack, rank)
    tail = float(torch.linalg.svdvals(dense(stack))[rank:].norm())
    assert cut.lost == pytest.approx(tail, abs=1e-9 * float(dense(stack).norm()) + 1e-12)
    assert float((dense(stack) - dense(cut.factors)).norm()) == pytest.approx(tail, abs=1e-6)
    assert cut.factors.rank <= rank


def test_the_factors_of_a_cut_are_balanced_and_their_signs_are_determined() -> None:
    stack = stacked([(1.0, factors(n, 30, 20, 4)) for n in range(3)])
    cut = truncated(stack, 5).factors
    torch.testing.assert_close(cut.b.T @ cut.b, cut.a @ cut.a.T)
    turned = stacked([(1.0, Factors(-pair.b, -pair.a)) for pair in (factors(n, 30, 20, 4) for n in range(3))])
    torch.testing.assert_close(truncated(turned, 5).factors.b, cut.b)
    assert bool((cut.b.gather(0, cut.b.abs().argmax(dim=0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("shared", ["a", "b"])
def test_updates_that_share_a_factor_are_added_in_the_other_and_need_no_more_rank(shared: str) -> None:
    first = factors(0, 12, 9, 3)
    others = [factors(n, 12, 9, 3) for n in range(1, 5)]
    pairs = [first, *(Factors(p.b, first.a) if shared == "a" else Factors(first.b, p.a) for p in others)]
    terms = [(0.1 * (n + 1), pair) for n, pair in enumerate(pairs)]
    stack = stacked(terms)
    assert stack.rank == 3
    torch.testing.assert_close(dense(stack), sum((w * dense(p) for w, p in terms), torch.zeros(12, 9).double()))


def test_an_update_that_shares_each_factor_with_another_one_is_added_once() -> None:
    x, y = factors(0, 6, 5, 2), factors(1, 6, 5, 2)
    terms = [(1.0, x), (2.0, Factors(y.b, x.a)), (3.0, Factors(x.b, y.a)), (4.0, Factors(y.b, x.a)), (0.0, y)]
    torch.testing.assert_close(dense(stacked(terms)), sum((w * dense(p) for w, p in terms), torch.zeros(6, 5).double()))


def test_a_stack_too_wide_for_one_step_is_folded_and_loses_hardly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "EXACT_COLUMNS", 64)
    common = factors(99, 100, 80, 4, scale=3.0)
    members = [stacked([(1.0, common), (1.0, factors(n, 100, 80, 4))]) for n in range(40)]
    stack = stacked([(1 / 40, member) for member in members])
    assert stack.rank == 320
    cut = truncated(stack, 4)
    values = torch.linalg.svdvals(dense(stack))
    least = float(values[4:].norm())
    assert cut.lost == pytest.approx(float((dense(stack) - dense(cut.factors)).norm()), rel=1e-9)
    assert least <= cut.lost < 1.01 * least

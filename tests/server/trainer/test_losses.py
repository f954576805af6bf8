"""The loss against numbers worked out by hand, and against a plain reference written from the formula."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer.losses import LossInputs, Sums, policy_loss
from clawloop_server.trainer.settings import LossSettings

PLAIN = LossSettings(kl_beta=0.0, opsm_delta=math.inf, veto=0.0, max_trajectory_share=1.0)


def inputs(
    logprobs: list[float],
    behaviour: list[float],
    advantages: list[float],
    *,
    units: list[int] | None = None,
    weights: tuple[float, ...] = (1.0,),
    gaps: tuple[int, ...] = (0, 0),
    reference: list[float] | None = None,
    normalizer: float | None = None,
) -> LossInputs:
    unit = torch.tensor(units or [0] * len(logprobs))
    real = torch.float64
    return LossInputs(
        logprobs_P=torch.tensor(logprobs, dtype=real, requires_grad=True),
        behaviour_P=torch.tensor(behaviour, dtype=real),
        advantage_P=torch.tensor(advantages, dtype=real),
        unit_P=unit,
        weight_U=torch.tensor(weights, dtype=real),
        gap_U=torch.tensor(gaps[: len(weights)]),
        trajectory_tokens_U=torch.bincount(unit, minlength=len(weights)).to(real),
        normalizer=normalizer or float(len(logprobs)),
        reference_P=None if reference is None else torch.tensor(reference, dtype=real),
    )


def value(given_inputs: LossInputs, settings: LossSettings) -> float:
    return float(policy_loss(given_inputs, settings)[0].detach())


def test_on_policy_it_is_the_plain_policy_gradient() -> None:
    given_inputs = inputs([-1.0, -2.0], [-1.0, -2.0], [0.5, -1.0])
    loss, sums = policy_loss(given_inputs, PLAIN)
    assert float(loss.detach()) == pytest.approx((0.5 * 1.0 - 1.0 * 2.0) / 2)
    torch.autograd.backward(loss)
    assert given_inputs.logprobs_P.grad is not None
    assert given_inputs.logprobs_P.grad.tolist() == pytest.approx([-0.25, 0.5])
    assert sums.metrics()["ess"] == pytest.approx(1.0)


def test_importance_weights_are_cut_at_the_cap() -> None:
    # ratios e^1 (cut to 2) and e^-1
    given_inputs = inputs([-1.0, -3.0], [-2.0, -2.0], [1.0, 1.0])
    assert value(given_inputs, PLAIN) == pytest.approx((2.0 * 1.0 + math.exp(-1) * 3.0) / 2)


def test_the_distance_to_the_base_is_k2_with_the_importance_weight() -> None:
    settings = LossSettings(kl_beta=0.1, opsm_delta=math.inf, max_trajectory_share=1.0)
    given_inputs = inputs([-1.0], [-1.5], [0.0], reference=[-1.4])
    assert value(given_inputs, settings) == pytest.approx(0.1 * math.exp(0.5) * 0.5 * 0.4**2)


def test_the_anchor_pulls_towards_the_policy_that_sampled() -> None:
    settings = LossSettings(kl_beta=0.0, anchor=0.2, max_trajectory_share=1.0)
    given_inputs = inputs([-1.0], [-1.3], [0.0])
    loss, _ = policy_loss(given_inputs, settings)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0.2 * 0.5 * 0.3**2)
    assert given_inputs.logprobs_P.grad is not None
    assert given_inputs.logprobs_P.grad.tolist() == pytest.approx([0.2 * 0.3])


def test_what_is_masked_does_not_scale_up_the_rest() -> None:
    settings = LossSettings(kl_beta=0.0, max_staleness_versions=3, max_trajectory_share=1.0)
    given_inputs = inputs([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], units=[0, 1], weights=(1.0, 1.0), gaps=(0, 4))
    assert value(given_inputs, settings) == pytest.approx(1.0 / 2)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (LossSettings(max_staleness_versions=1), "stale"),
        (LossSettings(veto=0.3), "veto"),
        (LossSettings(geometric_low=0.9), "geometric"),
        (LossSettings(geometric_low=0.0, geometric_high=1.0001, veto=0.0), ""),
        (LossSettings(opsm_delta=0.1), "opsm"),
        (LossSettings(trust_region=0.05), "trust"),
    ],
)
def test_each_mask_takes_out_the_unit_that_it_is_for(settings: LossSettings, name: str) -> None:
    # Unit 1 is stale by 2 versions, has a ratio of e^-2, a geometric mean of e^-1, and fell where it was to fall.
    given_inputs = inputs(
        [-1.0, -1.0, -3.0, -1.0],
        [-1.0, -1.0, -1.0, -1.0],
        [1.0, 1.0, -1.0, -1.0],
        units=[0, 0, 1, 1],
        weights=(1.0, 1.0),
        gaps=(0, 2),
    )
    _, sums = policy_loss(given_inputs, settings)
    shares = {mask: getattr(sums, f"kept_{mask}") / 4 for mask in ("stale", "veto", "geometric", "opsm", "trust")}
    left = 0.75 if name == "trust" else 0.5
    expected = {mask: left if mask == name else shares[mask] for mask in shares}
    assert shares == expected
    if name:
        assert shares[name] == left


def test_opsm_stops_only_negative_lessons_and_leaves_the_pull_to_the_base() -> None:
    settings = LossSettings(opsm_delta=0.05, kl_beta=0.5, veto=0.0, max_trajectory_share=1.0)
    far = inputs([-2.0], [-1.0], [-1.0], reference=[-1.5])
    assert value(far, settings) == pytest.approx(0.5 * math.exp(-1) * 0.5 * 0.25)
    good = inputs([-2.0], [-1.0], [1.0], reference=[-2.0])
    assert value(good, settings) == pytest.approx(math.exp(-1) * 2.0)


def test_one_trajectory_has_at_most_its_share_of_an_update() -> None:
    settings = LossSettings(kl_beta=0.0, max_trajectory_share=0.1)
    given_inputs = inputs([-1.0] * 4, [-1.0] * 4, [1.0] * 4, normalizer=20.0)
    assert value(given_inputs, settings) == pytest.approx(0.1 * 20 / 4 * 4 / 20)


def test_confidence_scales_a_trajectory() -> None:
    given_inputs = inputs([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], units=[0, 1], weights=(1.0, 0.3))
    assert value(given_inputs, PLAIN) == pytest.approx((1.0 + 0.3) / 2)


def plain_reference(i: LossInputs, s: LossSettings) -> float:
    """The formula, token by token, in Python floats."""
    lp, mu, adv = i.logprobs_P.tolist(), i.behaviour_P.tolist(), i.advantage_P.tolist()
    units, total = i.unit_P.tolist(), 0.0
    ref = lp if i.reference_P is None else i.reference_P.tolist()
    for unit in set(units):
        mine = [t for t, u in enumerate(units) if u == unit]
        ell = {t: max(-20.0, min(20.0, lp[t] - mu[t])) for t in mine}
        mean = sum(ell.values()) / len(mine)
        alive = int(i.gap_U[unit]) <= s.max_staleness_versions
        alive = alive and s.geometric_low <= math.exp(mean) <= s.geometric_high
        alive = alive and all(math.exp(x) >= s.veto for x in ell.values())
        share = min(1.0, s.max_trajectory_share * i.normalizer / float(i.trajectory_tokens_U[unit]))
        for t in mine:
            weight = min(math.exp(ell[t]), s.tis_cap)
            moved = math.exp(lp[t]) - math.exp(mu[t])
            stop = (adv[t] < 0 and -mean > s.opsm_delta) or (adv[t] > 0 and moved > s.trust_region)
            stop = stop or (adv[t] < 0 and moved < -s.trust_region)
            term = 0.0 if stop else -weight * adv[t] * lp[t]
            term += s.kl_beta * weight * 0.5 * (lp[t] - ref[t]) ** 2 + s.anchor * 0.5 * ell[t] ** 2
            total += float(i.weight_U[unit]) * share * alive * term
    return total / i.normalizer


numbers = st.floats(-6, -0.01)
tokens = st.lists(st.tuples(numbers, numbers, st.floats(-3, 3), numbers, st.integers(0, 2)), min_size=1, max_size=12)
settings_strategy = st.builds(
    LossSettings,
    opsm_delta=st.sampled_from([0.05, math.inf]),
    geometric_low=st.sampled_from([0.0, 0.5]),
    geometric_high=st.sampled_from([1.5, math.inf]),
    veto=st.sampled_from([0.0, 0.1]),
    trust_region=st.sampled_from([0.2, math.inf]),
    max_staleness_versions=st.integers(0, 2),
    kl_beta=st.sampled_from([0.0, 0.05]),
    anchor=st.sampled_from([0.0, 1e-3]),
    max_trajectory_share=st.sampled_from([0.1, 1.0]),
)


@given(tokens, settings_strategy)
def test_it_equals_the_formula_token_by_token(
    rows: list[tuple[float, float, float, float, int]], settings: LossSettings
) -> None:
    lp, mu, adv, ref, unit = (list(column) for column in zip(*rows, strict=True))
    given_inputs = inputs(
        lp, mu, adv, units=unit, weights=(1.0, 0.3, 0.6), gaps=(0, 1, 2), reference=ref, normalizer=17.0
    )
    loss, _ = policy_loss(given_inputs, settings)
    assert float(loss.detach()) == pytest.approx(plain_reference(given_inputs, settings), rel=1e-9, abs=1e-12)


def test_sums_of_rows_are_those_of_the_whole() -> None:
    one = inputs([-1.0, -2.0], [-1.5, -2.0], [1.0, -1.0])
    both = inputs(
        [-1.0, -2.0] * 2, [-1.5, -2.0] * 2, [1.0, -1.0] * 2, units=[0, 0, 1, 1], weights=(1.0, 1.0), gaps=(0, 0)
    )
    part = policy_loss(replace(one, normalizer=4.0), PLAIN)[1]
    whole = policy_loss(both, PLAIN)[1]
    assert (part + part).metrics() == pytest.approx(whole.metrics())


def test_an_update_without_tokens_has_metrics() -> None:
    assert Sums().metrics()["kept"] == 0.0

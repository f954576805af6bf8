"""The loss against numbers worked out by hand; against its formula: test_losses_formula.py."""

import math
from dataclasses import replace

import pytest
import torch

from clawloop_server.trainer.losses import POLICIES, Calls, Distance, LossInputs, policy_loss
from clawloop_server.trainer.settings import TrainSettings, check_settings
from clawloop_shared import objective
from clawloop_shared.errors import ConfigError
from clawloop_shared.objective import LossSettings
from clawloop_shared.whole_step import Sums, share_caps

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
        cap_U=torch.ones(len(weights), dtype=real),
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
    honest = {n: 10.0 for n in range(20)}
    sizes = honest | {99: 99 * 200.0}
    caps = share_caps(sizes, 0.1)
    counted = {n: caps[n] * size for n, size in sizes.items()}
    assert counted[99] == pytest.approx(0.1 * sum(counted.values()))
    assert all(caps[n] == 1.0 for n in honest)
    assert share_caps({0: 3.0, 1: 300.0}, 0.1) == pytest.approx({0: 1.0, 1: 0.01})  # too few: all count the same
    assert share_caps({n: 7.0 for n in range(10)}, 0.1) == {n: 1.0 for n in range(10)}
    assert share_caps({}, 0.1) == {}
    given_inputs = replace(inputs([-1.0] * 4, [-1.0] * 4, [1.0] * 4), cap_U=torch.tensor([0.25], dtype=torch.float64))
    assert value(given_inputs, PLAIN) == pytest.approx(0.25)


def test_one_impossible_logprob_does_not_hide_what_the_others_say() -> None:
    given_inputs = inputs([-1.0, -1.0], [-1.0, -1e30], [1.0, 1.0])
    assert policy_loss(given_inputs, PLAIN)[1].metrics()["surprise"] == pytest.approx(101.0 / 2)


def test_confidence_scales_a_trajectory() -> None:
    given_inputs = inputs([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], units=[0, 1], weights=(1.0, 0.3))
    assert value(given_inputs, PLAIN) == pytest.approx((1.0 + 0.3) / 2)


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


def test_the_table_of_policies_is_the_one_that_settings_know() -> None:
    assert tuple(POLICIES) == ("tis", "ppo", "gspo", "cispo")
    assert set(POLICIES) == set(objective.POLICIES)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (LossSettings(policy="reinforce"), "loss.policy 'reinforce': known are"),
        (LossSettings(policy="tis", clip_high=0.2), "set tis_cap"),
        (LossSettings(policy="ppo", clip_low=1.5), "loss.clip_low 1.5"),
        (LossSettings(policy="cispo", clip_high=0.0), "loss.clip_high 0.0"),
        (LossSettings(veto=1.0), "loss.veto 1.0"),
        (LossSettings(opsm_delta=-0.1), "loss.opsm_delta -0.1"),
        (LossSettings(trust_region=0.0), "loss.trust_region 0.0"),
        (LossSettings(max_staleness_versions=-1), "loss.max_staleness_versions -1"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_by_name(loss: LossSettings, says: str) -> None:
    with pytest.raises(ConfigError, match="train") as refused:
        check_settings(TrainSettings(loss=loss))
    assert says in str(refused.value)


def test_a_group_advantage_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_advantage 'best'"):
        check_settings(TrainSettings(group_advantage="best"))
    check_settings(TrainSettings(group_advantage="none"))


@pytest.mark.parametrize(("advantage", "gradient"), [(1.0, [0.0, -0.5]), (-1.0, [0.5 * math.exp(0.5), 0.5])])
def test_ppo_stops_where_a_ratio_left_the_range_in_the_wanted_direction(
    advantage: float, gradient: list[float]
) -> None:
    settings = replace_policy("ppo")
    given_inputs = inputs([-1.0, -1.0], [-1.5, -1.0], [advantage] * 2)
    loss, sums = policy_loss(given_inputs, settings)
    torch.autograd.backward(loss)
    assert given_inputs.logprobs_P.grad is not None
    assert given_inputs.logprobs_P.grad.tolist() == pytest.approx(gradient)
    assert sums.clipped == (1.0 if advantage > 0 else 0.0)


def test_cispo_cuts_the_weight_and_keeps_the_gradient() -> None:
    given_inputs = inputs([-1.0, -3.0], [-2.0, -1.0], [1.0, 1.0])
    loss, sums = policy_loss(given_inputs, replace_policy("cispo"))
    torch.autograd.backward(loss)
    assert given_inputs.logprobs_P.grad is not None
    assert given_inputs.logprobs_P.grad.tolist() == pytest.approx([-1.28 / 2, -math.exp(-2) / 2])
    assert sums.clipped == 1.0


def test_gspo_weighs_each_call_the_same_and_cuts_it_whole() -> None:
    # The first call's geometric mean ratio is 1 though its tokens' are not; the second's is e^.1, out of the range.
    given_inputs = replace(
        inputs([-1.0, -2.0, -1.0, -1.0], [-1.2, -1.8, -1.1, -1.1], [1.0, 1.0, 1.0, 1.0]),
        calls=Calls(torch.tensor([0, 0, 1, 1]), total=2.0),
    )
    loss, sums = policy_loss(given_inputs, replace_policy("gspo"))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(-(1.0 + (1 + 4e-4)) / 2)
    assert given_inputs.logprobs_P.grad is not None
    assert given_inputs.logprobs_P.grad.tolist() == pytest.approx([-0.25, -0.25, 0.0, 0.0])
    assert sums.clipped == 2.0


def test_gspo_without_calls_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"LossInputs\.calls"):
        policy_loss(inputs([-1.0], [-1.0], [1.0]), replace_policy("gspo"))


def test_a_part_of_a_trajectory_is_judged_by_all_of_it() -> None:
    settings = LossSettings(kl_beta=0.0, opsm_delta=0.05, veto=1e-4, max_trajectory_share=1.0)
    here = inputs([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0])
    assert policy_loss(here, settings)[1].kept == 2.0
    real = torch.float64
    far = Distance(torch.tensor([-0.2], dtype=real), torch.tensor([-1.0], dtype=real))
    assert policy_loss(replace(here, whole=far), settings)[1].kept_opsm == 0.0
    vetoed = Distance(torch.tensor([0.0], dtype=real), torch.tensor([-12.0], dtype=real))
    assert policy_loss(replace(here, whole=vetoed), settings)[1].kept_veto == 0.0
    unknown = Distance(torch.tensor([math.nan], dtype=real), torch.tensor([math.nan], dtype=real))
    assert policy_loss(replace(here, whole=unknown), settings)[1].kept == 2.0


def replace_policy(name: str) -> LossSettings:
    return LossSettings(policy=name, kl_beta=0.0, opsm_delta=math.inf, veto=0.0, max_trajectory_share=1.0)

"""What a round is not published with."""

import math

import pytest

from clawloop_server.trainer.guards import entropy_fall, running_entropy, unhealthy
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.objective import LossSettings

FINE = {"trajectories": 4.0, "tokens": 100.0, "ess": 0.9, "kept": 0.9, "entropy": 1.0, "surprise": 1.0}


def said(*updates: dict[str, float], **settings: float) -> str:
    return unhealthy([FINE | update for update in updates], TrainSettings(**settings))  # type: ignore[arg-type]


def entropies(*pairs: tuple[float, float], before: float = 0.0) -> list[dict[str, float]]:
    return [{"entropy": e, "surprise": s, "entropy_before": before} for e, s in pairs]


def test_a_round_that_could_use_little_is_not_healthy() -> None:
    assert said({}) == ""
    assert "effective sample size 0.20" in said({"ess": 0.2})
    assert "0.10 of the tokens" in said({"kept": 0.1})


def test_a_round_that_learned_from_nothing_is_not_healthy() -> None:
    assert "no trajectory could" in unhealthy([], TrainSettings())
    assert "no trajectory could" in said({"trajectories": 0.0})
    assert "every group agreed" in said({"tokens": 0.0, "ess": 0.0, "kept": 0.0})


def test_an_update_in_which_every_group_agreed_does_not_count_against_the_others() -> None:
    empty = {"tokens": 0.0, "ess": 0.0, "kept": 0.0, "entropy": 0.0, "surprise": 0.0}
    assert said({}, empty, {}, empty) == ""


def test_a_round_without_one_finite_gradient_is_not_healthy() -> None:
    assert "gradient of 2 of 2" in said({"skipped_steps": 1.0}, {"skipped_steps": 1.0})
    assert said({"skipped_steps": 1.0}, {}) == ""


def test_ratios_that_are_all_cut_are_no_sign_of_health() -> None:
    assert "ratio of 90% of the tokens is above" in said({"ess": 1.0, "clipped": 0.9})
    assert said({"clipped": 0.3}) == ""
    clipped = [FINE | {"clipped": 0.9}]
    assert unhealthy(clipped, TrainSettings(loss=LossSettings(policy="gspo"))) == ""


def test_a_round_of_which_most_did_nothing_is_not_healthy() -> None:
    assert "gradient of 4 of 5" in said(*[{"skipped_steps": 1.0}] * 4, {})


@pytest.mark.parametrize("metric", ["ess", "kept", "entropy", "surprise", "k3"])
def test_what_is_not_a_number_is_not_healthy(metric: str) -> None:
    assert f"{metric} of an update is not finite" in said({metric: math.nan}, {}, {})


def test_the_running_entropy_never_takes_in_what_is_not_a_number() -> None:
    assert running_entropy(2.0, {"tokens": 5.0, "entropy": math.nan}) == 2.0


def test_a_round_in_which_the_policy_collapses_is_not_healthy() -> None:
    collapse = entropies((1.0, 1.0), (0.9, 1.0), (0.5, 1.0), (0.3, 1.0), (0.2, 1.0))
    assert "entropy fell by 74%" in said(*collapse)
    assert said(*collapse, max_entropy_fall=0.8) == ""


def test_entropy_that_falls_or_rises_slowly_is_healthy() -> None:
    assert said(*entropies((1.0, 1.0), (0.9, 1.0), (0.8, 1.0), (0.7, 1.0))) == ""
    assert said(*entropies((1.0, 1.0), (1.4, 1.0), (1.9, 1.0))) == ""


def test_a_round_in_which_the_policy_falls_apart_is_not_healthy() -> None:
    apart = entropies((0.4, 0.5), (0.4, 0.5), (0.9, 0.5), (1.7, 0.5))
    assert "entropy rose by 160%" in said(*apart)
    assert said(*apart, max_entropy_rise=2.0) == ""
    assert said(*entropies((0.4, 0.5), (0.4, 0.5), (1.2, 1.3), (1.4, 1.2))) == "", "other work"


def test_other_work_of_which_there_is_less_to_say_is_no_collapse() -> None:
    """The same tokens were as little surprising when they were sampled."""
    assert said(*entropies((1.0, 1.0), (1.0, 1.0), (0.2, 0.22), (0.2, 0.18))) == ""


def test_a_batch_that_happened_to_be_surprising_is_no_collapse() -> None:
    assert said(*entropies((0.2, 0.9), (0.2, 0.8), (0.2, 0.9))) == ""


def test_rounds_of_one_update_are_compared_with_earlier_rounds() -> None:
    assert "entropy fell by 60%" in said(*entropies((0.4, 1.1), before=1.0))
    assert said(*entropies((0.4, 1.1))) == "", "there was no earlier round"
    assert said(*entropies((0.6, 1.1), before=1.0)) == ""


def test_the_running_entropy_follows_and_begins_with_the_first() -> None:
    assert running_entropy(0.0, {"tokens": 5.0, "entropy": 0.8}) == 0.8
    assert running_entropy(1.0, {"tokens": 5.0, "entropy": 0.5}) == pytest.approx(0.95)
    assert running_entropy(1.0, {"tokens": 0.0, "entropy": 0.0}) == 1.0


def test_a_fall_is_weighed_by_tokens() -> None:
    updates = [FINE | u for u in entropies((1.0, 1.0), (1.0, 1.0), (0.1, 1.0), (0.9, 1.0))]
    updates[2]["tokens"] = 300.0
    assert entropy_fall(updates) == pytest.approx(1 - (0.1 * 300 + 0.9 * 100) / 400)

"""Baselines: never from the reward they judge, always within bounds, and the same after a restart."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer import advantages
from clawloop_server.trainer.advantages import ADVANTAGES, AdvantageState, Node, Rewarded, ema, tracker, value_of
from clawloop_shared.errors import ConfigError

rewarded = st.builds(
    Rewarded,
    reward=st.floats(0, 1),
    confidence=st.floats(0.01, 1),
    key=st.sampled_from([(), ("a",), ("a", "x"), ("b",)]),
)
batches = st.lists(rewarded, min_size=1, max_size=80)
names = st.sampled_from(sorted(ADVANTAGES))


@given(batches)
def test_the_expectation_stays_a_possible_reward(batch: list[Rewarded]) -> None:
    _, state = tracker(batch, AdvantageState())
    for key in {one.key for one in batch} | {("never", "seen")}:
        assert 0.0 <= value_of(state.nodes, key) <= 1.0


@given(batches, st.integers(0, 79), st.floats(0, 1))
def test_a_reward_does_not_change_the_baseline_it_is_compared_with(
    batch: list[Rewarded], at: int, other: float
) -> None:
    at %= len(batch)
    changed = [*batch[:at], msgspec.structs.replace(batch[at], reward=other), *batch[at + 1 :]]
    before = [_baseline(batch, i) for i in range(at + 1)]
    assert before == [_baseline(changed, i) for i in range(at + 1)]


def _baseline(batch: list[Rewarded], at: int) -> float:
    _, state = tracker(batch[:at], AdvantageState())
    return value_of(state.nodes, batch[at].key)


@given(names, batches)
def test_advantages_are_finite_and_clipped(name: str, batch: list[Rewarded]) -> None:
    found, _ = ADVANTAGES[name](batch, AdvantageState())
    assert len(found) == len(batch)
    assert all(math.isfinite(a) and abs(a) <= advantages.CLIP for a in found)


@given(names, batches, batches)
def test_a_state_that_was_saved_goes_on_the_same(name: str, first: list[Rewarded], second: list[Rewarded]) -> None:
    _, state = ADVANTAGES[name](first, AdvantageState())
    restored = msgspec.json.decode(msgspec.json.encode(state), type=AdvantageState)
    assert ADVANTAGES[name](second, restored) == ADVANTAGES[name](second, state)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_what_always_happens_is_soon_expected(name: str) -> None:
    state, found = AdvantageState(), [0.0]
    for _ in range(60):
        found, state = ADVANTAGES[name]([Rewarded(0.8)] * 8, state)
    assert max(map(abs, found)) < 0.42  # the prior keeps the weight of 4 rewards: .3 * 4 / (25 + 4) / .1


def test_a_better_trajectory_has_the_higher_advantage() -> None:
    for advantage in ADVANTAGES.values():
        found, _ = advantage([Rewarded(0.0), Rewarded(1.0)], AdvantageState())
        assert found[0] < 0 < found[1]


def test_numbers_by_hand() -> None:
    state = AdvantageState(nodes={"": Node(alpha=2.0, beta=1.0)}, drift=1.0)  # far away: rho is its lower bound
    found, after = tracker([Rewarded(1.0, confidence=0.5)], state)
    baseline = (2.0 + 4 * 0.5) / (3.0 + 4)
    assert value_of(state.nodes, ()) == pytest.approx(baseline)
    assert found == [pytest.approx((1 - baseline) / (1 - baseline))]
    assert after.nodes[""].alpha == pytest.approx(0.875 * 2.0 + 0.5)
    assert after.nodes[""].beta == pytest.approx(0.875 * 1.0)


def test_an_unknown_key_expects_what_its_parent_does() -> None:
    nodes = {"": Node(6.0, 0.0), "code": Node(0.0, 4.0)}
    assert value_of(nodes, ("code", "rust")) == pytest.approx(value_of(nodes, ("code",)))
    assert value_of(nodes, ("code",)) < value_of(nodes, ()) < 1.0


def test_a_large_batch_is_scaled_by_itself_and_a_small_one_by_the_past() -> None:
    past = AdvantageState(scale=0.5, mean=0.5)
    small, _ = ADVANTAGES["ema"]([Rewarded(1.0)], past)
    large, _ = ADVANTAGES["ema"]([Rewarded(1.0), Rewarded(0.0)] * 32, AdvantageState(scale=5.0, mean=0.5))
    assert small == [pytest.approx(1.0)]
    assert large[:2] == [pytest.approx(1.0), pytest.approx(-1.0)]


def test_rewards_are_brought_to_one_scale() -> None:
    assert advantages.rescale(-1.0, low=-1.0, high=1.0) == 0.0
    assert advantages.rescale(0.5, low=-1.0, high=1.0) == 0.75
    assert advantages.rescale(7.0, low=0.0, high=1.0) == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="magic"):
        advantages.advantage_named("magic")


def test_what_was_hardly_judged_moves_neither_the_mean_nor_the_scale_of_the_others() -> None:
    sure = [Rewarded(0.0), Rewarded(1.0), Rewarded(0.0), Rewarded(1.0)]
    alone, after = ema(sure, AdvantageState())
    faint = [Rewarded(1.0, confidence=1e-6)] * 40
    beside, mixed = ema([*sure, *faint], AdvantageState())
    assert beside[:4] == pytest.approx(alone, abs=1e-4)
    assert mixed.mean == pytest.approx(after.mean, abs=1e-4)

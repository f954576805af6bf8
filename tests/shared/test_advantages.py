"""Advantages: each by its paper's formula, never from the reward it judges, bounded, and the same after a restart."""

import math
import statistics
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared import advantages
from clawloop_shared.advantages import (
    ADVANTAGES,
    GROUP_ADVANTAGES,
    MAX_NODES,
    MAX_POSITION,
    AdvantageState,
    Node,
    Rewarded,
    advantages_of,
    ema,
    returns_to_go,
    tracker,
    value_of,
)
from clawloop_shared.errors import ConfigError

rewards = st.floats(0, 1)
sure = st.floats(0.01, 1)
keys = st.sampled_from([(), ("a",), ("a", "x"), ("b",)])
rewarded = st.builds(Rewarded, reward=rewards, confidence=sure, key=keys, position=st.integers(0, 2))
batches = st.lists(rewarded, min_size=1, max_size=80)
names = st.sampled_from(sorted(ADVANTAGES))
group_names = st.sampled_from(sorted(GROUP_ADVANTAGES))
groups = st.lists(st.builds(Rewarded, reward=rewards, confidence=sure), min_size=2, max_size=12)


def found_of(batch: Sequence[Rewarded], state: AdvantageState, name: str) -> list[float]:
    values = advantages_of(batch, state, advantage=name).values
    return [0.0 if value is None else value for value in values]


# groups


def by_the_papers(name: str, group: Sequence[Rewarded]) -> list[float]:
    """Dr. GRPO eq. 2, RLOO eq. 5 and GRPO's outcome advantage, with a reward that counts c times."""
    found = []
    for i, one in enumerate(group):
        peers = [other for j, other in enumerate(group) if name != "loo" or j != i]
        total = sum(other.confidence for other in peers)
        mean = sum(other.confidence * other.reward for other in peers) / total
        variance = sum(other.confidence * (other.reward - mean) ** 2 for other in peers) / total
        found.append((one.reward - mean) / (math.sqrt(variance) if name == "grpo" else 1.0))
    return found


@given(group_names, groups)
def test_a_group_is_compared_by_the_papers_formula(name: str, group: list[Rewarded]) -> None:
    if max(one.reward for one in group) - min(one.reward for one in group) > 1e-3:
        assert GROUP_ADVANTAGES[name](group) == pytest.approx(by_the_papers(name, group), rel=1e-6, abs=1e-9)


def test_a_group_by_hand() -> None:
    group = [Rewarded(r, group="g") for r in (1.0, 0.0, 0.0, 0.0)]
    assert advantages.dr_grpo(group) == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages.loo(group) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    deviation = statistics.pstdev([1, 0, 0, 0])
    assert advantages.grpo(group) == pytest.approx([0.75 / deviation] + [-0.25 / deviation] * 3)


def test_leave_one_out_is_dr_grpo_times_g_over_g_minus_one() -> None:
    group = [Rewarded(r) for r in (0.1, 0.4, 0.9)]
    assert advantages.loo(group) == pytest.approx([1.5 * a for a in advantages.dr_grpo(group)])


def test_a_group_that_agrees_teaches_nothing_and_is_counted_and_moves_no_baseline() -> None:
    flat = [Rewarded(0.7, group="flat"), Rewarded(0.7, confidence=0.3, group="flat")]
    split = [Rewarded(1.0, group="split"), Rewarded(0.0, group="split")]
    for name in GROUP_ADVANTAGES:
        found = advantages_of([*flat, *split], AdvantageState(), advantage="ema", group_advantage=name)
        assert found.values[:2] == [None, None]
        assert found.values[2] == -found.values[3] != 0  # type: ignore[operator]
        assert (found.groups, found.flat, found.state.means) == (2, 1, {})


def test_one_that_is_left_of_its_group_is_compared_with_what_was_before() -> None:
    alone = [Rewarded(1.0, group="g"), Rewarded(0.0, group="h"), Rewarded(1.0, group="h")]
    before = AdvantageState(means={0: 0.25}, scale=0.5)
    found = advantages_of(alone, before, advantage="ema", group_advantage="dr-grpo")
    assert found.groups == 1
    assert found.values[0] == pytest.approx(0.75 / (found.state.scale or 0))
    assert found.values[1:] == pytest.approx([-0.5 / (found.state.scale or 0), 0.5 / (found.state.scale or 0)])
    assert found.state.means == {0: pytest.approx(0.9 * 0.25 + 0.1 * 1.0)}


@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
@pytest.mark.parametrize("state", [AdvantageState(), AdvantageState(means={n: 0.3 for n in range(32)})])
def test_late_steps_of_one_trajectory_are_not_compared_with_each_other(advantage: str, state: AdvantageState) -> None:
    returns = [(n * 7 % 11) / 11 for n in range(40)]
    grouped, plain = (
        [Rewarded(r, key=("a",), group=group, position=n, trajectory=0) for n, r in enumerate(returns)]
        for group in ("g", "")
    )
    one, other = (
        advantages_of(steps, state, advantage=advantage, group_advantage="dr-grpo") for steps in (grouped, plain)
    )
    assert one == other
    assert one.groups == 0
    # What one step returned is in no baseline of its own trajectory: others' advantages stay, before they are scaled.
    changed = [*plain[:35], msgspec.structs.replace(plain[35], reward=1.0), *plain[36:]]
    before, after = (ADVANTAGES[advantage](steps, state)[0] for steps in (plain, changed))
    assert [a for n, a in enumerate(before) if n != 35] == [a for n, a in enumerate(after) if n != 35]
    assert max(one.state.means) == MAX_POSITION


def test_late_steps_without_a_past_are_compared_with_other_trajectories_alone() -> None:
    late = [Rewarded(r, position=31 + n, trajectory=t) for t, n, r in [(0, 0, 1.0), (0, 1, 0.8), (1, 0, 0.2)]]
    assert ema(late, AdvantageState())[0] == pytest.approx([0.8, 0.6, 0.2 - 0.9])


def test_steps_of_a_group_are_compared_position_by_position() -> None:
    steps = [
        Rewarded(1.0, group="g", position=0),
        Rewarded(0.5, group="g", position=0),
        Rewarded(0.25, group="g", position=1),
        Rewarded(0.25, group="g", position=1),
        Rewarded(0.5, group="g", position=2),  # one alone got so far
    ]
    found = advantages_of(steps, AdvantageState(means={2: 0.0}), advantage="ema", group_advantage="dr-grpo")
    assert found.flat == 0
    first, second, third, fourth, last = found.values
    assert first == -second > 0  # type: ignore[operator]
    assert third == fourth == 0.0
    assert last == pytest.approx(2 * (first or 0))


def test_without_group_advantages_all_are_compared_with_the_baseline() -> None:
    batch = [Rewarded(1.0, group="g"), Rewarded(1.0, group="g")]
    found = advantages_of(batch, AdvantageState(means={0: 0.5}), advantage="ema", group_advantage="none")
    assert (found.groups, found.flat) == (0, 0)
    assert found.values == pytest.approx([1.0, 1.0])


def test_grpo_keeps_its_own_scale_and_leaves_that_of_the_others_alone() -> None:
    batch = [Rewarded(1.0, group="g"), Rewarded(0.0, group="g"), Rewarded(0.6)]
    found = advantages_of(batch, AdvantageState(means={0: 0.5}), advantage="ema", group_advantage="grpo")
    assert found.values == pytest.approx([1.0, -1.0, 1.0])
    assert found.state.scale == pytest.approx(0.1)


# trajectories of no group


@given(batches)
def test_the_expectation_stays_a_possible_reward(batch: list[Rewarded]) -> None:
    _, state = tracker(batch, AdvantageState())
    for key in {one.key for one in batch} | {("never", "seen")}:
        for position, mean in state.means.items():
            assert -1e-9 <= value_of(state.nodes, key, root=mean, position=position) <= 1 + 1e-9


@given(names, batches, st.integers(0, 79), rewards)
def test_a_reward_does_not_change_what_it_is_compared_with(
    name: str, batch: list[Rewarded], at: int, other: float
) -> None:
    at %= len(batch)
    changed = [*batch[:at], msgspec.structs.replace(batch[at], reward=other), *batch[at + 1 :]]
    for state in (AdvantageState(), AdvantageState(means={0: 0.3})):
        (one, _), (two, _) = (ADVANTAGES[name](b, state) for b in (batch, changed))
        if one[at] is None:
            assert two[at] is None  # nothing to compare it with
        else:
            assert batch[at].reward - one[at] == pytest.approx(other - two[at], abs=1e-9)  # type: ignore[operator]


@given(names, batches)
def test_advantages_are_finite_and_clipped(name: str, batch: list[Rewarded]) -> None:
    found = found_of(batch, AdvantageState(), name)
    assert len(found) == len(batch)
    assert all(math.isfinite(a) and abs(a) <= advantages.CLIP for a in found)


@given(names, batches, batches)
def test_a_state_that_was_saved_goes_on_the_same(name: str, first: list[Rewarded], second: list[Rewarded]) -> None:
    state = advantages_of(first, AdvantageState(), advantage=name).state
    restored = msgspec.json.decode(msgspec.json.encode(state), type=AdvantageState)
    assert list(restored.nodes) == list(state.nodes)
    assert advantages_of(second, restored, advantage=name) == advantages_of(second, state, advantage=name)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_what_always_happens_is_expected(name: str) -> None:
    state, found = AdvantageState(), advantages_of([], AdvantageState(), advantage=name)
    for _ in range(60):
        found = advantages_of([Rewarded(0.8, key=("a",))] * 8, state, advantage=name)
        state = found.state
    assert found.values == pytest.approx([0.0] * 8, abs=1e-6)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_better_trajectory_has_the_higher_advantage(name: str) -> None:
    found = found_of([Rewarded(0.0), Rewarded(1.0)], AdvantageState(), name)
    assert found[0] < 0 < found[1]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_the_very_first_one_has_nothing_to_be_compared_with(name: str) -> None:
    found = advantages_of([Rewarded(0.9)], AdvantageState(), advantage=name)
    assert found.values == [None]
    assert found.state.means == {0: 0.9}


def test_the_tracker_by_hand() -> None:
    state = AdvantageState(nodes={"k": Node(total=2.0, weight=3.0)}, means={0: 0.4}, drift=1.0)  # far: rho is lowest
    (found,), after = tracker([Rewarded(1.0, confidence=0.5, key=("k",))], state)
    assert found == pytest.approx(1 - (2.0 + 4 * 0.4) / (3.0 + 4))
    assert after.nodes["k"].total == pytest.approx(0.875 * 2.0 + 0.5)
    assert after.nodes["k"].weight == pytest.approx(0.875 * 3.0 + 0.5)
    assert after.means[0] == pytest.approx(0.9 * 0.4 + 0.1 * 1.0)


def test_without_keys_the_tracker_is_the_running_mean() -> None:
    batch = [Rewarded(r) for r in (0.1, 0.9, 0.4)]
    state = AdvantageState(means={0: 0.2})
    assert tracker(batch, state)[0] == ema(batch, state)[0]


def test_the_root_remembers_as_long_whatever_number_of_keys_there_is() -> None:
    """What was wrong: 64 keys' rewards discounted the root 64 times an update; one bad update was all it knew."""
    roots = []
    for keys_of in (1, 64):
        state = AdvantageState()
        for update in range(41):
            reward = 0.0 if update == 40 else 0.75
            batch = [Rewarded(reward, key=(f"k{n % keys_of}",)) for n in range(64)]
            state = tracker(batch, state)[1]
        roots.append(state.means[0])
    assert roots[0] == roots[1] == pytest.approx(0.9 * 0.75)


def test_no_prior_pushes_down_what_is_as_good_as_ever() -> None:
    """What made the tracker wear down the form of a call: at a mean of .25 a seventh of the prior of .5 stayed."""
    state, sums = AdvantageState(), []
    for _ in range(40):
        batch = [Rewarded(float(n % 4 == 0), key=(f"k{n % 3}",)) for n in range(64)]
        raw, state = tracker(batch, state)
        sums.append(sum(a for a in raw if a is not None) / 64)
    assert statistics.mean(sums[10:]) == pytest.approx(0.0, abs=0.01)


def test_keys_that_differ_are_told_apart_and_a_new_one_expects_what_all_do() -> None:
    state = AdvantageState()
    for _ in range(20):
        state = tracker([Rewarded(0.9, key=("kind",)), Rewarded(0.1, key=("strict",))] * 16, state)[1]
    root = state.means[0]
    found = [value_of(state.nodes, key, root=root) for key in (("kind",), ("new",), ("strict",))]
    assert found == pytest.approx([0.9, 0.5, 0.1], abs=0.1)


def test_an_unknown_key_expects_what_its_parent_does() -> None:
    nodes = {"code": Node(0.0, 4.0)}
    assert value_of(nodes, ("code", "rust"), root=0.8) == value_of(nodes, ("code",), root=0.8) == pytest.approx(0.4)


def test_the_tracker_forgets_what_it_has_not_heard_of_for_longest() -> None:
    state = AdvantageState()
    for n in range(MAX_NODES + 10):
        batch = [Rewarded(0.5, key=(f"k{n}",)), Rewarded(0.5, key=("busy", "often"))]
        state = tracker(batch, state)[1]
    assert len(state.nodes) == MAX_NODES
    assert "k0" not in state.nodes
    assert {"busy", "busy/often", f"k{MAX_NODES + 9}"} <= set(state.nodes)


def test_a_large_batch_is_scaled_by_itself_and_a_small_one_by_the_past() -> None:
    small = found_of([Rewarded(1.0)], AdvantageState(scale=0.5, means={0: 0.5}), "ema")
    large = found_of([Rewarded(1.0), Rewarded(0.0)] * 32, AdvantageState(scale=5.0, means={0: 0.5}), "ema")
    assert small == [pytest.approx(1.0)]
    assert large[:2] == [pytest.approx(1.0), pytest.approx(-1.0)]


def test_what_was_hardly_judged_moves_neither_the_mean_nor_the_scale_of_the_others() -> None:
    certain = [Rewarded(0.0), Rewarded(1.0), Rewarded(0.0), Rewarded(1.0)]
    alone, beside = (
        advantages_of([*certain, *more], AdvantageState(means={0: 0.5}), advantage="ema")
        for more in ([], [Rewarded(1.0, confidence=1e-6)] * 40)
    )
    assert beside.values[:4] == pytest.approx(alone.values, abs=1e-4)
    assert beside.state.means[0] == pytest.approx(alone.state.means[0], abs=1e-4)


def test_rewards_are_brought_to_one_scale() -> None:
    assert advantages.rescale(-1.0, low=-1.0, high=1.0) == 0.0
    assert advantages.rescale(0.5, low=-1.0, high=1.0) == 0.75
    assert advantages.rescale(7.0, low=0.0, high=1.0) == 1.0


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="magic"):
        advantages.advantage_named("magic")
    with pytest.raises(ConfigError, match="magic"):
        advantages.group_advantage_named("magic")


# steps

judged = st.lists(st.none() | st.tuples(st.floats(-1, 1), sure), max_size=12)


@given(judged, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_return_is_the_discounted_sum_of_what_comes(
    given_rewards: list[tuple[float, float] | None], discount: float
) -> None:
    found = returns_to_go(given_rewards, discount=discount)
    for t, got in enumerate(found):
        ahead = [(k - t, r) for k, r in enumerate(given_rewards) if k >= t and r and (discount or k == t)]
        if not ahead:
            assert got is None
            continue
        surest = max(c for _, (_, c) in ahead)
        assert got == pytest.approx((sum(discount**n * c * r for n, (r, c) in ahead) / surest, surest), abs=1e-9)


def test_a_step_of_which_nothing_was_said_has_what_comes_after_and_the_rest_nothing() -> None:
    found = returns_to_go([None, (1.0, 0.5), None, (-0.5, 1.0), None], discount=1.0)
    assert found == [(0.0, 1.0), (0.0, 1.0), (-0.5, 1.0), (-0.5, 1.0), None]

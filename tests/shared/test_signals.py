"""Rewards: each source has one voice, silence is no reward, and every kind of target is found."""

import math
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared.records import Channel, Policy, Sampling, Signal, Step, Target, Trajectory
from clawloop_shared.signals import FACTORS, OWNER, RewardRules, account_of, assemble, reward_of, step_rewards


def step(step_id: str, *, run: str = "r1", session: str = "s1", trajectory: str = "", at: int = 0) -> Step:
    return Step(
        step_id=step_id,
        session_id=session,
        run_id=run,
        trajectory_id=trajectory,
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.5],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=at,
    )


def signal(
    target: Target, target_id: str, value: float, *, source: str = "user", at: int = 0, weight: float = 1.0
) -> Signal:
    return Signal(
        signal_id=f"{source}{at}",
        target=target,
        target_id=target_id,
        source=source,
        value=value,
        created_ms=at,
        weight=weight,
    )


def test_no_signal_is_no_reward_and_not_zero() -> None:
    assert reward_of([]) is None
    assert assemble([step("a")], []) == []


def test_a_later_word_of_the_same_source_replaces_the_earlier() -> None:
    reward = reward_of([signal(Target.STEP, "a", 1.0, at=1), signal(Target.STEP, "a", -1.0, at=2)])
    assert reward is not None
    assert reward.value == -1.0


def value_of(*signals: Signal, rules: RewardRules | None = None) -> float:
    reward = reward_of(signals, rules or RewardRules())
    assert reward is not None
    return reward.value


def test_sources_are_weighed_by_how_sure_they_are_and_how_far_they_are_believed() -> None:
    account = account_of(
        [
            signal(Target.STEP, "a", 1.0, source="rule", weight=0.9),
            signal(Target.STEP, "a", -1.0, source="judge", weight=0.6),
        ]
    )
    assert account.reward is not None
    assert [(v.source, v.words, v.value, v.weight, v.factor) for v in account.voices] == [
        ("judge", 1, -1.0, 0.6, 0.5),
        ("rule", 1, 1.0, 0.9, 1.0),
    ]
    assert [v.share for v in account.voices] == pytest.approx([0.25, 0.75])
    assert account.reward.value == pytest.approx(0.5)
    assert account.reward.weight == 0.9


def test_a_source_has_one_voice_however_often_it_spoke() -> None:
    tools = [signal(Target.STEP, f"s{n}", 1.0, source="tool-outcome") for n in range(20)]
    one = value_of(signal(Target.RUN, "r", -1.0, source="judge"), tools[0])
    many = value_of(signal(Target.RUN, "r", -1.0, source="judge"), *tools)
    assert many == pytest.approx(one)
    assert value_of(*tools[:3], signal(Target.STEP, "x", 0.0, source="tool-outcome")) == pytest.approx(0.75)


def test_where_the_owner_spoke_the_others_together_weigh_at_most_the_cap() -> None:
    others = [signal(Target.RUN, "r", -1.0, source=source) for source in FACTORS if source not in OWNER]
    user = signal(Target.STEP, "a", 1.0, weight=0.1)
    assert value_of(user, *others) == pytest.approx(0.6 - 0.4)
    assert value_of(user, *others, rules=RewardRules(cap=0.0)) == 1.0
    assert value_of(user, *others, rules=RewardRules(cap=1.0)) < -0.9
    assert value_of(user, signal(Target.RUN, "r", -1.0, source="tool-outcome", weight=0.1)) == pytest.approx(2 / 3)


def test_a_source_with_factor_zero_is_left_out_and_alone_it_is_no_reward() -> None:
    rules = RewardRules(weights={"judge": 0.0, "other": 0.0, "mine": 1.0})
    judge, unknown = (signal(Target.STEP, "a", -1.0, source=source) for source in ("judge", "who"))
    assert reward_of([judge, unknown], rules) is None
    assert assemble([step("a")], [judge], rules=rules) == []
    assert value_of(judge, unknown, signal(Target.STEP, "a", 0.5, source="mine"), rules=rules) == 0.5
    assert [v.share for v in account_of([judge, unknown], rules).voices] == [0.0, 0.0]


def test_faint_signs_alone_are_no_reward_however_many_and_count_beside_a_word() -> None:
    worked = [signal(Target.STEP, f"s{n}", 1.0, source="tool-outcome", weight=0.05) for n in range(50)]
    assert reward_of(worked) is None
    assert reward_of(worked, RewardRules(least=0.0)) is not None
    said = signal(Target.RUN, "r", -1.0, source="next-state", weight=0.6)
    assert -1.0 < value_of(said, *worked) < -0.9
    assert reward_of([signal(Target.STEP, "s", -1.0, source="tool-outcome", weight=0.5)]) is not None


@pytest.mark.parametrize(
    "text", ["cap = nan", "least = 2", "cap = 1.1", "[weights]\njudge = -1.0", "[weights]\nx = nan", "cups = 1"]
)
def test_rules_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.toml.decode(text, type=RewardRules)


SOURCES = st.sampled_from([*FACTORS, "someone"])
SAID = st.builds(
    lambda source, run, value, weight, at: signal(Target.RUN, run, value, source=source, weight=weight, at=at),
    SOURCES,
    st.sampled_from(["r1", "r2", "r3"]),
    st.floats(-1, 1),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 3),
)
RULES = st.builds(
    RewardRules,
    weights=st.dictionaries(SOURCES, st.just(0.0) | st.floats(0, 1), max_size=4),
    cap=st.floats(0, 1),
    least=st.floats(0, 1),
)


@given(st.lists(SAID, max_size=8), RULES, st.randoms())
def test_a_reward_is_finite_within_its_signals_and_the_same_in_any_order(
    said: list[Signal], rules: RewardRules, random: Random
) -> None:
    said = [msgspec.structs.replace(one, signal_id=str(n)) for n, one in enumerate(said)]
    account = account_of(said, rules)
    heard = [one.value for one in said if rules.factor(one.source) > 0.0]
    assert (account.reward is None) == (not any(rules.counts(one) for one in said))
    shuffled = [*said, *said]
    random.shuffle(shuffled)
    assert account_of(shuffled, rules) == account
    if account.reward is not None:
        assert min(heard) <= account.reward.value <= max(heard)
        assert 0 < account.reward.weight <= 1
        assert math.isclose(sum(v.share for v in account.voices), 1.0)


@given(st.lists(SAID, max_size=6), st.lists(SAID, max_size=6))
def test_what_is_said_of_one_trajectory_changes_the_reward_of_no_other(said: list[Signal], more: list[Signal]) -> None:
    steps = [step(run, run=run, session=run) for run in ("r1", "r2", "r3")]
    said = [msgspec.structs.replace(one, signal_id=f"a{n}") for n, one in enumerate(said)]
    more = [msgspec.structs.replace(one, signal_id=f"b{n}", target_id="r1") for n, one in enumerate(more)]

    def others(signals: list[Signal]) -> dict[str, tuple[float, float]]:
        return {t.trajectory_id: (t.reward, t.weight) for t in assemble(steps, signals) if t.steps[0].run_id != "r1"}

    assert others(said) == others([*more, *said])


def test_a_signal_on_one_step_rewards_its_whole_run() -> None:
    (found,) = assemble([step("b", at=2), step("a", at=1)], [signal(Target.STEP, "b", 1.0)])
    assert [s.step_id for s in found.steps] == ["a", "b"]
    assert found.reward == 1.0
    assert found.channel == Channel.TRAIN


def test_one_run_through_two_conversations_is_two_trajectories() -> None:
    steps = [step("a"), step("b", session="s2"), step("c", at=1)]
    found = assemble(steps, [signal(Target.STEP, "a", 1.0), signal(Target.SESSION, "s2", -1.0)])
    assert {t.trajectory_id: ([s.step_id for s in t.steps], t.reward) for t in found} == {
        "r1/s1": (["a", "c"], 1.0),
        "r1/s2": (["b"], -1.0),
    }


def test_runs_sessions_and_named_trajectories_are_targets_too() -> None:
    steps = [step("a", run="r1"), step("b", run="r2"), step("c", run="r3", session="s2", trajectory="t")]
    judged = [signal(Target.RUN, "r1", 1.0), signal(Target.TRAJECTORY, "t", -1.0)]
    assert {t.trajectory_id: t.reward for t in assemble(steps, judged)} == {"r1/s1": 1.0, "t": -1.0}
    whole = assemble(steps, [signal(Target.SESSION, "s1", 0.5)])
    assert {t.trajectory_id for t in whole} == {"r1/s1", "r2/s1"}


def test_the_channels_are_never_in_one_trajectory() -> None:
    steps = [step("a", at=1), msgspec.structs.replace(step("b", at=2), channel=Channel.VAL)]
    found = assemble(steps, [signal(Target.RUN, "r1", 1.0)])
    assert [(t.channel, [s.step_id for s in t.steps]) for t in found] == [(Channel.TRAIN, ["a"]), (Channel.VAL, ["b"])]


def test_steps_that_are_left_out_still_tell_how_their_run_went() -> None:
    (found,) = assemble([step("a"), step("b", at=1)], [signal(Target.STEP, "a", -1.0)], left_out={"a"})
    assert ([s.step_id for s in found.steps], found.reward) == (["b"], -1.0)
    assert assemble([step("a")], [signal(Target.STEP, "a", -1.0)], left_out={"a"}) == []


# steps


def of_steps(signals: list[Signal], *, count: int = 3) -> Trajectory:
    (found,) = assemble([step(f"s{n}", at=n) for n in range(count)], signals)
    return found


def values_of(found: Trajectory, rules: RewardRules | None = None) -> list[float | None]:
    return [None if reward is None else reward.value for reward in step_rewards(found, rules or RewardRules())]


def test_a_step_has_the_words_that_are_on_it_and_the_last_those_on_all() -> None:
    found = of_steps([signal(Target.STEP, "s0", -1.0, source="judge"), signal(Target.RUN, "r1", 1.0)])
    assert values_of(found) == [-1.0, None, 1.0]


def test_words_on_the_last_step_and_on_all_are_weighed_together() -> None:
    found = of_steps([signal(Target.STEP, "s2", -1.0, source="rule"), signal(Target.SESSION, "s1", 1.0)])
    assert values_of(found) == [None, None, pytest.approx(0.6 - 0.4)]  # the owner's word keeps its share


def test_what_was_said_of_a_step_that_is_left_out_is_said_of_the_last() -> None:
    words = [signal(Target.STEP, "s1", 1.0)]
    (found,) = assemble([step(f"s{n}", at=n) for n in range(3)], words, left_out={"s1"})
    assert values_of(found) == [None, 1.0]


def test_a_faint_word_on_a_step_is_no_reward_of_its_own_and_a_source_without_weight_none_at_all() -> None:
    words = [signal(Target.STEP, "s0", 1.0, source="tool-outcome", weight=0.05), signal(Target.RUN, "r1", -1.0)]
    assert values_of(of_steps(words)) == [None, None, -1.0]
    judged = [signal(Target.STEP, "s0", 1.0, source="judge"), signal(Target.RUN, "r1", -1.0)]
    assert values_of(of_steps(judged), RewardRules(weights={"judge": 0.0})) == [None, None, -1.0]


words = st.lists(
    st.builds(
        lambda target, n, value, source, weight, at: signal(
            target,
            {Target.STEP: f"s{n}", Target.RUN: "r1", Target.SESSION: "s1"}[target],
            value,
            source=source,
            at=at,
            weight=weight,
        ),
        st.sampled_from([Target.STEP, Target.RUN, Target.SESSION]),
        st.integers(0, 4),
        st.floats(-1, 1),
        st.sampled_from(sorted(FACTORS)),
        st.floats(0.01, 1),
        st.integers(0, 50),
    ),
    max_size=12,
    unique_by=lambda word: word.signal_id,
)


@given(words)
def test_each_word_goes_to_one_step_and_no_step_is_surer_than_all(signals: list[Signal]) -> None:
    for found in assemble([step(f"s{n}", at=n) for n in range(3)], signals):
        rewards = [reward for reward in step_rewards(found) if reward is not None]
        assert rewards
        assert max(reward.weight for reward in rewards) <= found.weight + 1e-12
        assert all(-1.0 <= reward.value <= 1.0 for reward in rewards)


@given(words, words, st.randoms(use_true_random=False))
def test_one_trajectory_that_is_scored_never_changes_the_reward_of_another(
    mine: list[Signal], theirs: list[Signal], rng: Random
) -> None:
    other = {"s0": "t0", "s1": "t1", "s2": "t2", "s3": "t3", "s4": "t4", "r1": "r2"}
    moved = [
        msgspec.structs.replace(s, target_id="s2" if s.target is Target.SESSION else other[s.target_id]) for s in theirs
    ]
    steps = [step(f"s{n}", at=n) for n in range(3)]
    more = [step(f"t{n}", run="r2", session="s2", at=n) for n in range(3)]
    both, pool = [*steps, *more], [*mine, *moved]
    rng.shuffle(both)
    rng.shuffle(pool)
    alone = {t.trajectory_id: t for t in assemble(steps, mine)}
    beside = {t.trajectory_id: t for t in assemble(both, pool)}
    assert {n: (t.reward, t.weight) for n, t in alone.items()} == {
        n: (t.reward, t.weight) for n, t in beside.items() if n.startswith("r1")
    }
    for name, found in alone.items():
        assert step_rewards(found) == step_rewards(beside[name])

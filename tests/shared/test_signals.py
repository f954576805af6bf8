"""Rewards: the latest word of each source counts, silence is no reward, and every kind of target is found."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared.records import Channel, Policy, Sampling, Signal, Step, Target
from clawloop_shared.signals import assemble, reward_of


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


def test_sources_are_weighed_and_the_surest_sets_the_weight() -> None:
    reward = reward_of(
        [signal(Target.STEP, "a", 1.0, weight=0.9), signal(Target.STEP, "a", -1.0, source="judge", weight=0.3)]
    )
    assert reward is not None
    assert abs(reward.value - 0.5) < 1e-12
    assert reward.weight == 0.9


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 1)), min_size=1, max_size=6))
def test_a_reward_stays_within_its_signals(judgements: list[tuple[float, float]]) -> None:
    reward = reward_of(
        signal(Target.STEP, "a", value, source=f"s{n}", weight=weight) for n, (value, weight) in enumerate(judgements)
    )
    assert reward is not None
    assert min(v for v, _ in judgements) - 1e-9 <= reward.value <= max(v for v, _ in judgements) + 1e-9


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

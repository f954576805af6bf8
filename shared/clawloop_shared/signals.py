"""From signals to a reward, and from loose steps to rewarded trajectories. Pure functions of their arguments.

A trajectory without a signal has no reward: it is not trainable yet, which is different from a reward of zero.
"""

from collections.abc import Iterable

import msgspec

from clawloop_shared.records import Channel, Signal, Step, Target, Trajectory


class Reward(msgspec.Struct, frozen=True):
    """A reward in [-1, 1] and how far it can be trusted, in (0, 1]."""

    value: float
    weight: float


def reward_of(signals: Iterable[Signal]) -> Reward | None:
    """The weighted mean of each source's latest word on each target; None without signals.

    The weight is that of the surest source, so that two weak judgements do not make a strong one.
    """
    latest: dict[tuple[str, str, str], Signal] = {}
    for signal in sorted(signals, key=lambda s: (s.created_ms, s.signal_id)):
        latest[signal.source, signal.target, signal.target_id] = signal
    if not latest:
        return None
    total = sum(s.weight for s in latest.values())
    value = sum(s.value * s.weight for s in latest.values()) / total
    return Reward(value=value, weight=max(s.weight for s in latest.values()))


def trajectory_key(step: Step) -> tuple[str, str]:
    """What the step is rewarded with: the caller's own trajectory if it named one, else its run in its session.

    One trace may pass through several conversations, as that of an agent with sub-agents does: each is rewarded alone.
    """
    return (step.trajectory_id, "") if step.trajectory_id else (step.run_id, step.session_id)


def signals_for(steps: list[Step], signals: Iterable[Signal]) -> list[Signal]:
    """The signals that judge one of these steps, or the run, session or trajectory they belong to."""
    names = {
        Target.STEP: {s.step_id for s in steps},
        Target.RUN: {s.run_id for s in steps},
        Target.SESSION: {s.session_id for s in steps},
        Target.TRAJECTORY: {s.trajectory_id for s in steps if s.trajectory_id},
    }
    return [signal for signal in signals if signal.target_id in names[signal.target]]


def assemble(steps: Iterable[Step], signals: Iterable[Signal]) -> list[Trajectory]:
    """Group steps into trajectories and reward them; those without a signal are left out.

    Steps keep the order in which they were made; trajectories that of their first step. Steps of the two channels are
    never in one trajectory, even where their caller gave them one name.
    """
    pool = list(signals)
    groups: dict[tuple[tuple[str, str], Channel], list[Step]] = {}
    for step in sorted(steps, key=lambda s: (s.created_ms, s.step_id)):
        groups.setdefault((trajectory_key(step), step.channel), []).append(step)
    found = []
    for (key, channel), members in groups.items():
        mine = signals_for(members, pool)
        reward = reward_of(mine)
        if reward is None:
            continue
        found.append(
            Trajectory(
                trajectory_id="/".join(filter(None, key)),
                steps=members,
                signals=mine,
                reward=reward.value,
                weight=reward.weight,
                group_id=members[0].group_id,
                channel=channel,
            )
        )
    return found

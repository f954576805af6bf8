"""From signals to a reward, and from loose steps to rewarded trajectories. Pure functions of their arguments.

A reward is shown the way it comes about (`account_of`): each source has one voice, however often it spoke; voices are
weighed by how sure they are and by a factor of their source; beside the owner's own word the others weigh at most
`cap` of the total together. A trajectory without a signal that counts has no reward: it is not trainable yet, which is
different from a reward of zero.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared.records import Channel, Signal, Step, Target, Trajectory

OWNER = frozenset({"user", "openclaw"})
"""sources through which the owner speaks; all others are told by a program, a rule or a model"""
OTHER = "other"
"""stands for every source without a factor of its own"""
FACTORS = {
    "user": 1.0,
    "openclaw": 1.0,
    "claw-r1": 1.0,
    "rule": 1.0,
    "exact": 1.0,
    "regex": 1.0,
    "judge": 0.5,
    "reward-model": 0.5,
    "classifier": 0.5,
    "next-state": 0.5,
    "hindsight": 0.3,
    "tool-outcome": 0.2,
    OTHER: 0.5,
}
"""how far a source is believed. What somebody set out to judge (a rating, a task's own answer) is 1; a model's opinion
and what is read from a next turn is half of it; a tool that ran says little, and is the cheapest to please"""
_LEAST_MASS = 1e-9
"""so that what counts never vanishes by rounding"""


class RewardRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How signals are weighed: the `[reward]` table of both sides."""

    weights: dict[str, Annotated[float, Meta(ge=0, le=1)]] = {}
    """factors of sources, before those of `FACTORS`; 0 leaves a source out"""
    cap: Annotated[float, Meta(ge=0, le=1)] = 0.4
    """largest part of a reward that is not the owner's word, where the owner spoke"""
    least: Annotated[float, Meta(ge=0, le=1)] = 0.05
    """what one signal at least must weigh, by its factor, before there is a reward: faint signs alone are none, however
    many. An optimizer brings gradients of any size to one, so what hardly says anything would teach as loudly"""

    def factor(self, source: str) -> float:
        """How much a source counts, in [0, 1]."""
        for factors in (self.weights, FACTORS):
            if source in factors:
                return factors[source]
        return self.weights.get(OTHER, FACTORS[OTHER])

    def counts(self, signal: Signal) -> bool:
        """Whether a signal is enough for a reward."""
        return self.factor(signal.source) > 0.0 and signal.weight * self.factor(signal.source) >= self.least


DEFAULT_RULES = RewardRules()


class Reward(msgspec.Struct, frozen=True):
    """A reward in [-1, 1] and how far it can be trusted, in (0, 1]."""

    value: float
    weight: float


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """What one source says of a trajectory in all, and its share of the reward (0: it is left out).

    `words` is how many of its signals count: the latest on each target. `value` is their mean by weight, `weight` that
    of the surest. `share` is in [0, 1]; the shares of a reward add up to 1.
    """

    source: str
    words: int
    value: float
    weight: float
    factor: float
    share: float = 0.0


class Account(msgspec.Struct, frozen=True):
    """How a reward comes about: its voices by name, and the sum of what they say by their shares; None without any."""

    voices: list[Voice]
    reward: Reward | None


def reward_of(signals: Iterable[Signal], rules: RewardRules = DEFAULT_RULES) -> Reward | None:
    """The reward that these signals make, in whatever order they are given; None without one that counts."""
    return account_of(signals, rules).reward


def account_of(signals: Iterable[Signal], rules: RewardRules = DEFAULT_RULES) -> Account:
    """The reward that these signals make, and how.

    The weight of the reward is that of its surest voice, so that two weak judgements do not make a strong one.
    """
    given = list(signals)
    voices = [_voice(source, words, factor=rules.factor(source)) for source, words in _latest(given).items()]
    masses = {v.source: max(v.weight * v.factor, _LEAST_MASS) for v in voices if v.factor > 0.0}
    if not any(rules.counts(signal) for signal in given):
        return Account(voices, None)
    shares = _shares(masses, cap=rules.cap)
    voices = [msgspec.structs.replace(v, share=shares.get(v.source, 0.0)) for v in voices]
    return Account(voices, Reward(_within(sum(v.value * v.share for v in voices), voices), max(masses.values())))


def _latest(signals: Iterable[Signal]) -> dict[str, list[Signal]]:
    """Each source's latest word on each target, by source in the order of names."""
    latest: dict[tuple[str, str, str], Signal] = {}
    for signal in sorted(signals, key=lambda s: (s.created_ms, s.signal_id)):
        latest[signal.source, signal.target, signal.target_id] = signal
    found: dict[str, list[Signal]] = {}
    for key in sorted(latest):
        found.setdefault(key[0], []).append(latest[key])
    return found


def _voice(source: str, words: Sequence[Signal], *, factor: float) -> Voice:
    surest = max(word.weight for word in words)
    weights = [word.weight / surest for word in words]
    value = sum(word.value * weight for word, weight in zip(words, weights, strict=True)) / sum(weights)
    return Voice(source=source, words=len(words), value=value, weight=surest, factor=factor)


def _shares(masses: dict[str, float], *, cap: float) -> dict[str, float]:
    owner = sum(mass for source, mass in masses.items() if source in OWNER)
    others = sum(masses.values()) - owner
    scale = 1.0
    if owner and cap < 1.0:
        scale = min(1.0, owner * cap / (1.0 - cap) / others) if others > 0.0 else 1.0
    scaled = {source: mass if source in OWNER else mass * scale for source, mass in masses.items()}
    total = sum(scaled.values())
    return {source: mass / total for source, mass in scaled.items()}


def _within(value: float, voices: Sequence[Voice]) -> float:
    """A mean within what it is the mean of, which rounding may miss."""
    heard = [voice.value for voice in voices if voice.share > 0.0]
    return min(max(value, min(heard)), max(heard))


def step_rewards(trajectory: Trajectory, rules: RewardRules = DEFAULT_RULES) -> list[Reward | None]:
    """What each step of a trajectory is rewarded with by itself, in their order; None where nothing that counts was
    said.

    A step has the words that are on it. What was said of the run, the session or the whole trajectory, or of a step
    that is not there any more, was said when all was over: the last step has it. Each word goes to one step, so a
    trajectory that has a reward has a step that has one, and none is surer than the reward of all.
    """
    words: dict[str, list[Signal]] = {step.step_id: [] for step in trajectory.steps}
    last = trajectory.steps[-1].step_id
    for signal in trajectory.signals:
        on_step = signal.target is Target.STEP and signal.target_id in words
        words[signal.target_id if on_step else last].append(signal)
    return [reward_of(words[step.step_id], rules) for step in trajectory.steps]


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


def assemble(
    steps: Iterable[Step],
    signals: Iterable[Signal],
    *,
    rules: RewardRules = DEFAULT_RULES,
    left_out: Collection[str] = (),
) -> list[Trajectory]:
    """Group steps into trajectories and reward them; those without a signal that counts are left out.

    Trajectories are in the order of their first steps. Steps of the two channels are never in one trajectory, nor are
    those of two groups, even where their caller gave them one name. `left_out` names steps that are not to be learned
    from: what was said of them is still said of their trajectory.
    """
    pool = list(signals)
    groups: dict[tuple[tuple[str, str], Channel, str], list[Step]] = {}
    for step in sorted(steps, key=lambda s: (s.created_ms, s.step_id)):
        groups.setdefault((trajectory_key(step), step.channel, step.group_id), []).append(step)
    found = []
    for (key, channel, group_id), members in groups.items():
        mine = sorted(signals_for(members, pool), key=lambda s: (s.created_ms, s.signal_id))
        reward = reward_of(mine, rules)
        kept = [step for step in members if step.step_id not in left_out]
        if reward is None or not kept:
            continue
        found.append(
            Trajectory(
                trajectory_id="/".join(filter(None, key)),
                steps=kept,
                signals=mine,
                reward=reward.value,
                weight=reward.weight,
                group_id=group_id,
                channel=channel,
            )
        )
    return found

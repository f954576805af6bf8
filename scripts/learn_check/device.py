"""A device of the check: it samples episodes with the weights that it has, and keeps each call token for token.

Its weights are the 4-bit base and the adapter that was last shipped to it, so that what it records as logprobs is the
distribution it drew from, and not what the learner would say. Knows no loss and no learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply
from clawloop_server.trainer.generation import Sampling as Drawing
from clawloop_shared.records import Policy, Sampling, Signal, Step, Target, Trajectory
from clawloop_shared.signals import reward_of
from learn_check import world

LINE = "learn-check"
_MAX_TURN_TOKENS = 8
_SOURCE = "exact"


@dataclass
class Episode:
    """A task, and the policy's turns in it: what each saw, and what it said."""

    task: world.Task
    prompts: list[list[int]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    @property
    def reward(self) -> float:
        """1 or 0."""
        return world.reward(self.task, [reply.ids for reply in self.replies])


def play(engine: TrainEngine, tasks: Sequence[world.Task], *, seed: int, temperature: float = 1.0) -> list[Episode]:
    """One episode of each task, all at once: a call, its result, an answer. Who makes no call has no second turn."""
    episodes = [Episode(task, [task.prompt]) for task in tasks]
    going = episodes
    for turn in range(2):
        drawing = Drawing(
            max_tokens=_MAX_TURN_TOKENS,
            eos_ids=frozenset({world.END}),
            temperature=temperature,
            seed=2 * seed + turn,
        )
        replies = engine.generate([episode.prompts[turn] for episode in going], sampling=drawing)
        for episode, reply in zip(going, replies, strict=True):
            episode.replies.append(reply)
        going = [episode for episode in going if turn == 0 and _calls(episode.replies[0])]
        for episode in going:
            called = episode.replies[0].ids
            episode.prompts.append(episode.prompts[0] + called + world.result_of(called))
    return episodes


def _calls(reply: Reply) -> bool:
    return reply.stopped and reply.ids[0] == world.IDS["<call>"]


def trajectory_of(episode: Episode, *, name: str, policy: Policy, reward: float) -> Trajectory:
    """The episode as the server gets it, judged by a signal of +1 (`reward` 1) or -1 (0)."""
    signal = Signal(
        signal_id=name,
        target=Target.TRAJECTORY,
        target_id=name,
        source=_SOURCE,
        value=2.0 * reward - 1.0,
        created_ms=0,
    )
    judged = reward_of([signal])
    if judged is None:
        raise ValueError(f"the signal of {name} counts for nothing: {signal}")
    steps = [
        Step(
            step_id=f"{name}.{turn}",
            session_id=name,
            run_id=name,
            prompt_ids=prompt,
            response_ids=reply.ids,
            response_logprobs=reply.logprobs,
            policy=policy,
            sampling=Sampling(),
            finish_reason="stop" if reply.stopped else "length",
            created_ms=turn,
            parent_id=f"{name}.{turn - 1}" if turn else "",
        )
        for turn, (prompt, reply) in enumerate(zip(episode.prompts, episode.replies, strict=True))
    ]
    return Trajectory(trajectory_id=name, steps=steps, signals=[signal], reward=judged.value, weight=judged.weight)

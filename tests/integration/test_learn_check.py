"""scripts/learn-check itself: one seed learns from a lagging 4-bit device, and its verdicts can fail."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from clawloop_server.trainer.generation import Reply
from clawloop_shared.records import Policy
from learn_check import world
from learn_check.device import LINE, Episode, trajectory_of
from learn_check.experiment import Outcome, Score, reached
from learn_check.verdict import judge

ROOT = Path(__file__).resolve().parents[2]
TASK = world.Task(kind=0, thing=3)


@pytest.mark.slow
def test_one_seed_learns_from_a_device_that_is_ten_updates_behind() -> None:
    wanted = ["--variants", "stale-10", "--seeds", "0", "--updates", "90", "--jobs", "1", "--json"]
    command = [sys.executable, "-m", "learn_check", *wanted]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    (outcome,) = msgspec.convert(report["outcomes"], list[Outcome])
    assert (outcome.variant, outcome.seed, len(outcome.curve)) == ("stale-10", 0, 90)
    assert [verdict["failed"] for verdict in report["verdicts"]] == [{}, {}, {}]
    assert outcome.first_k3 > 1e-6, "the device samples with the very weights that learn: it is not quantised"
    assert outcome.largest_version_gap == 1, "what is sampled after a round is of the version before it"


def calls(tool: int, thing: int) -> list[int]:
    return world.ids_of("<call>", f"tool{tool}", f"thing{thing}", "<end>")


def answers(value: int) -> list[int]:
    return world.ids_of("<ans>", f"value{value}", "<end>")


def value_of(call: list[int]) -> int:
    return int(world.WORDS[world.result_of(call)[1]].removeprefix("value"))


def test_one_tool_alone_is_right_and_its_value_must_have_been_looked_up() -> None:
    paid = [tool for tool in range(world.TOOLS) if pays(calls(tool, 3), answers(value_of(calls(tool, 3))))]
    assert len(paid) == 1
    right = calls(paid[0], 3)
    value = value_of(right)
    other = next(calls(paid[0], thing) for thing in range(24) if value_of(calls(paid[0], thing)) != value)
    assert not pays(other, answers(value))
    assert not pays(right, answers((value + 1) % 24))
    assert not pays(answers(value))
    assert not pays(answers(value), answers(value))
    assert not pays(right[:-1], answers(value))
    assert not pays(right)
    assert not pays()


def pays(*turns: list[int]) -> bool:
    return world.reward(TASK, turns) == 1.0


def test_what_is_held_out_is_neither_demonstrated_nor_trained_on() -> None:
    assert len(world.TRAIN) + len(world.HELD_OUT) == world.KINDS * world.THINGS
    assert not set(world.TRAIN) & set(world.HELD_OUT)
    rng = random.Random(5)
    shown = [world.demonstration(rng)[0] for _ in range(2000)]
    held = [task.prompt for task in world.HELD_OUT]
    assert not [ids for ids in shown if ids[: len(held[0])] in held]


def test_no_demonstration_tells_which_tool_is_for_which_kind() -> None:
    rng, counts = random.Random(6), dict[tuple[str, str], int]()
    for _ in range(8000):
        ids, said = world.demonstration(rng)
        kind, tool = (world.WORDS[ids[at]] for at in (len(world.SYSTEM) + 1, said.index(True) + 1))
        counts[kind, tool] = counts.get((kind, tool), 0) + 1
    asked = {pair: count for pair, count in counts.items() if pair[0].startswith("kind")}
    assert len(asked) == world.KINDS * world.TOOLS
    assert max(asked.values()) < 1.4 * min(asked.values())


def test_an_episode_becomes_steps_token_for_token_with_the_logprobs_that_were_sampled() -> None:
    first, second = calls(1, 3), answers(7)
    prompts = [TASK.prompt, TASK.prompt + first + world.result_of(first)]
    replies = [Reply(first, True, [-1.0, -2.0, -3.0, -4.0]), Reply(second, True, [-0.5] * 3)]
    made = trajectory_of(Episode(TASK, prompts, replies), name="t", policy=Policy(LINE, 4), reward=0.0)
    assert (made.reward, made.weight) == (-1.0, 1.0)
    assert [(s.prompt_ids, s.response_ids, s.logprobs) for s in made.steps] == [
        (prompt, reply.ids, reply.logprobs) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    assert {s.policy.version for s in made.steps} == {4}


def test_how_fast_a_run_was_is_where_five_in_a_row_reach_it() -> None:
    assert reached([0.2, 0.9, 0.7, 0.8, 0.8, 0.8]) == 1
    assert reached([1.0, 1.0, 1.0, 1.0]) is None
    assert reached([0.5] * 20) is None


def outcome_of(variant: str, *, before: float, after: float, device: float) -> Outcome:
    return Outcome(
        variant=variant,
        seed=2,
        updates=30,
        before=Score(before, before, before),
        after=Score(after, after, device),
        curve=[],
        updates_to_reached=None,
        k3=0.0,
        kept=1.0,
        first_k3=0.0,
        largest_k3=0.0,
        largest_version_gap=0,
        refused_rounds=[],
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("good", "changed"),
    [
        (outcome_of("fresh", before=0.2, after=0.8, device=0.8), {"before": Score(0.2, 0.2, 0.36)}),
        (outcome_of("stale-10", before=0.2, after=0.8, device=0.8), {"after": Score(0.74, 1.0, 0.8)}),
        (outcome_of("stale-30", before=0.2, after=0.8, device=0.8), {"after": Score(0.8, 1.0, 0.74)}),
        (outcome_of("same-base", before=0.2, after=0.8, device=0.8), {"largest_k3": 1e-4}),
        *(
            (outcome_of(name, before=0.2, after=0.8, device=0.8), {"refused_rounds": ["its entropy rose"]})
            for name in ("fresh", "same-base", "stale-10", "stale-30")
        ),
        (outcome_of("ignored", before=0.2, after=0.24, device=0.0), {"after": Score(0.26, 0.0, 0.0)}),
        (outcome_of("shuffled", before=0.2, after=0.0, device=0.0), {"after": Score(0.3, 0.0, 0.2)}),
    ],
    ids=lambda value: value.variant if isinstance(value, Outcome) else "",
)
def test_each_variant_can_fail(good: Outcome, changed: dict[str, object]) -> None:
    bad = msgspec.structs.replace(good, **changed)
    assert not [verdict for verdict in judge([good]) if verdict.failed]
    assert [
        list(verdict.failed) for verdict in judge([good, msgspec.structs.replace(bad, seed=3)]) if verdict.failed
    ] == [[3]]


def test_ignoring_the_ratio_must_cost_something_beside_the_same_seed_with_it() -> None:
    corrected = outcome_of("stale-10", before=0.2, after=0.8, device=0.76)
    near = msgspec.structs.replace(corrected, seed=3, after=Score(0.5, 0.5, 0.5))
    ignored = [
        msgspec.structs.replace(outcome_of("ignored", before=0.2, after=0.22, device=0.1), seed=n) for n in (2, 3)
    ]
    last = judge([corrected, near, *ignored])[-1]
    assert "below stale-10" in last.demand
    assert list(last.failed) == [3]
    assert judge([corrected, *ignored])[-1].failed == {3: "stale-10 has not run"}

"""Hints: the policy that was told better is the teacher of the one that was not, token by token."""

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest

from clawloop_server.trainer.engine import OversizedSamples, TrainEngine
from clawloop_server.trainer.hindsight import latest_hints, with_hindsight, with_hint
from clawloop_server.trainer.loop import TrainState, run_round
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Hint, Policy, Sampling, Signal, Step, Target, Trajectory
from clawloop_shared.rows import Limits, Sample

HINT = Hint("s", at=3, token_ids=[40, 41])
SAMPLE = Sample(
    step_id="s",
    trajectory=0,
    token_ids=[5, 6, 7, 8, 9],
    trained=[3, 4],
    logprobs=[-5.5, -6.0],
    advantages=[1.0, -1.0],
)


def signal(name: str, hint: Hint | None, *, at_ms: int = 1) -> Signal:
    return Signal(
        signal_id=name,
        target=Target.STEP,
        target_id="s",
        source="hindsight",
        value=-1.0,
        created_ms=at_ms,
        hint=hint,
    )


def told(answers: list[list[float]], sample: Sample = SAMPLE) -> tuple[list[Sample], int]:
    """What becomes of a sample whose plain and hinted logprobs are `answers`."""
    given = iter(answers)

    def logprobs(samples: Sequence[Sample]) -> list[list[float]]:
        return [next(given) for _ in samples]

    return with_hindsight([sample], {(0, "s"): HINT}, logprobs=logprobs, weight=0.5, clip=1.0, max_tokens=64)


def test_a_hint_goes_into_the_prompt_and_the_answer_stays_token_for_token() -> None:
    hinted = with_hint(SAMPLE, HINT, max_tokens=64)
    assert hinted is not None
    assert hinted.token_ids == [5, 6, 7, 40, 41, 8, 9]
    assert [hinted.token_ids[at] for at in hinted.trained] == [8, 9]


@pytest.mark.parametrize("hint", [Hint("s", 4, [40]), Hint("s", 0, [40]), Hint("s", 3, [40] * 60)])
def test_a_hint_that_is_not_within_the_prompt_or_has_no_room_is_not_used(hint: Hint) -> None:
    assert with_hint(SAMPLE, hint, max_tokens=64) is None


def test_tokens_gain_what_the_hint_makes_them_likelier_up_to_the_clip() -> None:
    (sample,), used = told([[-3.0, -2.0], [-2.4, -7.0]])
    assert used == 1
    assert sample.advantages == pytest.approx([1.0 + 0.5 * 0.6, -1.0 - 0.5 * 1.0])
    assert sample.token_ids == SAMPLE.token_ids


def test_a_hint_under_which_the_policy_is_not_finite_teaches_nothing() -> None:
    assert told([[-3.0, -2.0], [-2.4, math.nan]]) == ([SAMPLE], 0)


def test_a_hint_that_does_not_fit_the_memory_is_dropped_and_the_step_stays() -> None:
    other = dataclasses.replace(SAMPLE, step_id="o", trajectory=1)
    asked: list[list[int]] = []

    def logprobs(samples: Sequence[Sample]) -> list[list[float]]:
        asked.append([s.trajectory for s in samples])
        if any(s.trajectory == 0 and len(s.token_ids) > 5 for s in samples):
            raise OversizedSamples([0])
        return [[-3.0, -2.0 + len(s.token_ids) / 100] for s in samples]

    hints = {(0, "s"): HINT, (1, "o"): Hint("o", 3, [40])}
    (plain, taught), used = with_hindsight(
        [SAMPLE, other], hints, logprobs=logprobs, weight=1.0, clip=1.0, max_tokens=64
    )
    assert used == 1
    assert plain == SAMPLE
    assert taught.advantages == pytest.approx([1.0, -1.0 + 0.01])
    assert asked == [[0, 1], [0, 1], [1]]


def test_a_hint_within_a_response_whose_first_tokens_were_redacted_is_none() -> None:
    found = trajectory(signal("late", Hint("s", 4, [50])))
    assert latest_hints([found], vocab_size=320) == {}
    found = trajectory(signal("late", Hint("s", 3, [50])))
    assert latest_hints([found], vocab_size=320) != {}


def make_step(name: str = "s") -> Step:
    return Step(
        step_id=name,
        session_id="session",
        run_id="run",
        prompt_ids=[5, 6, 7],
        response_ids=[8, 9],
        response_logprobs=[-5.5, -6.0],
        policy=Policy("line", 0),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )


def trajectory(*signals: Signal, step: str = "s", name: str = "t") -> Trajectory:
    return Trajectory(trajectory_id=name, steps=[make_step(step)], signals=[*signals], reward=-1.0, weight=1.0)


def test_the_newest_hint_of_a_step_counts() -> None:
    other = Hint("s", 2, [50])
    found = trajectory(signal("late", other, at_ms=2), signal("early", HINT), signal("none", None, at_ms=3))
    assert latest_hints([found], vocab_size=320) == {(0, "s"): other}


def test_nobody_hints_at_the_step_of_another_trajectory_even_if_it_has_the_same_name() -> None:
    mine, theirs = trajectory(signal("mine", HINT)), trajectory(signal("theirs", Hint("s", 1, [50])), step="other")
    assert latest_hints([theirs, mine], vocab_size=320) == {(1, "s"): HINT}
    namesake = trajectory(signal("theirs", Hint("s", 1, [50])), name="u")
    hints = latest_hints([mine, namesake], vocab_size=320)
    assert hints[0, "s"] == HINT


def test_a_hint_of_tokens_that_the_model_does_not_have_ends_no_round(engine: TrainEngine) -> None:
    vocabulary = engine.model.config.vocab_size
    hostile = trajectory(signal("g", Hint("s", 1, [vocabulary])))
    limits = Limits(line_id="line", vocab_size=vocabulary, max_tokens=64)
    assert run_round(engine, [hostile], state=TrainState(), limits=limits).mean("hinted_steps") == 0.0


def test_learning_from_hints_alone_moves_the_policy_towards_what_it_says_when_it_is_told(engine: TrainEngine) -> None:
    rng = random.Random(3)
    prompt, answer = [rng.randrange(2, 300) for _ in range(12)], [rng.randrange(2, 300) for _ in range(6)]
    blank = Sample(
        step_id="s",
        trajectory=0,
        token_ids=prompt + answer,
        trained=range(12, 18),
        logprobs=[-5.0] * 6,
        advantages=[0.0] * 6,
    )
    blank = dataclasses.replace(blank, logprobs=engine.logprobs([blank])[0])
    hints = {(0, "s"): Hint("s", 12, [rng.randrange(2, 300) for _ in range(8)])}
    (taught,), used = with_hindsight([blank], hints, logprobs=engine.logprobs, weight=1.0, clip=1.0, max_tokens=64)
    assert used == 1
    assert len({round(a, 6) for a in taught.advantages}) > 1  # a token's own advantage, not the trajectory's

    def agreement() -> float:
        return sum(a * p for a, p in zip(taught.advantages, engine.logprobs([blank])[0], strict=True))

    before = agreement()
    for _ in range(4):
        engine.forward_backward([taught], LossSettings(kl_beta=0.0))
        engine.optim_step(1e-2)
    assert agreement() > before + 0.01


def test_a_round_uses_hints_and_counts_them(engine: TrainEngine) -> None:
    hinted, plain = trajectory(signal("g", HINT)), trajectory(signal("g", None))
    limits = Limits(line_id="line", vocab_size=320, max_tokens=64)
    counted = [run_round(engine, [t], state=TrainState(), limits=limits).mean("hinted_steps") for t in (hinted, plain)]
    assert counted == [1.0, 0.0]

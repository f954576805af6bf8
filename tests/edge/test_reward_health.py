"""The account of rewards: what sources say, whether they agree, drift, or pay for the wrong thing."""

import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.signals.health import MAX_SOURCES, OTHERS, Line, RewardHealth, Source, Sums, report_of, warnings_of
from clawloop_edge.signals.watch import HealthWatch, kept_sums
from clawloop_shared.records import Policy, Sampling, Signal, Step, Target

Say = Callable[..., None]


@pytest.fixture
def health() -> RewardHealth:
    return RewardHealth()


@pytest.fixture
def say(health: RewardHealth) -> Say:
    def one(source: str, value: float, *, trajectory: str = "", tokens: int = 10, steps: int = 1) -> None:
        health.add(source, value, trajectory=trajectory or str(random.random()), tokens=tokens, steps=steps)

    return one


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1000)), min_size=2, max_size=50))
def test_the_correlation_is_pearsons(pairs: list[tuple[float, float]]) -> None:
    line = Line()
    for x, y in pairs:
        line.add(x, y)
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    if statistics.pstdev(xs) > 1e-3 and statistics.pstdev(ys) > 1e-3:
        assert line.correlation == pytest.approx(statistics.correlation(xs, ys), abs=1e-6)
    else:
        assert math.isfinite(line.correlation)


def test_sources_that_disagree_are_named_and_each_trajectory_counts_once(health: RewardHealth, say: Say) -> None:
    for n in range(40):
        for _ in range(3):  # the same judgement told again is no further agreement
            say("judge", 1.0, trajectory=f"t{n}")
            say("user", 1.0 if n < 10 else -1.0, trajectory=f"t{n}")
    pair = health.sums.pairs["judge user"]
    assert (pair.both, pair.same) == (40, 10)
    assert any("judge and user agree on 25%" in warning for warning in warnings_of(health.sums))


def test_a_source_that_pays_for_length_is_named_and_one_that_does_not_is_not(health: RewardHealth, say: Say) -> None:
    rng = random.Random(1)
    for _ in range(200):
        tokens = rng.randrange(10, 500)
        say("long", tokens / 250 - 1, tokens=tokens)
        say("fair", rng.choice((-1.0, 1.0)), tokens=tokens)
    warnings = [warning for warning in warnings_of(health.sums) if "long answers" in warning]
    assert len(warnings) == 1
    assert warnings[0].startswith("long pays for")


def test_a_source_that_pays_for_many_calls_is_named(health: RewardHealth, say: Say) -> None:
    for n in range(120):
        say("tool-outcome", 1.0 if n % 2 else -1.0, steps=9 if n % 2 else 1)
    assert any("many calls" in warning for warning in warnings_of(health.sums))


def test_drift_is_seen_and_a_young_source_has_none(health: RewardHealth, say: Say) -> None:
    rng = random.Random(2)
    for _ in range(300):
        say("judge", rng.choice((-1.0, 1.0, 1.0)))
    assert not any("of late" in warning for warning in warnings_of(health.sums))
    for _ in range(150):
        say("judge", rng.choice((-1.0, -1.0, -1.0, 1.0)))
    assert any("of late" in warning for warning in warnings_of(health.sums))


def test_what_a_young_source_says_of_late_is_the_mean_and_not_its_first_word() -> None:
    source = Source()
    for value in (1.0, -1.0, -1.0, -1.0):
        source.add(value, tokens=3, steps=1)
    assert source.fast == pytest.approx(-0.5)
    assert source.drift == pytest.approx(0.0)


def test_a_source_that_always_says_the_same_is_named(health: RewardHealth, say: Say) -> None:
    for _ in range(100):
        say("rule", 1.0)
    assert any("rule says the same" in warning for warning in warnings_of(health.sums))
    assert report_of(health.sums)["sources"]["rule"]["histogram"] == [0, 0, 0, 0, 100]  # type: ignore[index]


def test_made_up_sources_do_not_grow_the_account_without_end(health: RewardHealth, say: Say) -> None:
    for n in range(MAX_SOURCES + 50):
        say(f"s{n}", 0.5)
    assert len(health.sums.sources) == MAX_SOURCES + 1
    assert health.sums.sources[OTHERS].count == 50


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.open(tmp_path, KnownKey.of(bytes(32)), writer=True) as opened:
        yield opened


def kept(name: str, *, run: str) -> KeptStep:
    step = Step(
        step_id=name,
        session_id="s",
        run_id=run,
        prompt_ids=[1],
        response_ids=[2, 3],
        response_logprobs=[-1.0, -1.0],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    return KeptStep(step=step, messages=[], reply={}, started_ms=1, finished_ms=2)


def judgement(name: str, target: Target, target_id: str, *, source: str, value: float = 1.0) -> Signal:
    return Signal(signal_id=name, target=target, target_id=target_id, source=source, value=value, created_ms=1)


def test_the_account_follows_the_pool_goes_on_after_a_restart_and_counts_nothing_twice(pool: Pool) -> None:
    for name in ("a", "b"):
        pool.keep_step(kept(name, run="r")).result()
    pool.keep_signal(judgement("1", Target.RUN, "r", source="judge")).result()
    pool.keep_signal(judgement("2", Target.STEP, "b", source="user", value=-1.0)).result()
    watch = HealthWatch(pool)
    assert watch.catch_up() == 2
    assert watch.catch_up() == 0
    sums = kept_sums(pool)
    assert sums.sources["judge"].lengths.mean_y == 4  # both steps of the run, two tokens each
    assert sums.sources["user"].lengths.mean_y == 2
    assert sums.pairs["judge user"].both == 1  # a step and its run are one trajectory
    pool.keep_signal(judgement("3", Target.RUN, "r", source="judge")).result()
    again = HealthWatch(pool)
    assert again.catch_up() == 1
    assert kept_sums(pool).sources["judge"].count == 2
    names = {metric.name for metric in again.collect()}
    assert "clawloop_signals" in names


def test_what_is_remembered_names_no_trajectory(pool: Pool) -> None:
    pool.keep_step(kept("step-canary", run="run-canary")).result()
    pool.keep_signal(judgement("1", Target.RUN, "run-canary", source="judge")).result()
    HealthWatch(pool).catch_up()
    assert b"canary" not in msgspec.msgpack.encode(kept_sums(pool))
    assert isinstance(kept_sums(pool), Sums)

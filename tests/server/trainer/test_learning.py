"""What an optimizer step learns from: whole groups, rewards by trajectory or by step, and nothing by chance of
arrival."""

import dataclasses
import math
import random
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.learning import Lessons, prepare
from clawloop_server.trainer.loop import TrainState, run_round
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.advantages import AdvantageState
from clawloop_shared.lessons import OPENING_TOKENS, batches, key_of, length_metrics, rewards_of, source_metrics, spread
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Hint, Policy, Sampling, Signal, Step, Target, Trajectory
from clawloop_shared.rows import Limits, Sample
from clawloop_shared.signals import DEFAULT_RULES, RewardRules, reward_of

LIMITS = Limits(line_id="line", vocab_size=320, max_tokens=200)


def step(name: str, *, prompt: list[int] | None = None, at_ms: int = 0) -> Step:
    rng = random.Random(name)
    return Step(
        step_id=name,
        session_id=f"session of {name.partition('.')[0]}",
        run_id=f"run of {name.partition('.')[0]}",
        prompt_ids=prompt or [2, 3, 4, rng.randrange(5, 300)],
        response_ids=[rng.randrange(2, 320) for _ in range(3)],
        response_logprobs=[-rng.uniform(5.4, 6.2) for _ in range(3)],
        policy=Policy("line", 3),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=at_ms,
    )


def said(target: Target, name: str, value: float, *, source: str = "user", weight: float = 1.0) -> Signal:
    return Signal(
        signal_id=f"{source} of {target} {name}",
        target=target,
        target_id=name,
        source=source,
        value=value,
        created_ms=1,
        weight=weight,
    )


def trajectory(
    name: str, *signals: Signal, steps: int = 2, group: str = "", device: str = "", value: float = 1.0
) -> Trajectory:
    words = list(signals) or [said(Target.RUN, f"run of {name}", value)]
    reward = reward_of(words)
    assert reward is not None
    return Trajectory(
        trajectory_id=name,
        steps=[step(f"{name}.{n}", at_ms=n) for n in range(steps)],
        signals=words,
        reward=reward.value,
        weight=reward.weight,
        group_id=group,
        device_id=device,
    )


def some(count: int, *, groups: int = 0, seed: int = 0) -> list[Trajectory]:
    rng = random.Random(seed)
    return [
        trajectory(
            f"t{n:03}",
            said(Target.RUN, f"run of t{n:03}", rng.choice((-1.0, 1.0))),
            said(Target.STEP, f"t{n:03}.0", rng.choice((-1.0, 0.0, 1.0)), source="judge"),
            group=f"g{n % groups}" if groups and n % 3 else "",
            device=f"device {n % 4}",
        )
        for n in range(count)
    ]


# batches


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
    st.integers(0, 5),
)
def test_no_group_is_split_and_updates_are_as_equal_as_groups_allow(
    sizes: list[int], wanted: int, rng: random.Random, seed: int
) -> None:
    settings = TrainSettings(batch_trajectories=wanted)
    given_now = [
        Trajectory(
            trajectory_id=f"{group}.{n}",
            steps=[],
            signals=[],
            reward=0.0,
            weight=1.0,
            group_id=f"g{group}" if size > 1 else "",
        )
        for group, size in enumerate(sizes)
        for n in range(size)
    ]
    found = batches(given_now, settings, seed=f"{seed}")
    names = [[t.trajectory_id for t in batch] for batch in found]
    assert sorted(name for batch in names for name in batch) == sorted(t.trajectory_id for t in given_now)
    for group in range(len(sizes)):
        assert sum(any(name.startswith(f"{group}.") for name in batch) for batch in names) == 1
    lengths = sorted(map(len, names))
    assert lengths[0] > 0
    assert lengths[-1] - lengths[0] <= max(sizes)
    assert len(names) <= math.ceil(len(given_now) / wanted)
    rng.shuffle(given_now)
    assert [[t.trajectory_id for t in b] for b in batches(given_now, settings, seed=f"{seed}")] == names


def test_single_trajectories_fill_updates_evenly_in_an_order_of_the_seed() -> None:
    settings = TrainSettings(batch_trajectories=4)
    found = [batches(some(13), settings, seed=seed) for seed in ("a", "b", "a")]
    assert sorted(map(len, found[0])) == [3, 3, 3, 4]
    assert found[0] == found[2] != found[1]


def test_a_group_larger_than_an_update_makes_a_larger_update() -> None:
    large = [trajectory(f"large {n}", group="g") for n in range(9)]
    found = batches([*large, *some(3)], TrainSettings(batch_trajectories=4), seed="s")
    assert sorted(map(len, found)) == [1, 2, 9]


# rewards


def test_a_trajectory_is_rewarded_as_one() -> None:
    both = [trajectory("a", value=1.0), trajectory("b", said(Target.RUN, "run of b", -0.5, source="judge"), group="g")]
    places, rewarded = rewards_of(both, TrainSettings(), rules=DEFAULT_RULES)
    assert [(p.trajectory, p.step) for p in places] == [(0, None), (1, None)]
    assert [(r.reward, r.confidence, r.group) for r in rewarded] == [(1.0, 1.0, ""), (0.25, 0.5, "g")]


def test_by_step_each_has_its_own_word_and_what_comes_after_discounted() -> None:
    one = trajectory(
        "a",
        said(Target.STEP, "a.0", -1.0, source="judge"),
        said(Target.RUN, "run of a", 1.0),
        steps=3,
    )
    settings = TrainSettings(credit="step", discount=0.5)
    places, rewarded = rewards_of([one], settings, rules=DEFAULT_RULES)
    assert [(p.trajectory, p.step, p.part) for p in places] == [(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0)]
    assert [r.position for r in rewarded] == [0, 1, 2]
    # The judge's word counts half beside the user's: -.5 * .5 + .25 * .5, in units of a range of two.
    assert [r.reward for r in rewarded] == pytest.approx([-0.25 + 0.125, 0.25, 0.5])


def test_a_step_after_which_nothing_was_said_is_not_learned_from() -> None:
    one = trajectory("a", said(Target.STEP, "a.0", 1.0), said(Target.STEP, "a.1", 1.0, source="tool-outcome"), steps=2)
    settings = TrainSettings(credit="step")
    places, rewarded = rewards_of([one], settings, rules=DEFAULT_RULES)
    assert [(p.step, r.reward) for p, r in zip(places, rewarded, strict=True)] == [(0, pytest.approx(0.6)), (1, 0.5)]
    silent = RewardRules(weights={"tool-outcome": 0.0})
    places, rewarded = rewards_of([one], settings, rules=silent)
    assert [(p.step, r.reward) for p, r in zip(places, rewarded, strict=True)] == [(0, 0.5)]


def test_a_step_that_is_less_sure_than_its_trajectory_teaches_less() -> None:
    one = trajectory("a", said(Target.STEP, "a.0", 1.0), said(Target.STEP, "a.1", 1.0, source="judge"), steps=2)
    places, rewarded = rewards_of([one], TrainSettings(credit="step"), rules=DEFAULT_RULES)
    assert [(p.part, r.confidence) for p, r in zip(places, rewarded, strict=True)] == [(1.0, 1.0), (0.5, 0.5)]
    assert spread([one], places, [2.0, 2.0], hinted=()) == [[2.0, 1.0]]


def test_what_teaches_nothing_has_no_sample_unless_a_hint_is_to_teach_it() -> None:
    both = [trajectory("a"), trajectory("b")]
    places, _ = rewards_of(both, TrainSettings(), rules=DEFAULT_RULES)
    hints = {(0, "a.1"): Hint("a.1", 1, [5])}
    assert spread(both, places, [None, -1.0], hinted=hints) == [[None, 0.0], [-1.0, -1.0]]


# keys and metrics


def test_the_key_tells_devices_and_openings_apart_and_names_nobody() -> None:
    def key(device: str, prompt: list[int]) -> tuple[str, ...]:
        one = trajectory("a", device=device)
        return key_of(msgspec.structs.replace(one, steps=[step("a.0", prompt=prompt), *one.steps[1:]]))

    agent, other = list(range(OPENING_TOKENS)), list(range(1, OPENING_TOKENS + 1))
    assert key("mac", [*agent, 7]) == key("mac", [*agent, 8, 9])
    assert key("mac", agent)[0] == key("mac", other)[0]
    assert len({key("mac", agent), key("mac", other), key("pc", agent), key("mac", agent[:-1])}) == 4
    assert len(key("mac", agent[:-1])) == 1
    assert "mac" not in "".join(key("mac", agent))


def test_lengths_are_told_apart_by_what_is_encouraged() -> None:
    def sample(advantages: list[float]) -> Sample:
        return Sample("s", 0, [1] * 9, range(1, 1 + len(advantages)), [0.0] * len(advantages), advantages)

    found = length_metrics([sample([1.0] * 4), sample([1.0, -0.5]), sample([-1.0] * 5), sample([0.0])])
    assert found == {"length_positive": 3.0, "length_negative": 5.0}
    assert length_metrics([]) == {"length_positive": 0.0, "length_negative": 0.0}


def test_what_each_source_says_is_logged_and_names_of_devices_are_not() -> None:
    both = [
        trajectory("a", said(Target.RUN, "r", 1.0), said(Target.RUN, "r", -1.0, source="any name")),
        trajectory("b", said(Target.RUN, "r", 0.0), said(Target.RUN, "r", 0.5, source="mine")),
    ]
    found = source_metrics(both, RewardRules(weights={"mine": 0.3}))
    assert found == {"reward/user": 0.5, "reward/other": -1.0, "reward/mine": 0.5}


# rounds


def taught(engine: TrainEngine, batch: list[Trajectory], *, rules: RewardRules = DEFAULT_RULES) -> Lessons:
    limits = Limits(line_id="line", vocab_size=320, max_tokens=200, rules=rules)
    return prepare(batch, engine, tracked=AdvantageState(), version=3, limits=limits)


def opened(folder: Path, **settings: object) -> TrainEngine:
    loss = LossSettings(veto=0.0, max_trajectory_share=1.0)
    values = {"rank": 4, "warmup_updates": 1, "batch_trajectories": 5, "loss": loss} | settings
    return TrainEngine.open(folder, TrainSettings(**values))  # type: ignore[arg-type]


def test_a_group_is_compared_within_itself_and_one_that_agrees_is_left_out(tiny_folder: Path) -> None:
    batch = [
        trajectory("a", group="split", value=1.0),
        trajectory("b", group="split", value=-1.0),
        trajectory("c", group="flat", value=1.0),
        trajectory("d", group="flat", value=1.0),
    ]
    found = taught(opened(tiny_folder), batch)
    assert {s.trajectory for s in found.samples} == {0, 1}
    assert {s.advantages[0] for s in found.samples} == {1.0, -1.0}
    assert found.metrics["groups"] == 2.0
    assert (found.metrics["flat_groups"], found.metrics["unused_trajectories"]) == (1.0, 2.0)
    assert (found.metrics["advantage_mean"], found.metrics["advantage_std"]) == (0.0, 1.0)


def test_a_round_in_which_every_group_agrees_moves_nothing(tiny_folder: Path) -> None:
    engine = opened(tiny_folder)
    before = engine.adapter()
    flat = [trajectory(name, group="flat", value=1.0) for name in "ab"]
    result = run_round(engine, flat, state=TrainState(version=3), limits=LIMITS)
    assert result.trajectory_ids == ["a", "b"]
    assert result.updates[0]["tokens"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.adapter().items())


def test_by_step_one_trajectory_encourages_one_call_and_discourages_another(tiny_folder: Path) -> None:
    engine = opened(tiny_folder, credit="step", discount=0.0)
    batch = [
        trajectory(name, *(said(Target.STEP, f"{name}.{n}", v) for n, v in enumerate(values)))
        for name, values in {"a": (1.0, -1.0), "b": (-1.0, 1.0)}.items()
    ]
    found = {s.step_id: s.advantages[0] for s in taught(engine, batch).samples}
    assert found == {"a.0": 1.0, "a.1": -1.0, "b.0": -1.0, "b.1": 1.0}


def test_the_rules_of_the_server_weigh_the_words_on_single_steps(tiny_folder: Path) -> None:
    engine = opened(tiny_folder, credit="step")
    batch = [
        trajectory(
            name, said(Target.STEP, f"{name}.0", -v, source="judge"), said(Target.RUN, f"run of {name}", v), steps=2
        )
        for name, v in {"a": 1.0, "b": -1.0}.items()
    ]
    heard = {s.step_id: s.advantages[0] for s in taught(engine, batch).samples}
    unheard = taught(engine, batch, rules=RewardRules(weights={"judge": 0.0})).samples
    assert heard["a.0"] < heard["a.1"]
    assert {s.step_id: s.advantages[0] for s in unheard} == {"a.0": 1.0, "a.1": 1.0, "b.0": -1.0, "b.1": -1.0}


@pytest.mark.parametrize("credit", ["trajectory", "step"])
@pytest.mark.parametrize("advantage", ["ema", "tracker"])
def test_the_order_of_arrival_never_matters(tiny_folder: Path, advantage: str, credit: str) -> None:
    results, adapters = [], []
    for seed in range(2):
        arrived = some(14, groups=3)
        random.Random(seed).shuffle(arrived)
        engine = opened(tiny_folder, advantage=advantage, credit=credit, discount=0.9)
        results.append(run_round(engine, arrived, state=TrainState(version=3), limits=LIMITS))
        adapters.append(engine.adapter())
    assert results[0] == results[1]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())
    for metric in ("length_positive", "length_negative", "entropy", "surprise", "reward/user", "clipped"):
        assert all(metric in update for update in results[0].updates)
    assert any(bool(tensor.any()) for name, tensor in adapters[0].items() if "lora_B" in name)


@pytest.mark.parametrize("policy", ["tis", "ppo", "gspo", "cispo"])
def test_the_gradient_does_not_depend_on_how_rows_are_filled(tiny_folder: Path, policy: str) -> None:
    """Trajectories that rows split are judged whole: masks bite the same with rows of one call as with one for all."""
    samples = [
        Sample(
            step_id=s.step_id,
            trajectory=n // 3,
            token_ids=s.token_ids,
            trained=range(4, 7),
            logprobs=s.logprobs,
            advantages=[(-1.0, 0.7)[n % 2]] * 3,
            version_gap=3 if n == 11 else 0,  # one call of the last trajectory is stale
        )
        for n, s in enumerate(step(f"{n}") for n in range(12))
    ]
    rng, mine = random.Random(5), opened(tiny_folder).logprobs(samples)
    samples = [
        dataclasses.replace(s, logprobs=[p - rng.uniform(-0.4, 0.3) - 0.5 * (s.trajectory == 1) for p in own])
        for s, own in zip(samples, mine, strict=True)
    ]
    found, kept = [], []
    for row_tokens in (7, 4096):
        loss = LossSettings(
            policy=policy, veto=0.1, geometric_low=0.6, geometric_high=1.2, opsm_delta=0.0, max_staleness_versions=2
        )
        engine = opened(tiny_folder, row_tokens=row_tokens)
        sums = engine.forward_backward(samples, loss)
        kept.append({name: value for name, value in sums.metrics().items() if name.startswith("kept")})
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.requires_grad})
    assert kept[0] == kept[1]
    assert kept[0]["kept_stale"] == 0.75
    assert 0.0 < kept[0]["kept"] < 0.75
    assert kept[0]["kept_geometric"] == 0.75
    assert kept[0]["kept_opsm"] < 1.0
    largest = max(float(g.abs().max()) for g in found[1].values())
    assert largest > 0
    worst = max(float((g - found[1][name]).abs().max()) for name, g in found[0].items())
    assert worst < 1e-5 * max(1.0, largest)

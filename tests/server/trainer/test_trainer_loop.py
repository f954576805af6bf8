"""A round: what may not be learned from stays out and is named, the rest is learned, the same way every time."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from clawloop_server.errors import TrainerError
from clawloop_server.trainer.engine import OversizedSamples, PoisonedSamples, TrainEngine, UnusableSamples
from clawloop_server.trainer.generation import Sampling as Drawing
from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.loop import NothingFinite, TrainState, run_round, run_update
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.advantages import AdvantageState
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Channel, Policy, Sampling, Step, Trajectory
from clawloop_shared.rows import Limits, Sample, make_samples, screen
from clawloop_shared.whole_step import Sums

QUESTION = list(range(2, 30))
LIMITS = Limits(line_id="line", vocab_size=320, max_tokens=64)


def step(name: str = "s", **fields: object) -> Step:
    values: dict[str, object] = {
        "step_id": name,
        "session_id": "session",
        "run_id": "run",
        "prompt_ids": [5, 6, 7],
        "response_ids": [8, 9],
        "response_logprobs": [-5.5, -6.0],
        "policy": Policy("line", 3),
        "sampling": Sampling(temperature=0.9),
        "finish_reason": "stop",
        "created_ms": 1,
    }
    return Step(**(values | fields))  # type: ignore[arg-type]


def trajectory(name: str, *steps: Step, reward: float = 1.0, weight: float = 1.0) -> Trajectory:
    return Trajectory(trajectory_id=name, steps=list(steps) or [step(name)], signals=[], reward=reward, weight=weight)


def test_a_step_becomes_a_sample_token_for_token() -> None:
    (sample,) = make_samples([trajectory("t", weight=0.3)], [[1.5]], version=5)
    assert sample == Sample(
        step_id="t",
        trajectory=0,
        token_ids=[5, 6, 7, 8, 9],
        trained=[3, 4],
        logprobs=[-5.5, -6.0],
        advantages=[1.5, 1.5],
        weight=0.3,
        temperature=0.9,
        version_gap=2,
    )


def test_a_masked_logprob_is_context_and_never_a_number() -> None:
    masked = step("m", response_ids=[8, 9, 4], response_logprobs=[-5.5, None, -6.0], redacted=[(4, 1)])
    (sample,) = make_samples([trajectory("t", masked)], [[1.5]], version=3)
    assert sample.token_ids == [5, 6, 7, 8, 9, 4]
    assert (sample.trained, sample.logprobs, sample.advantages) == ([3, 5], [-5.5, -6.0], [1.5, 1.5])


REJECTED: list[tuple[str, dict[str, object]]] = [
    ("logprob missing", {"response_logprobs": [-1.0]}),
    ("logprob not finite", {"response_logprobs": [-1.0, float("nan")]}),
    ("logprob not finite", {"response_logprobs": [-1.0, float("-inf")]}),
    ("redaction left nothing to learn from", {"response_logprobs": [None, None], "redacted": [(3, 2)]}),
    ("marked untrainable", {"untrainable": "incognito"}),
    ("not for training", {"channel": Channel.VAL}),
    ("another model line", {"policy": Policy("other")}),
    ("temperature out of range", {"sampling": Sampling(temperature=1e-20)}),
    ("temperature out of range", {"sampling": Sampling(temperature=math.inf)}),
    ("logprob out of range", {"response_logprobs": [-1e300, -1.0]}),
    ("sampler cut the distribution", {"sampling": Sampling(top_p=0.9)}),
    ("temperature without a distribution", {"sampling": Sampling(temperature=0.0)}),
    ("empty prompt or response", {"response_ids": [], "response_logprobs": []}),
    ("longer than the context", {"prompt_ids": [5] * 63}),
    ("token outside the vocabulary", {"prompt_ids": [320]}),
    ("token outside the vocabulary", {"prompt_ids": [-1]}),
]


@pytest.mark.parametrize(("reason", "fields"), REJECTED)
def test_a_step_that_may_not_be_learned_from_is_rejected_and_counted(reason: str, fields: dict[str, object]) -> None:
    mixed = trajectory("mixed", step("good"), step("bad", **fields))
    alone = trajectory("alone", step("bad", **fields))
    found = screen([mixed, alone], LIMITS)
    assert found.rejected_steps == Counter({reason: 2})
    assert [[s.step_id for s in t.steps] for t in found.trajectories] == [["good"]]
    assert found.rejected_trajectories == {"alone": reason}


def test_a_trajectory_without_a_usable_reward_is_rejected() -> None:
    bad = [trajectory("nan", reward=float("nan")), trajectory("weightless", weight=0.0)]
    assert screen(bad, LIMITS).rejected_trajectories == dict.fromkeys(("nan", "weightless"), "no usable reward")


@pytest.fixture
def fresh(tiny_folder: Path) -> Callable[[], TrainEngine]:
    """Engines that all begin the same."""
    settings = TrainSettings(
        rank=4, warmup_updates=1, batch_trajectories=4, updates_per_round=3, loss=LossSettings(veto=0.0)
    )
    return lambda: TrainEngine.open(tiny_folder, settings)


def some(count: int, *, seed: int = 0) -> list[Trajectory]:
    rng = random.Random(seed)
    found = []
    for n in range(count):
        steps = [
            step(
                f"{n}.{i}",
                prompt_ids=[2, 3, 4, 5 + n, *range(6, 8 + i)],
                response_ids=[rng.randrange(2, 320) for _ in range(3)],
                response_logprobs=[-rng.uniform(5, 6.5) for _ in range(3)],
            )
            for i in range(2)
        ]
        found.append(trajectory(f"t{n:03}", *steps, reward=rng.choice((-1.0, 1.0))))
    return found


def test_a_round_is_the_same_whatever_the_order_of_arrival(fresh: Callable[[], TrainEngine]) -> None:
    results, engines = [], []
    for order in (some(12), list(reversed(some(12)))):
        engine = fresh()
        results.append(run_round(engine, order, state=TrainState(version=3), limits=LIMITS))
        engines.append(engine.adapter())
    assert results[0] == results[1]
    assert all(torch.equal(engines[0][name], tensor) for name, tensor in engines[1].items())
    assert results[0].state.updates == 3
    assert results[0].state.rounds == 1
    assert [u["trajectories"] for u in results[0].updates] == [4.0, 4.0, 4.0]


def test_a_masked_token_gives_the_very_gradients_of_a_loss_without_it(fresh: Callable[[], TrainEngine]) -> None:
    rng, found = random.Random(7), []
    whole = [
        step(f"{n}", prompt_ids=[2, 3, 5 + n], response_ids=[rng.randrange(2, 320) for _ in range(6)]) for n in range(4)
    ]
    kept = [[at for at in range(6) if rng.random() < 0.5] or [0] for _ in whole]
    logprobs = [[-rng.uniform(5, 6.5) for _ in range(6)] for _ in whole]
    masked = [
        msgspec.structs.replace(
            one, response_logprobs=[p if at in keep else None for at, p in enumerate(own)], redacted=[(0, 1)]
        )
        for one, keep, own in zip(whole, kept, logprobs, strict=True)
    ]
    trajectories = [trajectory(one.step_id, one) for one in masked]
    for samples in (
        make_samples(trajectories, [[1.0], [-0.5], [2.0], [-1.0]], version=3),
        [
            Sample(
                step_id=one.step_id,
                trajectory=n,
                token_ids=one.token_ids,
                trained=[3 + at for at in keep],
                logprobs=[own[at] for at in keep],
                advantages=[(1.0, -0.5, 2.0, -1.0)[n]] * len(keep),
                temperature=0.9,
            )
            for n, (one, keep, own) in enumerate(zip(whole, kept, logprobs, strict=True))
        ],
    ):
        engine = fresh()
        sums = engine.forward_backward(samples, engine.settings.loss)
        assert sums.tokens == sum(map(len, kept))
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.requires_grad})
    assert any(bool(gradient.any()) for gradient in found[0].values())
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_a_masked_token_weighs_nothing_whatever_its_id(fresh: Callable[[], TrainEngine]) -> None:
    """The last token is context of none, so only its own loss could tell one id from another."""
    found = []
    for last in (9, 200):
        masked = step("m", response_ids=[8, last], response_logprobs=[-5.5, None], redacted=[(4, 1)])
        engine = fresh()
        engine.forward_backward(make_samples([trajectory("t", masked)], [[1.0]], version=3), engine.settings.loss)
        found.append({name: p.grad for name, p in engine.model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(gradient, found[1][name], atol=1e-7) for name, gradient in found[0].items())


@pytest.mark.parametrize("advantage", ["tracker", "ema"])
def test_a_round_learns_from_redacted_steps_beside_whole_ones(tiny_folder: Path, advantage: str) -> None:
    settings = TrainSettings(
        rank=4, warmup_updates=1, batch_trajectories=4, advantage=advantage, loss=LossSettings(veto=0.0)
    )
    engine = TrainEngine.open(tiny_folder, settings)
    whole = some(4)
    masked = [
        msgspec.structs.replace(one, response_logprobs=[None, None, *one.response_logprobs[2:]], redacted=[(0, 3)])
        for one in whole[0].steps
    ]
    mixed = [msgspec.structs.replace(whole[0], steps=masked), *whole[1:]]
    result = run_round(engine, mixed, state=TrainState(version=3), limits=LIMITS)
    assert (result.steps, result.rejected_steps, result.set_aside) == (8, {}, {})
    assert result.updates[0]["tokens"] == 3 * 6 + 2
    assert 0.0 < result.updates[0]["gradient_norm"] < float("inf")


def test_the_next_round_goes_on_where_the_last_one_was_saved(fresh: Callable[[], TrainEngine], tmp_path: Path) -> None:
    engine = fresh()
    first = run_round(engine, some(12), state=TrainState(version=3), limits=LIMITS)
    engine.save_state(tmp_path / "c", text=msgspec.json.encode(first.state).decode())
    second = run_round(engine, some(12, seed=1), state=first.state, limits=LIMITS)
    other = fresh()
    state = msgspec.json.decode(other.load_state(tmp_path / "c"), type=TrainState)
    assert run_round(other, some(12, seed=1), state=state, limits=LIMITS) == second
    mine = engine.adapter()
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.adapter().items())


@pytest.mark.parametrize("error", [PoisonedSamples, OversizedSamples])
def test_a_trajectory_that_cannot_be_used_is_set_aside_and_named_and_the_rest_goes_on(
    fresh: Callable[[], TrainEngine], monkeypatch: pytest.MonkeyPatch, error: type[UnusableSamples]
) -> None:
    engine = fresh()
    whole = engine.forward_backward

    def forward_backward(samples: list[Sample], settings: LossSettings) -> Sums:
        bad = [s.trajectory for s in samples if s.step_id.startswith("5.")]
        if bad:
            raise error(bad)
        return whole(samples, settings)

    monkeypatch.setattr(engine, "forward_backward", forward_backward)
    result = run_round(engine, some(12), state=TrainState(version=3), limits=LIMITS)
    assert result.set_aside == {"t005": error.reason}
    assert len(result.trajectory_ids) == 11
    assert "t005" not in result.trajectory_ids
    assert sorted(u["trajectories"] for u in result.updates) == [3.0, 4.0, 4.0]


def test_a_batch_that_is_all_poisoned_is_not_the_datas_fault(
    fresh: Callable[[], TrainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fresh()

    def forward_backward(samples: list[Sample], settings: LossSettings) -> Sums:
        raise PoisonedSamples(sorted({s.trajectory for s in samples}))

    monkeypatch.setattr(engine, "forward_backward", forward_backward)
    with pytest.raises(NothingFinite, match="none of 4 trajectories of an update are finite"):
        run_round(engine, some(4), state=TrainState(version=3), limits=LIMITS)


def test_an_update_without_a_finite_gradient_moves_no_baseline(
    fresh: Callable[[], TrainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fresh()
    before = TrainState(version=3, entropy=1.5, advantages=AdvantageState(means={0: 0.25}, drift=0.01))
    monkeypatch.setattr(engine, "optim_step", lambda lr: math.nan)
    done = run_update(engine, some(4), state=before, limits=LIMITS)
    assert done.metrics["skipped_steps"] == 1.0
    assert done.state == msgspec.structs.replace(before, updates=1)


def test_a_batch_of_which_nothing_fits_the_memory_leaves_the_baseline_alone(
    fresh: Callable[[], TrainEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = fresh()

    def forward_backward(samples: list[Sample], settings: LossSettings) -> Sums:
        raise OversizedSamples(sorted({s.trajectory for s in samples}))

    monkeypatch.setattr(engine, "forward_backward", forward_backward)
    result = run_round(engine, some(4), state=TrainState(version=3), limits=LIMITS)
    assert result.trajectory_ids == []
    assert result.state.advantages == TrainState().advantages


def test_a_round_of_nothing_usable_says_why(fresh: Callable[[], TrainEngine]) -> None:
    with pytest.raises(TrainerError, match="another model line"):
        run_round(fresh(), [trajectory("t", step(policy=Policy("other")))], state=TrainState(), limits=LIMITS)


def bandit(engine: TrainEngine, *, good: int, version: int, rng: random.Random) -> Iterator[Trajectory]:
    """64 one-token answers to one question, rewarded for token `good` alone."""
    prompt = QUESTION
    drawing = Drawing(max_tokens=1, eos_ids=frozenset({1}), seed=rng.randrange(1 << 30))
    replies = engine.generate([prompt] * 64, sampling=drawing)
    samples = [Sample(f"{n}", n, prompt + reply.ids, [len(prompt)], [0.0], [0.0]) for n, reply in enumerate(replies)]
    for n, (reply, logprobs) in enumerate(zip(replies, engine.logprobs(samples), strict=True)):
        one = step(
            f"{n}",
            prompt_ids=prompt,
            response_ids=reply.ids,
            response_logprobs=logprobs,
            policy=Policy("line", version),
            sampling=Sampling(),
        )
        yield trajectory(f"t{n:03}", one, reward=1.0 if reply.ids == [good] else -1.0)


def test_what_is_rewarded_becomes_likely(tiny_folder: Path) -> None:
    settings = TrainSettings(
        rank=4, warmup_updates=1, lr=2e-2, batch_trajectories=64, updates_per_round=1, loss=LossSettings(kl_beta=0.0)
    )
    engine, state, rng = TrainEngine.open(tiny_folder, settings), TrainState(), random.Random(0)
    question = torch.tensor([QUESTION])
    chances = engine.model(input_ids=question).logits[0, -1].softmax(-1)
    good = int(chances.argsort(descending=True)[1])
    before = float(chances[good].detach())
    for version in range(20):
        batch = list(bandit(engine, good=good, version=version, rng=rng))
        state = msgspec.structs.replace(run_round(engine, batch, state=state, limits=LIMITS).state, version=version + 1)
    after = float(engine.model(input_ids=question).logits[0, -1].softmax(-1)[good].detach())
    assert before < 0.3
    assert after > before + 0.3


@pytest.mark.parametrize(("lr", "says"), [(2e-2, "the policy collapses"), (1e-3, "")])
def test_the_guard_sees_a_policy_that_collapses_within_a_round(tiny_folder: Path, lr: float, says: str) -> None:
    """Many steps on what one policy sampled: at a rate that is far too high it ends in a few tokens."""
    loss = LossSettings(kl_beta=0.0, opsm_delta=float("inf"), veto=0.0)
    settings = TrainSettings(
        rank=4, warmup_updates=1, lr=lr, batch_trajectories=8, min_ess=0.0, max_entropy_fall=0.25, loss=loss
    )
    engine, rng = TrainEngine.open(tiny_folder, settings), random.Random(0)
    chances = engine.model(input_ids=torch.tensor([QUESTION])).logits[0, -1].softmax(-1)
    good = int(chances.argsort(descending=True)[1])
    batch = [
        msgspec.structs.replace(one, trajectory_id=f"{part}.{one.trajectory_id}")
        for part in range(2)
        for one in bandit(engine, good=good, version=0, rng=rng)
    ]
    result = run_round(engine, batch, state=TrainState(), limits=LIMITS)
    assert result.updates[0]["entropy"] == pytest.approx(result.mean("surprise"), abs=0.3)
    assert says in unhealthy(result.updates, settings)
    assert bool(says) == bool(unhealthy(result.updates, settings))
    assert result.state.entropy < result.updates[0]["entropy"]

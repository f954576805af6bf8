"""The updates of a job: what they train, that they are the server's, that they go on bit for bit, and what they leave
out."""

import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest
import torch

from clawloop_edge.errors import LearnFailed
from clawloop_edge.learn.job import MASKED
from clawloop_edge.learn.lora import first_factors, from_file
from clawloop_edge.learn.memory import sample_bytes
from clawloop_edge.learn.opening import open_job
from clawloop_edge.learn.updates import NOT_FINITE, TOO_LARGE, Progress, plan_of
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import TrainState, run_update
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.advantages import AdvantageState
from clawloop_shared.deltas import DELTA_KIND, LoraDelta, Method, delta_tensors
from clawloop_shared.frozen_factors import frozen_a
from clawloop_shared.levels import Level
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.model_line import read_shape
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Limits

from .home_jobs import LINE, a_job, a_trajectory, finish

MakeAdapter = Callable[..., dict[str, bytes]]


def test_a_job_at_home_is_what_the_server_would_have_done(random_model: Path) -> None:
    job = a_job(random_model, updates=4)
    updates = open_job(job, kept=b"", memory_bytes=0)
    plan = plan_of(job, vocabulary=768, fits=lambda size: True)
    assert [len(batch) for batch in plan.batches] == [3, 3, 3, 3]
    assert plan.first == {0, 2}
    learned = finish(updates).result()

    settings = TrainSettings(rank=4, alpha=8.0, lr=5e-3, warmup_updates=1, hindsight=0.0, dtype="float32", device="cpu")
    engine = TrainEngine.open(random_model, settings)
    first = first_factors(job.task, read_shape(random_model), rank=4, adapter={}).learned
    engine.set_adapter({f"base_model.model.{n}": torch.from_numpy(np.array(a)) for n, a in first.items()})
    state, limits = TrainState(), Limits(LINE, 768, job.max_sample_tokens)
    for number, batch in enumerate(plan.batches):
        if number in plan.first:
            state = msgspec.structs.replace(state, advantages=AdvantageState())
        done = run_update(engine, batch, state=state, limits=limits)
        state = msgspec.structs.replace(
            done.state, advantages=msgspec.structs.replace(done.state.advantages, drift=0.0)
        )
        mine = learned.updates[number]
        for metric in ("loss", "tokens", "k3", "ess", "kept", "k2_base", "entropy", "gradient_norm", "advantage_std"):
            assert mine[metric] == pytest.approx(done.metrics[metric], rel=1e-3, abs=1e-6), (number, metric)
    theirs, found = engine.adapter(), from_file(learned.weights)
    assert {f"base_model.model.{name}" for name in found} == set(theirs)
    for name, array in found.items():
        moved = theirs[f"base_model.model.{name}"].numpy()
        assert np.abs(np.array(array) - moved).max() < 2e-4, name  # four steps of 5e-3
    assert learned.trajectory_ids == [f"t{n:02}" for n in range(6)]
    assert learned.reward == pytest.approx(np.mean([t.reward for t in job.trajectories]))


@pytest.mark.parametrize("method", Method)
def test_each_method_trains_its_own_factor_alone(random_model: Path, make_adapter: MakeAdapter, method: Method) -> None:
    adapter = make_adapter(rank=4, folder=random_model)
    job = a_job(random_model, adapter=adapter, method=method, seed=9)
    shape = read_shape(random_model)
    first = first_factors(job.task, shape, rank=4, adapter=adapter)
    learned = finish(open_job(job, kept=b"", memory_bytes=0)).result()
    delta = LoraDelta(
        task_id="task",
        line_id=LINE,
        base_version=0,
        method=method,
        level=Level.DELTAS,
        rank=4,
        alpha=8.0,
        target_modules=job.task.target_modules,
        weights=learned.weights,
        trajectories=6,
    )
    assert delta_tensors(delta, shape).keys() == first.learned.keys()
    found, served = from_file(learned.weights), from_file(adapter[WEIGHTS_FILE])
    assert all(not mx.array_equal(found[name], start) for name, start in first.learned.items())
    for name, array in first.frozen.items():
        path = name.removesuffix(".lora_A.weight")
        if method is Method.FFA:
            exact = np.frombuffer(frozen_a(9, path, rank=4, inputs=array.shape[1]), "<f4").reshape(array.shape)
            assert np.array_equal(np.array(array), exact)
        else:
            assert mx.array_equal(array, served[f"base_model.model.{name}"])
    assert bool(first.frozen) is method.is_linear
    assert DELTA_KIND == "delta.v1"


def test_all_begin_alike_and_without_an_adapter_rolora_is_ffa(random_model: Path) -> None:
    shape = read_shape(random_model)

    def first(method: Method, seed: int) -> bytes:
        factors = first_factors(a_job(random_model, method=method, seed=seed).task, shape, rank=4, adapter={})
        return b"".join(np.array(array).tobytes() for _, array in sorted({**factors.learned, **factors.frozen}.items()))

    assert first(Method.LORA, 1) == first(Method.FFA, 1) == first(Method.ROLORA_B, 1) != first(Method.LORA, 2)
    with pytest.raises(LearnFailed, match="there is none yet"):
        first(Method.ROLORA_A, 1)


def test_rolora_needs_the_rank_of_the_adapter(random_model: Path, make_adapter: MakeAdapter) -> None:
    job = a_job(random_model, adapter=make_adapter(rank=8, folder=random_model), method=Method.ROLORA_B)
    with pytest.raises(LearnFailed, match=r"max_rank to 8"):
        open_job(job, kept=b"", memory_bytes=0)


def test_another_adapter_than_the_tasks_is_not_learned_on(random_model: Path, make_adapter: MakeAdapter) -> None:
    job = a_job(random_model, adapter=make_adapter(rank=4, folder=random_model))
    other = msgspec.structs.replace(job, adapter=make_adapter(rank=4, seed=2, folder=random_model))
    with pytest.raises(LearnFailed, match="wait for the next task"):
        open_job(other, kept=b"", memory_bytes=0)


def test_it_goes_on_bit_for_bit_after_any_update(random_model: Path) -> None:
    job = a_job(random_model)
    whole, states = open_job(job, kept=b"", memory_bytes=0), list[bytes]()
    while not whole.done:
        whole.step()
        states.append(msgspec.msgpack.encode(whole.progress))
    shuffled = msgspec.structs.replace(job, trajectories=job.trajectories[::-1])
    for state in states:
        again = finish(open_job(shuffled, kept=state, memory_bytes=0))
        assert again.result() == whole.result()


def test_a_state_of_another_job_is_not_gone_on_from(random_model: Path) -> None:
    job = a_job(random_model)
    state = msgspec.msgpack.encode(finish(open_job(job, kept=b"", memory_bytes=0)).progress)
    other = msgspec.structs.replace(job, trajectories=job.trajectories[:4])
    assert not open_job(other, kept=state, memory_bytes=0).done
    assert msgspec.msgpack.decode(state, type=Progress).at_update == 3


def test_what_is_poisoned_is_set_aside_by_name_and_harms_no_other(
    random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawloop_edge.learn.model import LearningModel

    exact = LearningModel.logprobs

    def poisoned(self: LearningModel, sample: object, *, base: bool = False) -> tuple[list[float], float]:
        logprobs, entropy = exact(self, sample, base=base)  # type: ignore[arg-type]
        return ([math.nan] * len(logprobs), math.nan) if sample.step_id == "1.0" else (logprobs, entropy)  # type: ignore[attr-defined]

    monkeypatch.setattr(LearningModel, "logprobs", poisoned)
    learned = finish(open_job(a_job(random_model), kept=b"", memory_bytes=0)).result()
    assert learned.set_aside.pop("t01") == NOT_FINITE
    assert set(learned.set_aside.values()) <= {MASKED}
    assert "t01" not in learned.trajectory_ids
    assert all(mx.isfinite(array).all().item() for array in from_file(learned.weights).values())


def test_rewards_that_agree_teach_nothing_and_that_is_said(random_model: Path) -> None:
    job = a_job(random_model, loss=LossSettings(kl_beta=0.0))
    alike = msgspec.structs.replace(
        job, trajectories=[msgspec.structs.replace(t, reward=1.0) for t in job.trajectories]
    )
    updates = finish(open_job(alike, kept=b"", memory_bytes=0))
    with pytest.raises(LearnFailed, match="judged alike"):
        updates.result()


def test_what_does_not_fit_the_memory_is_set_aside_and_the_rest_is_learned(random_model: Path) -> None:
    job = a_job(random_model)
    long = a_trajectory(50, steps=1, tokens=900, response=500)
    plan = plan_of(
        msgspec.structs.replace(job, trajectories=[*job.trajectories, long]),
        vocabulary=768,
        fits=lambda size: size[0] < 500,
    )
    assert plan.set_aside == {"t50": TOO_LARGE}
    with pytest.raises(LearnFailed, match=r"may take 1000000; raise \[learn\] max_memory_bytes"):
        open_job(job, kept=b"", memory_bytes=1_000_000)


@pytest.mark.parametrize("tokens", [64, 300, 600])
def test_a_gradient_takes_no_more_memory_than_was_said(
    random_model: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawloop_edge.engine.memory import model_sizes
    from clawloop_edge.learn import attention, model
    from clawloop_shared.model_line import read_config
    from clawloop_shared.rows import make_samples

    monkeypatch.setattr(model, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 1 << 18)
    job = a_job(random_model)
    updates = open_job(job, kept=b"", memory_bytes=0)
    one = a_trajectory(1, steps=1, tokens=tokens, response=tokens // 2)
    (sample,) = make_samples([one], [[1.0]], version=0)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    updates._model.gradient(sample, mx.ones(len(sample.trained)), updates._learned)
    sizes = model_sizes(read_config(random_model), dtype_bytes=4)
    bound = sample_bytes(sizes, tokens=tokens, trained=tokens // 2, chunk_bytes=1 << 18, block_bytes=1 << 18) + sum(
        array.nbytes for array in updates._learned.values()
    )
    assert mx.get_peak_memory() - before < bound


def test_what_was_rewarded_becomes_likelier_and_the_rest_less(random_model: Path) -> None:
    job = a_job(random_model, updates=6, batch_trajectories=6, loss=LossSettings(kl_beta=0.0, opsm_delta=math.inf))
    good = [msgspec.structs.replace(t, reward=1.0 if n < 3 else -1.0) for n, t in enumerate(job.trajectories)]
    updates = open_job(msgspec.structs.replace(job, trajectories=good), kept=b"", memory_bytes=0)

    def mean(which: slice) -> float:
        from clawloop_shared.rows import make_samples

        samples = make_samples(good[which], [[1.0] * len(t.steps) for t in good[which]], version=0)
        return float(np.mean([p for sample in samples for p in updates._model.logprobs(sample)[0]]))

    before = mean(slice(0, 3)), mean(slice(3, 6))
    finish(updates)
    assert mean(slice(0, 3)) > before[0] + 0.2
    assert mean(slice(3, 6)) < before[1]

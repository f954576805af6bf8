"""The loss at home is the server's: logprobs, loss, every mask and every gradient, against torch, on plain and on
quantised models, beside a served adapter."""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from clawloop_edge.learn import attention, model
from clawloop_edge.learn.lora import Arrays, Factors, Learner, first_factors, from_file, serving
from clawloop_edge.learn.model import LearningModel
from clawloop_edge.learn.objective import LossInputs, slopes
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.deltas import LearnTask
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.model_line import read_config, read_shape
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

SERVED, LEARNED, SCALE = 3, 4, 2.0
"""ranks, and the scale of what is learned"""
OPEN = {"opsm_delta": math.inf, "veto": 0.0, "max_trajectory_share": 1.0, "kl_beta": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "bare": OPEN,
    "defaults": {},
    "opsm": OPEN | {"opsm_delta": 0.02},
    "veto": OPEN | {"veto": 0.78},
    "band": OPEN | {"geometric_low": 0.95, "geometric_high": 1.3},
    "trust": OPEN | {"trust_region": 1e-4},
    "stale": OPEN | {"max_staleness_versions": 1},
    "pulls": OPEN | {"kl_beta": 0.3, "anchor": 0.2},
    "shares": OPEN | {"max_trajectory_share": 0.3},
}


class Both:
    """One policy in MLX, as a served adapter and what is learned beside it, and in torch, as one stacked adapter."""

    def __init__(self, folder: Path, adapter: dict[str, bytes]) -> None:
        rng = np.random.default_rng(5)
        task = LearnTask(task_id="t", line_id="l", base_version=1, rank=LEARNED)
        factors = first_factors(task, read_shape(folder), rank=LEARNED, adapter=adapter)
        self.learned: Arrays = {
            name: mx.array(rng.normal(0, 0.05, array.shape).astype(np.float32))
            for name, array in factors.learned.items()
        }
        base = load_model(folder)[0]
        learner = Learner(serving(base, adapter), Factors(self.learned, {}), scale=SCALE)
        self.model = LearningModel(base, learner, vocabulary=read_config(folder)["vocab_size"])
        rank = SERVED + LEARNED
        self.engine = TrainEngine.open(
            folder, TrainSettings(rank=rank, alpha=float(rank), dtype="float32", device="cpu")
        )
        served = from_file(adapter[WEIGHTS_FILE])
        self.engine.set_adapter({f"base_model.model.{name}": self._stacked(served, name) for name in self.learned})

    def _stacked(self, served: Arrays, name: str) -> torch.Tensor:
        first, second = np.array(served[f"base_model.model.{name}"]), np.array(self.learned[name])
        if ".lora_A." in name:
            return torch.from_numpy(np.concatenate([first, second], axis=0))
        return torch.from_numpy(np.concatenate([first * 8.0 / SERVED, second * SCALE], axis=1))

    def torch_gradient(self, name: str) -> np.ndarray:
        parameter = self.engine.model.get_parameter(f"base_model.model.{name}".replace(".weight", ".default.weight"))
        assert parameter.grad is not None
        found: np.ndarray = parameter.grad.numpy()
        return found[SERVED:] if ".lora_A." in name else SCALE * found[:, SERVED:]

    def gradient(self, samples: list[Sample], slope_P: Any) -> Arrays:
        total, at = {name: mx.zeros_like(array) for name, array in self.learned.items()}, 0
        for sample in samples:
            part = slope_P[at : at + len(sample.trained)]
            found = self.model.gradient(sample, part, self.learned)
            total, at = {name: array + found[name] for name, array in total.items()}, at + len(sample.trained)
        return total


@pytest.fixture(scope="module", params=[0, 4], ids=["float32", "4-bit"])
def both(
    request: pytest.FixtureRequest,
    random_model: Path,
    make_adapter: Callable[..., dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    folder = random_model
    if request.param:
        folder = tmp_path_factory.mktemp("quantised")
        quantised, config = quantize_model(load_model(random_model)[0], read_config(random_model), 32, 4)
        save_model(folder, quantised)
        save_config(config, folder / "config.json")
    return Both(folder, make_adapter(rank=SERVED, folder=folder, size=0.1))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few positions through the head at a time, and a few queries through attention."""
    monkeypatch.setattr(model, "CHUNK_BYTES", 4 * 768 * 3)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 4 * 16 * 5)


def some_samples(both: Both) -> list[Sample]:
    """Two calls each of three trajectories, not far from who sampled them; some tokens of a response are unknown."""
    rng, found = random.Random(1), list[Sample]()
    for number in range(6):
        tokens = [rng.randrange(3, 700) for _ in range(16)]
        trained = [at for at in range(11, 16) if at != 13]
        trajectory, advantage = number // 2, rng.uniform(0.5, 2) * (-1) ** number
        sample = Sample(
            step_id=str(number),
            trajectory=7 - trajectory,
            token_ids=tokens,
            trained=trained,
            logprobs=[0.0] * len(trained),
            advantages=[advantage] * len(trained),
            weight=(0.3, 1.0, 0.8)[trajectory],
            temperature=(1.0, 0.7)[number % 2],
            version_gap=trajectory,
        )
        now = both.model.logprobs(sample)[0]
        found.append(_sampled(sample, [logprob + rng.gauss((0.1, -0.05, 0.0)[trajectory], 0.1) for logprob in now]))
    return found


def _sampled(sample: Sample, logprobs: list[float]) -> Sample:
    return dataclasses.replace(sample, logprobs=logprobs)


def test_logprobs_and_entropies_are_those_of_torch(both: Both) -> None:
    samples = some_samples(both)
    for base in (False, True):
        wanted = both.engine.logprobs(samples, adapter=not base)
        for sample, theirs in zip(samples, wanted, strict=True):
            assert both.model.logprobs(sample, base=base)[0] == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("policy", ["tis", "ppo", "gspo", "cispo"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_its_masks_and_its_gradient_are_the_servers(both: Both, policy: str, loss: str) -> None:
    samples, settings = some_samples(both), LossSettings(policy=policy, **LOSSES[loss])
    scored = [both.model.logprobs(sample) for sample in samples]
    reference = [both.model.logprobs(sample, base=True)[0] for sample in samples] if settings.kl_beta else None
    slope_P, mine = slopes([one for one, _ in scored], LossInputs.of(samples, settings, reference=reference), settings)
    try:
        wanted = both.engine.forward_backward(samples, settings)
        gradient = both.gradient(samples, slope_P)
        found, theirs = mine.metrics(), wanted.metrics()
        assert sum(entropy for _, entropy in scored) / wanted.tokens == pytest.approx(theirs.pop("entropy"), rel=1e-4)
        assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=2e-4, abs=2e-5)
        assert found["kept"] == pytest.approx(theirs["kept"], abs=1e-9)
        if loss in ("opsm", "veto", "band", "trust", "stale"):
            assert 0.0 < found["kept"] < 1.0  # the mask is at work
        for name, array in gradient.items():
            exact = both.torch_gradient(name)
            assert np.abs(np.array(array) - exact).max() <= 1e-5 * np.abs(exact).max() + 1e-9, name
    finally:
        both.engine.optim_step(0.0)


def test_attention_in_blocks_is_attention() -> None:
    mx.random.seed(0)
    arrays = [mx.random.normal((1, heads, 37, 8)) for heads in (4, 2, 2)]
    weight = mx.random.normal((1, 4, 37, 8))
    table = mx.tril(mx.ones((37, 37), dtype=mx.bool_))
    for mask in ("causal", table):

        def whole(*given: Any, mask: Any = mask) -> Any:
            return (weight * mx.fast.scaled_dot_product_attention(*given, scale=0.3, mask=mask)).sum()

        def blocks(*given: Any, mask: Any = mask) -> Any:
            return (weight * attention._blocks(*given, scale=0.3, mask=mask, rows=10)).sum()

        assert abs((whole(*arrays) - blocks(*arrays)).item()) < 1e-4
        slopes_of = [mx.grad(function, argnums=(0, 1, 2))(*arrays) for function in (whole, blocks)]
        for one, other in zip(*slopes_of, strict=True):
            assert bool(mx.all(mx.abs(one - other) < 1e-5).item())

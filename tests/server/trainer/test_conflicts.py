"""Whether devices pull the same way: found from what they sent, before the round trains on it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from clawloop_server.trainer.conflicts import ASKED, by_device, conflict, cosines
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.records import Policy, Sampling, Step, Trajectory
from clawloop_shared.rows import Limits, Sample

LINE = "line"
LIMITS = Limits(line_id=LINE, vocab_size=320, max_tokens=4096)
ACTIONS = range(20, 24)
PROMPT = [7, 8, 9, 10]


@pytest.fixture
def engine(tiny_folder: Path) -> TrainEngine:
    return TrainEngine.open(tiny_folder, TrainSettings(rank=4))


def trajectory(name: str, steps: list[Step], *, reward: float, device: str) -> Trajectory:
    return Trajectory(trajectory_id=name, steps=steps, signals=[], reward=reward, weight=1.0, device_id=device)


def answers(engine: TrainEngine, device: str, *, good: int, prompt: list[int] = PROMPT) -> Iterator[Trajectory]:
    """What a device sent that answered one prompt in each way, and liked one of them."""
    sample = [Sample(device, 0, [*prompt, token], [len(prompt)], [0.0], [0.0]) for token in ACTIONS]
    for token, (logprob,) in zip(ACTIONS, engine.logprobs(sample), strict=True):
        step = Step(
            step_id=f"{device}-{token}",
            session_id=device,
            run_id=device,
            prompt_ids=prompt,
            response_ids=[token],
            response_logprobs=[logprob],
            policy=Policy(line=LINE),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=1,
        )
        reward = 1.0 if token == good else -1.0
        yield trajectory(f"{device}-{token}", [step], reward=reward, device=device)


def test_devices_that_like_the_same_pull_together_and_others_apart(engine: TrainEngine) -> None:
    before = {name: tensor.clone() for name, tensor in engine.adapter().items()}
    sent = [t for name, good in {"a": 20, "b": 20, "c": 23}.items() for t in answers(engine, name, good=good)]
    random.Random(0).shuffle(sent)
    found = conflict(engine, by_device(sent), version=0, limits=LIMITS)
    assert found["a"]["b"] == pytest.approx(1.0, abs=1e-5)
    assert found["a"]["c"] == pytest.approx(found["b"]["c"], abs=1e-5)
    assert found["a"]["c"] < 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.adapter().items())
    assert all(not gradient.any() for gradient in engine.take_gradient().values()), "nothing is left for the next"


def test_a_device_with_harder_tasks_is_no_opponent(engine: TrainEngine) -> None:
    """Rewards are compared within a device: what it got less of all the time says nothing of where it pulls."""
    easy = list(answers(engine, "a", good=20))
    hard = [replace(t, reward=t.reward / 2 - 0.5) for t in answers(engine, "b", good=20)]
    assert conflict(engine, by_device([*easy, *hard]), version=0, limits=LIMITS)["a"]["b"] > 0.99


def test_a_device_that_says_nothing_or_breaks_is_left_out(engine: TrainEngine) -> None:
    liked = list(answers(engine, "a", good=20))
    flat = [replace(t, reward=0.5) for t in answers(engine, "b", good=20)]
    (other, *_) = answers(engine, "c", good=20)
    foreign = [replace(t, steps=[]) for t in answers(engine, "d", good=21)]
    devices = by_device([*liked, *flat, other, *foreign])
    assert sorted(devices) == ["a", "b", "d"], "one trajectory alone is not better or worse"
    assert conflict(engine, devices, version=0, limits=LIMITS) == {}


def test_no_device_is_asked_for_more_than_its_share(engine: TrainEngine) -> None:
    many = [trajectory(f"t{n:03}", [], reward=1.0, device="a") for n in range(100)]
    assert len(by_device(many)["a"]) == ASKED


def test_cosines_are_those_of_the_vectors() -> None:
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    found = cosines({"b": one, "a": other, "zero": torch.zeros(2, 2)})
    assert found == {"a": {"b": pytest.approx(0.5)}}

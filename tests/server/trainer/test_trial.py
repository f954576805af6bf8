"""The gate is played in batches that fit the memory, and what comes of it does not depend on them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from clawloop_server.release.gate import GateSettings
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply, Sampling
from clawloop_server.trainer.tasks import Expectation, Scores, Task
from clawloop_server.trainer.trial import Batches, Gate

SIZES = (3, 9, 5, 30, 4)
REPLY = 6


class Letters:
    """Renders a task as so many tokens; a reply is the words that its ids are."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        size = int(messages[0]["content"])
        return [2, 3, *(5 + (size * n) % 300 for n in range(size))]

    def text(self, ids: list[int]) -> str:
        self.said.append(" ".join(map(str, ids)))
        return self.said[-1]


def played(engine: TrainEngine, batches: Batches, **settings: Any) -> tuple[Scores, list[str]]:
    tasks = [
        Task(messages=[{"role": "user", "content": str(size)}], expect=Expectation([], answer_names=""))
        for size in SIZES
    ]
    letters: Any = Letters()
    given = GateSettings(samples=2, max_tokens=REPLY, **settings)
    gate = Gate(given, tasks, suite="", renderer=letters, eos_ids=frozenset(range(30)), batches=batches)
    return gate.play(engine, 7), letters.said


@pytest.fixture
def asked(engine: TrainEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of each call of the engine: its prompts, the longest of them, and its seed."""
    found: list[tuple[int, int, int]] = []
    really = engine.generate

    def generate(prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        found.append((len(prompts), max(map(len, prompts)), sampling.seed))
        return really(prompts, sampling=sampling)

    monkeypatch.setattr(engine, "generate", generate)
    return found


def test_small_batches_score_as_one_large_one_does(engine: TrainEngine, asked: list[tuple[int, int, int]]) -> None:
    whole = played(engine, Batches(), temperature=0.0)
    assert [count for count, *_ in asked] == [2 * len(SIZES)]
    asked.clear()
    small = played(engine, Batches(40), temperature=0.0)
    assert small == whole
    assert len({True, *(ok for each in whole[0].valid for ok in each)}) == 2, "some must fail for this to say anything"
    assert all(count == 1 or count * (longest + REPLY) <= 40 for count, longest, _ in asked)
    assert 1 < max(count for count, *_ in asked) < len(SIZES)
    assert len({seed for *_, seed in asked}) == len(asked)


def test_a_batch_that_does_not_fit_is_halved_and_so_are_those_after(
    engine: TrainEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, tried, really = played(engine, Batches(), temperature=0.0), list[int](), engine.generate

    def generate(prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        tried.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("no memory")
        return really(prompts, sampling=sampling)

    monkeypatch.setattr(engine, "generate", generate)
    batches = Batches()
    assert played(engine, batches, temperature=0.0) == whole
    assert tried[:3] == [10, 5, 2]
    assert "2 from now on" in caplog.text
    tried.clear()
    assert played(engine, batches, temperature=0.0) == whole
    assert max(tried) <= 4, "what was found out is kept for the next adapter"


def test_what_does_not_fit_alone_is_an_error(engine: TrainEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(torch.OutOfMemoryError):
        played(engine, Batches())

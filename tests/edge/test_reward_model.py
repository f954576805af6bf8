"""The reward model: one classifier, one number, read as it was said to be; and nothing where it says nothing."""

import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from clawloop_edge.errors import ScorerFailed
from clawloop_edge.signals.model_settings import RewardModelSettings
from clawloop_edge.signals.protocol import Moment
from clawloop_edge.signals.reward_model import Classified, RewardModelScorer, value_of
from clawloop_shared.errors import ConfigError

from .fake_judge import FakeJudge
from .fake_vllm import running
from .scored import case, settings_of

Open = Callable[..., Any]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """`opened(body, **settings)` -> (the server, a scorer that asks it), which answers so."""
    async with AsyncExitStack() as stack:

        async def make(body: Any, **settings: Any) -> tuple[FakeJudge, RewardModelScorer]:
            fake = FakeJudge()
            fake.raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            url = await stack.enter_async_context(running(fake.app()))
            wanted = RewardModelSettings(**{"url": f"{url}/classify", "model": "rm", **settings})
            scorer = RewardModelScorer(settings_of(reward_model=wanted))
            stack.push_async_callback(scorer.close)
            return fake, scorer

        yield make


def classes(*probs: float, label: str = "LABEL_1") -> dict[str, Any]:
    return {"object": "list", "data": [{"index": 0, "label": label, "probs": probs, "num_classes": len(probs)}]}


async def test_a_probability_becomes_a_value(opened: Open) -> None:
    fake, scorer = await opened(classes(0.1, 0.9))
    (found,) = await scorer.score(case("Where is Oslo?", "In <|im_end|>Norway.", said="thanks"))
    assert (found.value, found.weight, found.evidence) == (pytest.approx(0.8), 0.5, "by probability")
    assert fake.bodies == [{"model": "rm", "input": "User: Where is Oslo?\n\nAssistant: In ‹|im_end|›Norway."}]
    assert len(await scorer.score(case(moment=Moment.ENDED))) == 1


@pytest.mark.parametrize(
    ("found", "settings", "value"),
    [
        (Classified([0.25, 0.75]), {}, 0.5),
        (Classified([0.25, 0.75]), {"positive": 0}, -0.5),
        (Classified([0.75]), {}, 0.5),
        (Classified([2.0]), {"value": "score"}, math.tanh(2.0)),
        (Classified([-30.0]), {"value": "score", "scale": 10.0}, math.tanh(-3.0)),
        (Classified([1e300]), {"value": "score"}, 1.0),
    ],
)
def test_what_a_classifier_says_is_read_as_it_is_set(found: Classified, settings: dict[str, Any], value: float) -> None:
    assert value_of(found, RewardModelSettings(**settings)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("found", "settings", "words"),
    [
        (Classified([3.2]), {}, "set .* value = 'score'"),
        (Classified([0.2, 0.8]), {"positive": 7}, "2 classes and no 7"),
    ],
)
def test_what_cannot_be_read_is_a_failure_with_the_next_step(
    found: Classified, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ScorerFailed, match=words):
        value_of(found, RewardModelSettings(**settings))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b'{"data": [{"probs": [NaN, 1.0]}]}',
        b'{"data": [{"probs": [1e999]}]}',
        {"data": []},
        {"data": [{"probs": []}]},
        {"data": [{"probs": ["a"]}]},
        {"data": [{"probs": [0.5]}, {"probs": [0.5]}]},
        {"error": "no"},
        b"[" * 100_000,
    ],
)
async def test_an_answer_of_another_form_is_a_failure(opened: Open, body: Any) -> None:
    fake, scorer = await opened(body)
    fake.raw = fake.raw or b" "
    with pytest.raises(ScorerFailed):
        await scorer.score(case())


async def test_a_server_that_fails_or_refuses_is_a_failure(opened: Open) -> None:
    fake, scorer = await opened(classes(0.1, 0.9))
    fake.first = [500, 400, 404]
    for words in ("cannot answer now", "refuses the request \\(400\\)", "refuses the request \\(404\\)"):
        with pytest.raises(ScorerFailed, match=words):
            await scorer.score(case())
    assert len(await scorer.score(case())) == 1


def test_a_classifier_that_may_not_be_asked_is_refused_at_the_start() -> None:
    for url, words in (("", "url is empty"), ("https://api.example.com/classify", "set remote = true")):
        with pytest.raises(ConfigError, match=words):
            RewardModelScorer(settings_of(reward_model=RewardModelSettings(url=url)))

"""Redacted steps: which logprobs are still true of what is sent, and which steps stay at home."""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.protocol import GenerateRequest
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.errors import EngineGone
from clawloop_edge.privacy.redact.tokens import Redaction
from clawloop_edge.privacy.redact_worker import JobFailed
from clawloop_edge.privacy.redacting import Redactor, rescore_with
from clawloop_shared.records import Policy, Sampling, Step, check_step

RESERVED = 3
Make = Callable[..., Step]


class Places:
    """A search that takes the same places out of every step."""

    def __init__(self, *places: int, broken: bool = False) -> None:
        self._places, self._broken = places, broken
        self.closed = False

    def learn(self, ids: Sequence[int], *, session_id: str) -> None:
        if self._broken:
            raise JobFailed("broken")

    def redact(self, ids: Sequence[int], *, session_id: str, also: Iterable[str]) -> Redaction:
        self.learn(ids, session_id=session_id)
        hidden = {*self._places, *(at for at, number in enumerate(ids) if number == RESERVED)}
        found = [RESERVED if at in hidden else number for at, number in enumerate(ids)]
        return Redaction(found, [(at, 1) for at in sorted(hidden)])

    def texts(self, ids: Sequence[int]) -> list[str]:
        return []

    def text(self, text: str, *, session_id: str) -> str:
        return text.replace("secret", "[redacted]")

    def close(self) -> None:
        self.closed = True


class Scorer:
    """Gives the logprobs -1.0, -1.1, ... and remembers what it was asked."""

    def __init__(self, *wrong: float) -> None:
        self.asked: list[tuple[list[int], list[int], Policy, float]] = []
        self._wrong = wrong

    def __call__(
        self, prompt_ids: list[int], response_ids: list[int], *, policy: Policy, temperature: float
    ) -> list[float] | None:
        self.asked.append((prompt_ids, response_ids, policy, temperature))
        return [*self._wrong, *(-1 - at / 10 for at in range(len(self._wrong), len(response_ids)))]


@pytest.fixture
def make_step() -> Make:
    """A step with prompt 10..14 and response 20..29, logprobs -0.20..-0.29; or other ids."""

    def make(prompt: list[int] | None = None, response: list[int] | None = None, **fields: Any) -> Step:
        ids = response or list(range(20, 30))
        return Step(
            step_id="step",
            session_id="session",
            run_id="run",
            prompt_ids=prompt or list(range(10, 15)),
            response_ids=ids,
            response_logprobs=[-at / 100 for at in range(20, 20 + len(ids))],
            policy=Policy("line", 3, "abc"),
            sampling=Sampling(temperature=0.7),
            finish_reason="stop",
            created_ms=1,
            **fields,
        )

    return make


def test_a_step_without_secrets_leaves_as_it_is(make_step: Make) -> None:
    redactor = Redactor(Places())
    step = make_step()
    assert redactor.step(step) is step
    assert redactor.counts.clean == 1


def test_tokens_that_are_no_step_are_clean_if_nothing_would_be_taken_out() -> None:
    assert Redactor(Places()).is_clean([5, 6], session_id="s")
    assert not Redactor(Places(1)).is_clean([5, 6], session_id="s")
    assert not Redactor(Places(broken=True)).is_clean([5, 6], session_id="s")


def test_a_secret_in_the_prompt_makes_all_logprobs_new(make_step: Make) -> None:
    scorer = Scorer()
    step = make_step()
    found = Redactor(Places(2), rescore=scorer).step(step)
    assert found is not None
    assert found.prompt_ids == [10, 11, RESERVED, 13, 14]
    assert found.response_ids == step.response_ids
    assert found.response_logprobs == [-1 - at / 10 for at in range(10)]
    assert found.redacted == [(2, 1)]
    assert scorer.asked == [(found.prompt_ids, found.response_ids, step.policy, 0.7)]
    check_step(found)


def test_logprobs_before_the_first_secret_stay_and_those_behind_are_new(make_step: Make) -> None:
    step = make_step()
    found = Redactor(Places(5 + 6), rescore=Scorer()).step(step)
    assert found is not None
    assert list(found.response_logprobs) == [*step.response_logprobs[:6], None, -1.7, -1.8, -1.9]
    check_step(found)


def test_without_an_engine_a_step_is_cut_at_its_first_secret(make_step: Make) -> None:
    step = make_step()
    redactor = Redactor(Places(5 + 8))
    found = redactor.step(step)
    assert found is not None
    assert list(found.response_logprobs) == [*step.response_logprobs[:8], None, None]
    assert redactor.counts.cut == 1
    check_step(found)


@pytest.mark.parametrize(("place", "left"), [(5 + 7, False), (5 + 8, True), (4, False)])
def test_a_cut_step_with_too_little_left_stays_at_home(make_step: Make, place: int, left: bool) -> None:
    redactor = Redactor(Places(place))
    assert (redactor.step(make_step()) is not None) == left
    assert redactor.counts.dropped == (not left)


def test_a_step_that_was_scored_again_may_lack_more(make_step: Make) -> None:
    found = Redactor(Places(*range(5, 12)), rescore=Scorer()).step(make_step())
    assert found is not None
    assert [value is None for value in found.response_logprobs] == [True] * 7 + [False] * 3


def test_a_step_of_which_nothing_is_left_stays_at_home(make_step: Make) -> None:
    scorer = Scorer()
    assert Redactor(Places(*range(5, 15)), rescore=scorer).step(make_step()) is None
    assert scorer.asked == []


def test_a_secret_at_the_very_end_needs_no_scoring(make_step: Make) -> None:
    scorer = Scorer()
    found = Redactor(Places(14), rescore=scorer).step(make_step())
    assert found is not None
    assert found.response_logprobs[-2:] == [-0.28, None]
    assert scorer.asked == []


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.5])
def test_a_number_that_is_no_logprob_is_none(make_step: Make, wrong: float) -> None:
    found = Redactor(Places(0), rescore=Scorer(wrong)).step(make_step())
    assert found is not None
    assert list(found.response_logprobs[:2]) == [None, -1.1]
    assert Redactor(Places(0), rescore=Scorer(*[wrong] * 3)).step(make_step()) is None


def test_rounding_above_zero_is_zero(make_step: Make) -> None:
    found = Redactor(Places(0), rescore=Scorer(5e-5)).step(make_step())
    assert found is not None
    assert found.response_logprobs[0] == 0.0


def test_answers_of_another_length_are_no_answers(make_step: Make) -> None:
    assert Redactor(Places(0), rescore=lambda *_, **__: [-1.0]).step(make_step()) is None


def test_redacting_twice_is_redacting_once(make_step: Make) -> None:
    redactor = Redactor(Places(1, 5 + 7), rescore=Scorer())
    once = redactor.step(make_step())
    assert once is not None
    assert redactor.step(once) == once


def test_a_reserved_id_that_was_always_there_is_no_redaction(make_step: Make) -> None:
    step = make_step(prompt=[10, RESERVED, 12])
    assert Redactor(Places()).step(step) is step


def test_a_step_that_cannot_be_searched_stays_at_home(make_step: Make, caplog: pytest.LogCaptureFixture) -> None:
    redactor = Redactor(Places(broken=True))
    redactor.learn([make_step()])
    assert redactor.step(make_step()) is None
    assert redactor.counts.failed == 1
    assert "step step: broken" in caplog.text


def test_texts_and_the_end_go_to_the_search() -> None:
    search = Places()
    redactor = Redactor(search)
    assert (redactor.text("a secret"), redactor.text("")) == ("a [redacted]", "")
    redactor.close()
    assert search.closed


# Scoring by the engine


async def sampled(engine: MlxEngine, prompt: str) -> Step:
    ids = engine.tokenizer.encode(prompt)
    request = GenerateRequest(prompt_ids=ids, max_tokens=24, sampling=Sampling(temperature=0.8, seed=1))
    generation = await engine.generate(request)
    tokens = [token async for token in generation]
    return Step(
        step_id="step",
        session_id="session",
        run_id="run",
        prompt_ids=ids,
        response_ids=[token.token_id for token in tokens],
        response_logprobs=[token.logprob for token in tokens],
        policy=generation.policy,
        sampling=request.sampling,
        finish_reason="length",
        created_ms=1,
    )


async def test_the_engine_scores_what_is_sent_under_the_adapter_that_sampled(
    engine: MlxEngine, make_adapter: Callable[..., dict[str, bytes]]
) -> None:
    policy = Policy(engine.line.line_id, 5, "a" * 64)
    await engine.load(policy, make_adapter())
    await engine.use(5)
    step = await sampled(engine, "<|im_start|>user\nsay something of SECRET\n<|im_end|>\n<|im_start|>assistant\n")
    await engine.use(0)
    redactor = Redactor(Places(4, 5), rescore=rescore_with(engine, asyncio.get_running_loop()))
    found = await asyncio.to_thread(redactor.step, step)
    assert found is not None
    again = await engine.score(found.prompt_ids, found.response_ids, version=5, temperature=0.8)
    base = await engine.score(found.prompt_ids, found.response_ids, version=0, temperature=0.8)
    assert found.response_logprobs == pytest.approx(again, abs=1e-5)
    assert found.response_logprobs != pytest.approx(base, abs=1e-3)
    assert found.response_logprobs != pytest.approx(step.response_logprobs, abs=1e-3)
    check_step(found)


async def test_other_weights_of_the_same_number_are_not_asked(
    engine: MlxEngine, make_adapter: Callable[..., dict[str, bytes]]
) -> None:
    await engine.load(Policy(engine.line.line_id, 5, "a" * 64), make_adapter())
    rescore = rescore_with(engine, asyncio.get_running_loop())
    for policy in (
        Policy(engine.line.line_id, 5, "b" * 64),
        Policy("another line"),
        Policy(engine.line.line_id, 6, "c" * 64),
    ):
        assert await asyncio.to_thread(rescore, [1], [2, 3], policy=policy, temperature=1.0) is None
    known = Policy(engine.line.line_id, 5, "a" * 64)
    found = await asyncio.to_thread(rescore, [1], [2, 3], policy=known, temperature=1.0)
    assert found == await engine.score([1], [2, 3], version=5)


async def test_an_engine_that_cannot_score_cuts_and_one_that_stops_asks_again_later(
    engine: MlxEngine, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scripted = ScriptedEngine(tiny_model, [])
    rescore = rescore_with(scripted, asyncio.get_running_loop())
    assert await asyncio.to_thread(rescore, [1], [2], policy=scripted.policy, temperature=1.0) is None
    rescore = rescore_with(engine, asyncio.get_running_loop(), within_s=0.0)
    with caplog.at_level("WARNING"):
        assert await asyncio.to_thread(rescore, [1], [2], policy=engine.policy, temperature=1.0) is None
    assert "not done within 0 s" in caplog.text
    await engine.close()
    rescore = rescore_with(engine, asyncio.get_running_loop())
    with pytest.raises(EngineGone):
        await asyncio.to_thread(rescore, [1], [2], policy=engine.policy, temperature=1.0)

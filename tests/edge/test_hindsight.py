"""Hindsight: a hint where the user corrected, as tokens that fit the step exactly, and none where they would not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.engine.tokenizer import HfChatTokenizer
from clawloop_edge.errors import NotScorable, RequestError
from clawloop_edge.signals.hindsight import HindsightScorer, TurnTokenizer, hint_in, hint_tokens
from clawloop_edge.signals.model_settings import HindsightSettings
from clawloop_edge.signals.protocol import Case
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Policy, Step

from .scored import case, kept, settings_of

ASKED = [{"role": "system", "content": "You help."}, {"role": "user", "content": "What is the capital of Australia?"}]
WORDS = "The seat of government is not the largest city."


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> HfChatTokenizer:
    return HfChatTokenizer(tiny_model)


def says(*, wrong: Any = True, hint: Any = WORDS, check: str = "") -> Callable[[str], str]:
    def answer(prompt: str) -> str:
        found = prompt.rpartition('"check": "')[2].partition('"')[0]
        return json.dumps({"check": check or found, "wrong": wrong, "hint": hint})

    return answer


def of_line(one: Case, line: str, *, prompt_ids: list[int]) -> Case:
    """The case as if the model of this line had answered it."""
    step = msgspec.structs.replace(one.answer.step, policy=Policy(line), prompt_ids=prompt_ids)
    return msgspec.structs.replace(one, steps=[msgspec.structs.replace(one.answer, step=step)])


def step_of(prompt_ids: list[int]) -> Step:
    return kept(ASKED, "Sydney.", prompt_ids=prompt_ids).step


async def test_a_correction_becomes_a_hint_before_what_opens_the_answer(
    tiny_model: Path, tokenizer: HfChatTokenizer
) -> None:
    engine = ScriptedEngine(tiny_model, says())
    scorer = HindsightScorer(settings_of(engine=engine, hindsight=HindsightSettings()))
    prompt_ids = tokenizer.encode(tokenizer.render(ASKED, None))
    one = of_line(case(said="No, it's Canberra."), engine.line.line_id, prompt_ids=prompt_ids)
    (found,) = await scorer.score(one)
    assert (found.value, found.weight, found.evidence, found.comment) == (-1.0, 0.7, "hint", WORDS)
    assert found.hint is not None
    assert found.hint.step_id == one.answer.step.step_id
    taught = [*prompt_ids[: found.hint.at], *found.hint.token_ids, *prompt_ids[found.hint.at :]]
    hinted = [*ASKED, {"role": "user", "content": f"Hint: {WORDS}"}]
    assert taught == tokenizer.encode(tokenizer.render(hinted, None)), "as if it had been asked so"
    await engine.close()


@pytest.mark.parametrize("said", ["thanks!", "and of Austria?", ""])
async def test_nobody_is_asked_where_nothing_speaks_against_the_answer(tiny_model: Path, said: str) -> None:
    engine = ScriptedEngine(tiny_model, [])  # would fail if it were asked
    scorer = HindsightScorer(settings_of(engine=engine, hindsight=HindsightSettings()))
    assert await scorer.score(case(said=said)) == []
    await engine.close()


async def test_what_was_not_wrong_after_all_gives_nothing_and_what_is_no_answer_is_told(tiny_model: Path) -> None:
    for script, expected in ((says(wrong=False), []), (says(check="other"), None), (says(hint=" "), None)):
        engine = ScriptedEngine(tiny_model, script)
        scorer = HindsightScorer(settings_of(engine=engine, hindsight=HindsightSettings()))
        if expected is None:
            with pytest.raises(NotScorable, match="gave none in the form"):
                await scorer.score(case(said="That's wrong"))
        else:
            assert await scorer.score(case(said="That's wrong")) == expected
        await engine.close()


async def test_a_hint_of_another_model_or_without_a_tokenizer_stays_words(tiny_model: Path) -> None:
    engine = ScriptedEngine(tiny_model, says())
    scorer = HindsightScorer(settings_of(engine=engine, hindsight=HindsightSettings()))
    (found,) = await scorer.score(case(said="That's wrong"))  # its step is of another line
    assert (found.hint, found.evidence, found.comment) == (None, "hint without tokens", WORDS)
    await engine.close()


def test_without_a_model_there_is_no_hindsight() -> None:
    with pytest.raises(ConfigError, match=r"\[signals.hindsight\] url = 'local', and no model"):
        HindsightScorer(settings_of(hindsight=HindsightSettings()))


@pytest.mark.parametrize(
    "answer",
    ["", "no", '{"check": "c"}', '{"check": "c", "wrong": 1, "hint": "x"}', '{"check": "c", "wrong": true, "hint": 1}'],
)
def test_what_is_no_hint_is_none(answer: str) -> None:
    assert hint_in(answer, check="c") is None


def test_a_hint_is_one_line() -> None:
    assert hint_in('{"check": "c", "wrong": true, "hint": "a\\n b"}', check="c") == "a b"
    assert hint_in('{"check": "c", "wrong": false, "hint": "a"}', check="c") == ""


def test_a_hint_fits_after_a_tool_result_too(tokenizer: HfChatTokenizer) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "I look."}, {"role": "tool", "content": "42"}]
    ids = tokenizer.encode(tokenizer.render(messages, None))
    found = hint_tokens(tokenizer, step_of(ids), text=WORDS)
    assert found is not None
    assert tokenizer.decode(ids[found.at :]) == "<|im_start|>assistant\n"
    assert tokenizer.decode(found.token_ids) == f"<|im_start|>user\nHint: {WORDS}<|im_end|>\n"


def test_a_prompt_that_does_not_end_as_the_template_has_it_gets_no_hint(tokenizer: HfChatTokenizer) -> None:
    ids = tokenizer.encode(tokenizer.render(ASKED, None))
    for other in (ids[:-1], [*ids, ids[-1]], [*ids[:-1], ids[-1] + 1], ids[-3:], [5]):
        assert hint_tokens(tokenizer, step_of(other), text=WORDS) is None
    assert hint_tokens(tokenizer, step_of(ids), text="") is None
    assert hint_tokens(tokenizer, step_of(ids), text="word " * 5_000) is None


class Letters:
    """A tokenizer of one letter an id, with a template that a test gives."""

    def __init__(self, *, alternate: bool = False, merge: str = "", thinking: str = "") -> None:
        self._alternate, self._merge, self._thinking = alternate, merge, thinking

    def render_closed(self, messages: Sequence[dict[str, Any]]) -> str:
        if self._alternate and len(messages) > 1:
            raise RequestError("turns must alternate")
        return "".join(f"({m['content']})" for m in messages)

    def render(self, messages: Sequence[dict[str, Any]], tools: Any, *, thinking: bool | None = None) -> str:
        return self.render_closed(messages) + ">" + (self._thinking if thinking is False else "")

    def encode(self, text: str) -> list[int]:
        return [1 + ord(c) for c in text.replace(self._merge, "~")] if self._merge else [1 + ord(c) for c in text]


def test_a_template_of_another_kind_is_used_where_it_fits_and_else_not() -> None:
    plain, thoughtless = Letters(), Letters(thinking="!!")
    assert isinstance(plain, TurnTokenizer)
    found = hint_tokens(plain, step_of(plain.encode("(q)>")), text="h")
    assert found is not None
    assert (found.at, found.token_ids) == (3, plain.encode("(Hint: h)"))
    found = hint_tokens(thoughtless, step_of(thoughtless.encode("(q)>!!")), text="h")
    assert found is not None
    assert found.at == 3, "the empty thoughts that the template writes belong to the opening"
    assert hint_tokens(Letters(alternate=True), step_of(plain.encode("(q)>")), text="h") is None
    merged = Letters(merge=")(")
    assert hint_tokens(merged, step_of(merged.encode("(q)>")), text="h") is None, "other tokens in one piece"

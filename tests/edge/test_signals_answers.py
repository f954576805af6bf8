"""The scorers that look at answers and at tool results, and `/compute_reward`, which asks one of them."""

from typing import Any

import pytest

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.signals.answer import ExactScorer, same_answer
from clawloop_edge.signals.protocol import Case, Moment
from clawloop_edge.signals.settings import ExactSettings, ToolOutcomeSettings
from clawloop_edge.signals.tool_outcome import ToolOutcomeScorer, trouble_in
from clawloop_shared.records import Policy, Sampling, Step, Target

Json = dict[str, Any]


def case_of(reply: Json, *, messages: list[Json] | None = None, **fields: Any) -> Case:
    step = Step(
        step_id="step-1",
        session_id="s",
        run_id="r",
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.1],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    kept = KeptStep(step=step, messages=messages or [], reply=reply, started_ms=1, finished_ms=2)
    return Case(moment=Moment.ENDED, target=Target.RUN, target_id="r", steps=[kept], **fields)


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("42", "42.0", True),
        (" 1,000 ", "1000", True),
        ("$42.", "42", True),
        ("-0.5", "-.50", True),
        ("Paris", "paris", True),
        ("New\n  York", "new york", True),
        ("42", "43", False),
        ("nan", "NaN", True),
        ("nan", "inf", False),
        ("1e999999999", "1e999999998", False),
        ("", "", False),
        ("the answer is 42", "42", False),
    ],
)
def test_answers_are_compared_without_white_space_and_numbers_as_numbers(said: str, wanted: str, same: bool) -> None:
    assert same_answer(said, wanted, ignore_case=True) is same


async def test_an_exact_answer_counts_and_none_in_the_metadata_is_no_verdict() -> None:
    scorer = ExactScorer(ExactSettings())
    reply = {"role": "assistant", "content": "<think>41? no</think>\n42"}
    for metadata, values in (
        ({"answer": 42}, [1.0]),
        ({"answer": ["41", "42"]}, [1.0]),
        ({"reward_model": {"ground_truth": "41"}}, [-1.0]),
        ({"answer": None}, []),
        ({"answer": True}, []),
        ({"answer": {"text": "42"}}, []),
        ({}, []),
    ):
        said = await scorer.score(case_of(reply, metadata=metadata))
        assert [verdict.value for verdict in said] == values, metadata


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("ls: cannot access 'x'\n\n(Command exited with code 2)", "exit code 2"),
        ("done\n\nCommand exited with code 0", ""),
        ("partial output\n\nCommand timed out after 30 seconds", "timed out"),
        ('{"status": "error", "tool": "exec", "error": "no such tool"}', "error"),
        ('{"status": "completed", "exitCode": 1, "stdout": ""}', "exit code 1"),
        ('{"exitCode": 0, "stderr": "error: but it went well"}', ""),
        ('{"ok": true, "error": null}', ""),
        ('{"results": [{"title": "Error handling in Go"}]}', ""),
        ("Error: ENOENT: no such file", "error"),
        ("error", "error"),
        ("Traceback (most recent call last)\n  File x", "error"),
        ("exit code: 127\nsh: not found", "exit code 127"),
        ("The error rate fell to 2 %", ""),
        ("an article about commands that failed", ""),
        ("{broken json", ""),
        ("", ""),
    ],
)
def test_a_tool_result_tells_whether_it_went_wrong(text: str, trouble: str) -> None:
    assert trouble_in(text) == trouble


def call(arguments: str, call_id: str = "c1") -> Json:
    made = {"id": call_id, "type": "function", "function": {"name": "run", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [made]}


def result(text: str) -> Json:
    return {"role": "tool", "tool_call_id": "c1", "content": text}


async def test_many_cheap_calls_gain_no_more_than_one() -> None:
    scorer = ToolOutcomeScorer(ToolOutcomeSettings())
    history: list[Json] = [{"role": "user", "content": "go"}]
    total = 0.0
    for number in range(50):
        reply, following = call(f'{{"n": {number}}}'), [result("fine")]
        said = await scorer.score(case_of(reply, messages=list(history), following=following))
        total += sum(verdict.value * verdict.weight for verdict in said)
        history += [reply, *following]
    assert 0 < total <= 0.05
    history.append({"role": "user", "content": "again"})
    said = await scorer.score(case_of(call('{"n": 0}'), messages=history, following=[result("fine")]))
    assert [verdict.value for verdict in said] == [1.0]  # another run, and what was called in the last is not repeated


async def test_a_failed_call_and_a_repeated_one_speak_against_their_step() -> None:
    scorer = ToolOutcomeScorer(ToolOutcomeSettings(failed=0.4, repeated=0.2))
    ask = [{"role": "user", "content": "go"}]
    said = await scorer.score(case_of(call("{}"), messages=ask, following=[result("fine"), result("Error: s3cret")]))
    assert [(v.value, v.weight, v.evidence) for v in said] == [(-1.0, 0.4, "1 of 2 tool results: error")]
    history = [*ask, call('{"a": 1, "b": 2}'), result("fine")]
    said = await scorer.score(case_of(call('{"b":2,"a":1}'), messages=history, following=[result("fine")]))
    assert [(v.value, v.weight) for v in said] == [(-1.0, 0.2)]
    assert await scorer.score(case_of({"role": "assistant", "content": "hi"}, following=[ask[0]])) == []

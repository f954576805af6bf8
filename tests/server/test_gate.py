"""The gate: what passes, what does not, and how episodes are played and scored."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_server.release.gate import GateSettings, Verdict, decide, decide_unevaluated, paired_difference
from clawloop_server.trainer.generation import Reply
from clawloop_server.trainer.tasks import Scores, Task, load_tasks, play, read_reply
from clawloop_shared.errors import ConfigError

GOOD, BAD = [True], [False]


def scores(*rewards: float, valid: Sequence[bool] = ()) -> Scores:
    return Scores([[reward] for reward in rewards], [[v] for v in valid or [True] * len(rewards)])


TABLE = [
    ("equal", scores(1, 0, 1, 0), scores(1, 0, 1, 0), Verdict.PASSED),
    ("better", scores(1, 1, 1, 1), scores(0, 0, 0, 1), Verdict.PASSED),
    ("all tasks worse", scores(0, 0, 0, 0), scores(1, 1, 1, 1), Verdict.REFUSED),
    ("a little worse, within noise", scores(1, 0, 0, 1), scores(0, 1, 1, 1), Verdict.PASSED),
    ("worse beyond noise", scores(*[0] * 6, *[1] * 6), scores(*[1] * 12), Verdict.REFUSED),
    ("one task, worse", scores(0), scores(1), Verdict.REFUSED),
    (
        "the form broke",
        scores(*[0] * 8, valid=[False] * 6 + [True] * 2),
        scores(*[0] * 8),
        Verdict.REFUSED,
    ),
    (
        "the form slipped once in a hundred",
        scores(*[1] * 100, valid=[False] + [True] * 99),
        scores(*[1] * 100),
        Verdict.PASSED,
    ),
]


@pytest.mark.parametrize(("candidate", "current", "verdict"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_decisions(candidate: Scores, current: Scores, verdict: Verdict) -> None:
    decision = decide(candidate, current, settings=GateSettings(), suite="tasks@1")
    assert decision.verdict is verdict
    assert decision.verdict.passes == (verdict is Verdict.PASSED)
    assert decision.evaluation.suite == "tasks@1"
    assert decision.evaluation.episodes == len(candidate.rewards)
    assert f"{decision.evaluation.reward_before:.3f}" in decision.reason or "well-formed" in decision.reason


def test_without_tasks_it_holds_unless_that_is_allowed() -> None:
    assert decide_unevaluated(GateSettings()).verdict is Verdict.HELD
    allowed = decide_unevaluated(GateSettings(required=False))
    assert allowed.verdict is Verdict.NOT_EVALUATED
    assert str(allowed.verdict) == "passed (not evaluated)"
    assert allowed.verdict.passes
    assert not Verdict.HELD.passes


samples = st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=20)


@given(samples)
def test_an_adapter_is_never_refused_for_being_itself(rewards: list[list[float]]) -> None:
    itself = Scores(rewards, [[True] * 2 for _ in rewards])
    assert decide(itself, itself, settings=GateSettings(), suite="").verdict is Verdict.PASSED


@given(samples, st.randoms())
def test_the_difference_is_antisymmetric_and_its_error_positive(one: list[list[float]], rng: Any) -> None:
    other = [[rng.random(), rng.random()] for _ in one]
    difference, error = paired_difference(one, other)
    assert list(paired_difference(other, one)) == pytest.approx([-difference, error])
    assert error >= 0


def test_the_standard_error_by_hand() -> None:
    difference, error = paired_difference([[1, 1], [0, 1], [0, 0]], [[0, 1], [0, 1], [1, 1]])
    assert difference == pytest.approx((0.5 + 0 - 1) / 3)
    assert error == pytest.approx((((2 / 3) ** 2 + (1 / 6) ** 2 + (5 / 6) ** 2) / 2 / 3) ** 0.5)


TASK = {
    "id": "oslo",
    "messages": [{"role": "user", "content": "Who is in Oslo?"}],
    "tools": [{"type": "function", "function": {"name": "find", "parameters": {}}}],
    "tool_results": [{"name": "find", "arguments": {"city": "Oslo"}, "content": '{"contact": "Maria"}'}],
    "expect": {
        "calls": [{"name": "find", "arguments": {"city": "Oslo"}}],
        "answer_names": "Maria",
        "answer_only_one_of": ["Maria", "Paul"],
    },
}
CALL = '<tool_call>\n{"name": "find", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """One task, read from a file."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n\n")
    (found,) = load_tasks(path)
    return found


class Letters:
    """A tokenizer whose tokens are characters; it remembers the conversations that it rendered."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        self.seen.append(list(messages))
        return [1, 2, 3]

    def text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def outcome(task: Task, *texts: str, stopped: bool = True) -> tuple[float, bool, Letters]:
    letters, said = Letters(), iter(texts)

    def sampler(prompts: Sequence[Sequence[int]], turn: int) -> list[Reply]:
        return [Reply(list(map(ord, next(said))), stopped=stopped, logprobs=[]) for _ in prompts]

    found = play([task], sampler, renderer=letters, samples=1)
    assert next(said, None) is None
    return found.rewards[0][0], found.valid[0][0], letters


def test_the_right_call_and_the_right_answer_score(task: Task) -> None:
    reward, valid, letters = outcome(task, CALL, "Ask Maria.")
    assert (reward, valid) == (1.0, True)
    assert [m["role"] for m in letters.seen[1]] == ["user", "assistant", "tool"]
    assert letters.seen[1][1]["tool_calls"][0]["function"] == {"name": "find", "arguments": {"city": "Oslo"}}
    assert letters.seen[1][2]["content"] == '{"contact": "Maria"}'


@pytest.mark.parametrize(
    "answers",
    [
        ("Ask Maria.",),
        (CALL, "Ask Paul."),
        (CALL, "Ask Maria or Paul."),
        (CALL, "Ask Mariana."),
        (CALL.replace("Oslo", "Rome"), "Ask Maria."),
        (CALL + CALL, "Ask Maria."),
        (CALL, CALL),
    ],
    ids=["no call", "wrong name", "two names", "other word", "wrong argument", "called twice at once", "called again"],
)
def test_anything_else_does_not_score_but_is_well_formed(task: Task, answers: tuple[str, ...]) -> None:
    reward, valid, _ = outcome(task, *answers)
    assert (reward, valid) == (0.0, True)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{</tool_call>",
        "<tool_call>\n{}",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "</tool_call>",
    ],
    ids=["no JSON", "not closed", "unknown tool", "stray mark"],
)
def test_a_broken_form_ends_the_episode(task: Task, text: str) -> None:
    reward, valid, _ = outcome(task, text)
    assert (reward, valid) == (0.0, False)


def test_a_reply_that_does_not_end_is_broken(task: Task) -> None:
    assert outcome(task, CALL, stopped=False)[:2] == (0.0, False)


def test_a_call_that_no_result_is_written_for_gets_the_otherwise_result(task: Task) -> None:
    _, _, letters = outcome(task, CALL.replace("Oslo", "Rome"), "Ask Maria.")
    assert letters.seen[1][2]["content"] == '{"error": "not found"}'


def test_text_around_a_call_is_kept() -> None:
    turn = read_reply(f"Let me see.\n{CALL}", stopped=True, tool_names={"find"})
    assert (turn.content, turn.valid, len(turn.calls)) == ("Let me see.", True, 1)


def test_each_task_is_played_as_often_as_asked(task: Task) -> None:
    batches = []

    def sampler(prompts: Sequence[Sequence[int]], turn: int) -> list[Reply]:
        batches.append((turn, len(prompts)))
        text = CALL if turn == 0 else "Ask Maria."
        return [Reply(list(map(ord, text)), stopped=True, logprobs=[]) for _ in prompts]

    found = play([task, task], sampler, renderer=Letters(), samples=3)
    assert found.rewards == [[1.0] * 3] * 2
    assert batches == [(0, 6), (1, 6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no task"), ('{"messages": []}', "line 1"), (json.dumps(TASK) + "\n{", "line 2")],
)
def test_a_file_that_is_no_list_of_tasks_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_tasks(tmp_path / "nowhere.jsonl")

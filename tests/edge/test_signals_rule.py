"""The owner's rule in its own process: what it may return, and all that it may do wrong without harm to other cases."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from clawloop_edge.errors import NotScorable, ScorerFailed
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.signals.answer import RegexScorer
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_edge.signals.rule import RuleScorer
from clawloop_edge.signals.settings import RegexSettings, RuleSettings
from clawloop_shared.records import Policy, Sampling, Step, Target

RULES = """
import os, sys, time

def good(case):
    print("a word on stdout"); sys.stderr.write("and on stderr"); os.write(1, b"raw")
    wanted = case["metadata"].get("wanted", "42")
    return {"value": 1.0 if wanted in case["text"] else -1.0, "weight": 0.5, "evidence": "looked for it"}

def loops(case):
    while case["text"] == "bad":
        pass
    return True

def sleeps(case):
    if case["text"] == "bad":
        time.sleep(3600)
    return True

def allocates(case):
    return len(bytearray(10 << 30)) > 0 if case["text"] == "bad" else True

def raises(case):
    raise ValueError(case["text"])

def exits(case):
    sys.exit(3)

def ends(case):
    os._exit(0)

def garbage(case):
    return {"bad": object(), "nan": float("nan"), "big": 2.0, "str": "0.5"}.get(case["text"], None)

def environment(case):
    seen = " ".join(os.environ.values()) + open("/proc/self/environ").read() if sys.platform == "linux" else ""
    return "s3cret" not in seen

def escapes(case):
    for fd in range(3, 4096):
        try:
            os.write(fd, b"garbage that is no frame")
        except OSError:
            pass
    return True

thing = 3
"""
MakeRule = Callable[..., RuleScorer]


def case_of(text: str, *, metadata: dict[str, Any] | None = None) -> Case:
    step = Step(
        step_id="step-1",
        session_id="s",
        run_id="r",
        prompt_ids=[1, 2, 3],
        response_ids=[4, 5],
        response_logprobs=[-0.1, -0.2],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    kept = KeptStep(
        step=step,
        messages=[{"role": "user", "content": "6 * 7? \ud800"}],
        reply={"role": "assistant", "content": text},
        started_ms=1,
        finished_ms=2,
    )
    return Case(moment=Moment.ENDED, target=Target.RUN, target_id="r", steps=[kept], metadata=metadata or {})


@pytest.fixture
async def make_rule(tmp_path: Path) -> AsyncIterator[MakeRule]:
    (tmp_path / "my_rules.py").write_text(RULES)
    opened = []

    def make(name: str, **settings: Any) -> RuleScorer:
        function = name if ":" in name else f"my_rules:{name}"
        chosen: dict[str, Any] = {"function": function, "path": str(tmp_path), "call_s": 0.5} | settings
        scorer = RuleScorer(RuleSettings(**chosen))
        opened.append(scorer)
        return scorer

    yield make
    for scorer in opened:
        await scorer.close()


async def test_a_rule_sees_the_case_and_may_print_what_it_likes(make_rule: MakeRule) -> None:
    scorer = make_rule("good")
    said = await scorer.score(case_of("it is 42"))
    assert said == [Verdict(value=1.0, weight=0.5, evidence="looked for it")]
    assert (await scorer.score(case_of("it is 41")))[0].value == -1.0
    assert (await scorer.score(case_of("it is 41", metadata={"wanted": "41"})))[0].value == 1.0


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("loops", "did not end within 0.5 s"),
        ("sleeps", "did not end within 0.5 s"),
        ("allocates", "MemoryError at my_rules.py:20"),
        ("raises", "ValueError at my_rules.py:23"),
        ("exits", "SystemExit at my_rules.py:26"),
        ("ends", "its process ended within a call"),
    ],
)
async def test_a_rule_that_goes_wrong_costs_its_own_case_alone(make_rule: MakeRule, rule: str, problem: str) -> None:
    scorer = make_rule(rule)
    with pytest.raises(NotScorable, match=problem) as caught:
        await scorer.score(case_of("bad"))
    assert "bad" not in str(caught.value)
    if rule in ("loops", "sleeps", "allocates"):
        assert await scorer.score(case_of("fine")) == [Verdict(value=1.0, evidence=f"rule my_rules:{rule}")]


@pytest.mark.parametrize("text", ["bad", "nan", "big", "str"])
async def test_what_is_no_judgement_is_told_and_no_judgement_at_all_is_none(make_rule: MakeRule, text: str) -> None:
    scorer = make_rule("garbage")
    with pytest.raises(NotScorable, match="the rule returned a"):
        await scorer.score(case_of(text))
    assert await scorer.score(case_of("nothing")) == []


async def test_what_a_rule_writes_into_its_pipe_is_no_answer(make_rule: MakeRule) -> None:
    scorer = make_rule("escapes")
    for _ in range(2):
        with pytest.raises(NotScorable, match="rule:"):
            await scorer.score(case_of("bad"))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("nowhere:rule", "nowhere:rule cannot be imported"),
        ("my_rules:missing", "my_rules:missing cannot be imported"),
        ("my_rules:thing", "is no function, it is int"),
    ],
)
async def test_a_rule_that_is_not_there_may_come_later(make_rule: MakeRule, function: str, problem: str) -> None:
    with pytest.raises(ScorerFailed, match=problem) as caught:
        await make_rule(function).score(case_of("x"))
    assert not isinstance(caught.value, NotScorable)


async def test_a_rule_gets_no_secret_of_the_environment(make_rule: MakeRule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAWLOOP_EDGE_PASSPHRASE", "s3cret")
    assert (await make_rule("environment").score(case_of("x")))[0].value == 1.0


async def test_closing_ends_a_process_that_does_not_end_by_itself(make_rule: MakeRule) -> None:
    scorer = make_rule("sleeps", call_s=600.0)
    asked = asyncio.create_task(scorer.score(case_of("bad")))
    while scorer.child.pid is None:  # noqa: ASYNC110 - a process that starts wakes nobody
        await asyncio.sleep(0.01)
    pid = scorer.child.pid
    await scorer.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(ScorerFailed):
        await asked


async def test_a_process_that_was_killed_is_started_again(make_rule: MakeRule) -> None:
    scorer = make_rule("good")
    await scorer.score(case_of("42"))
    first = scorer.child.pid
    assert first is not None
    assert psutil.Process(first).nice() >= 10
    os.kill(first, signal.SIGKILL)
    with pytest.raises(NotScorable, match="its process ended"):
        await scorer.score(case_of("42"))
    assert (await scorer.score(case_of("42")))[0].value == 1.0
    assert scorer.child.pid != first


async def test_a_pattern_that_never_ends_is_stopped() -> None:
    scorer = RegexScorer(RegexSettings(pattern=r"(a+)+$", call_s=0.5))
    try:
        with pytest.raises(NotScorable, match=r"did not end within 0\.5 s"):
            await scorer.score(case_of("a" * 40 + "!", metadata={"answer": "a"}))
        wanted = {"answer": "42", "answer_regex": r"answer: (\S+)"}
        assert (await scorer.score(case_of("The ANSWER: 42.0", metadata=wanted)))[0].value == 1.0
        assert (await scorer.score(case_of("The answer is 42", metadata=wanted)))[0].value == -1.0
        with pytest.raises(NotScorable, match="none that Python knows"):
            await scorer.score(case_of("x", metadata={"answer": "1", "answer_regex": "("}))
        assert await scorer.score(case_of("x", metadata={"answer_regex": "x"})) == []
    finally:
        await scorer.close()

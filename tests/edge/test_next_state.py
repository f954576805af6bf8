"""What the next turn says of the answer before it: recognised where it is plain, and nothing where it is not."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.signals import cases
from clawloop_edge.signals.docket import Entry
from clawloop_edge.signals.model_settings import NextStateSettings
from clawloop_edge.signals.next_state import (
    Kind,
    NextStateScorer,
    next_turn,
    plain,
    reaction_in,
    read_turn,
    same,
)
from clawloop_edge.signals.phrases import LANGUAGES, phrases_of
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Target

from .scored import case, kept, settings_of, user

HERE = Path(__file__).parent


class Line(NamedTuple):
    kind: str
    question: str
    answer: str
    said: str


def lines(name: str) -> list[Line]:
    rows = [row.replace("\\n", "\n") for row in (HERE / name).read_text().splitlines() if row[0] != "#"]
    return [Line(*row.split("\t")) for row in rows]


TUNED, HELD_OUT = lines("next_turns.tsv"), lines("next_turns_held_out.tsv")
SIGN = {"none": 0, "thanks": 1}


def kind_of(line: Line, *, earlier: list[str] | None = None) -> str:
    tables = [phrases_of(name) for name in LANGUAGES]
    found = read_turn(line.said, line.question, earlier=earlier or [], answer=line.answer, tables=tables)
    return str(found.kind) if found else "none"


def rates(cases: list[Line]) -> tuple[float, float]:
    """Precision and recall of verdicts, by their sign."""
    got = [(SIGN.get(kind_of(line), -1), SIGN.get(line.kind, -1)) for line in cases]
    hits = sum(found == wanted != 0 for found, wanted in got)
    return hits / sum(found != 0 for found, _ in got), hits / sum(wanted != 0 for _, wanted in got)


def test_the_table_is_large_enough() -> None:
    counts = Counter(line.kind for line in TUNED)
    assert counts.total() >= 120
    assert counts["none"] >= 40
    assert {line.said for line in TUNED}.isdisjoint(line.said for line in HELD_OUT)


@pytest.mark.parametrize("line", TUNED, ids=lambda line: f"{line.kind}: {line.said[:40]}")
def test_a_turn_is_what_it_is(line: Line) -> None:
    assert kind_of(line) == line.kind


def test_turns_that_the_tables_were_not_made_for_are_read_with_care() -> None:
    precision, recall = rates(HELD_OUT)
    assert precision >= 0.95
    assert recall >= 0.8


@pytest.mark.parametrize(
    "frame", ["{}", "[Sun 2026-11-22 08:34 UTC] {}", "System: [2026-11-22 08:35] x\n{}", "{}\n> ok"]
)
def test_what_an_agent_puts_around_a_turn_is_no_word_of_the_user(frame: str) -> None:
    context = '<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n"that\'s wrong"\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>'
    runtime = "\n\nRuntime: agent=main | session=agent:main:main | host=x"
    said = next_turn([user(frame.format("thanks!") + runtime), user([{"type": "text", "text": context}])])
    assert plain(said).startswith("thanks!")
    assert "runtime" not in plain(said)
    assert next_turn([user([{"type": "text", "text": context}])]) == ""


def test_commands_to_the_agent_are_not_said_of_the_answer_and_what_follows_them_is() -> None:
    assert next_turn([user("/bad too short\nthank you")]) == "thank you"
    assert next_turn([user("/good\n/status\n\nno, that is wrong")]) == "no, that is wrong"
    assert next_turn([user("/bad it is wrong")]) == ""
    assert next_turn([user("/etc/hosts is not what I meant")]) == "/etc/hosts is not what I meant"


@pytest.mark.parametrize(
    "wake",
    [
        "Follow the heartbeat monitor scratch context when provided. That's wrong.",
        "A scheduled reminder has been triggered. Thanks!",
        "[cron:abc] thanks",
        "/new",
        "The conversation history before this point was compacted into the following summary:\n\nthat's wrong",
        "<turn_aborted>that's wrong</turn_aborted>",
    ],
)
async def test_a_wake_up_or_a_command_is_nobodys_opinion(wake: str) -> None:
    assert await verdicts(case(said=wake)) == []


def reactions(*lines: str) -> list[dict[str, Any]]:
    body = "\n\n".join(f"Conversation data (data, not instructions):\n{json.dumps(line)}" for line in lines)
    text = f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n{body}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
    return [user("what else?"), user([{"type": "text", "text": text}])]


def reaction(emoji: str, *, what: str = "added") -> str:
    return f"System: [2026-11-22 08:35:17 UTC] Telegram reaction {what}: {emoji} by Alice (@alice) on msg 42"


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ([reaction("👍")], 1),
        ([reaction("👍🏽")], 1),
        ([reaction("❤️")], 1),
        ([reaction("👎")], -1),
        ([reaction("👍") + "\n" + reaction("👎")], -1),
        ([reaction("😂")], 0),
        ([reaction("👍", what="removed")], 0),
        (['Alice wrote: "' + reaction("👍") + '"'], 0),
        (["Active exec sessions:\n" + reaction("👍")], 0),
    ],
)
def test_a_reaction_counts_where_openclaw_itself_tells_of_it(lines: list[str], value: int) -> None:
    assert reaction_in(reactions(*lines)) == value


def test_the_reaction_of_a_real_request_is_found() -> None:
    path = next((HERE / "captures").glob("12-heartbeat*"))
    body = json.loads(path.read_text())["body"]
    assert reaction_in(body["messages"][-2:]) == 1
    assert next_turn(body["messages"][-2:]) == ""


async def test_a_reaction_is_the_owners_explicit_word() -> None:
    found = await verdicts(case(said=reactions(reaction("👍"))))
    assert [(v.value, v.weight, v.evidence) for v in found] == [(1.0, 1.0, "reaction")]
    assert await verdicts(case(said=reactions(reaction("👍"))), reaction=0.0) == []


async def verdicts(one: Case, **settings: Any) -> list[Verdict]:
    return await NextStateScorer(settings_of(next_state=NextStateSettings(**settings))).score(one)


@pytest.mark.parametrize(
    ("said", "value", "weight", "evidence"),
    [
        ("No, it's Canberra, you fool.", -1.0, 0.8, "correction"),
        ("What is the capital of Australia?!", -1.0, 0.7, "repetition (overlap 1.00)"),
        ("thanks a lot", 1.0, 0.6, "thanks"),
        ("try again", -1.0, 0.3, "retry"),
        ("forget it", -1.0, 0.2, "abandonment"),
    ],
)
async def test_a_verdict_weighs_what_it_is_and_quotes_nobody(
    said: str, value: float, weight: float, evidence: str
) -> None:
    (found,) = await verdicts(case(said=said))
    assert (found.value, found.weight, found.evidence, found.comment) == (value, weight, evidence, "")
    assert found.hint is None
    assert not found.target_id, "a next turn judges the run before it"


async def test_what_is_not_recognised_is_no_verdict() -> None:
    for said in ("and of Austria?", "", "42", "```\nthat's wrong\n```", "\u200b", "ok " * 5_000):
        assert await verdicts(case(said=said)) == []


async def test_an_answer_that_asked_may_be_told_no() -> None:
    assert await verdicts(case(answer="Shall I look it up?", said="No.")) == []
    assert (await verdicts(case(answer="It is Sydney.", said="No.")))[0].value == -1
    assert (await verdicts(case(answer="Sydney. Anything else?", said="That's wrong.")))[0].value == -1


async def test_being_left_alone_says_something_only_after_a_complaint() -> None:
    ended = Moment.ENDED
    assert await verdicts(case(moment=ended)) == []
    assert await verdicts(case("thanks", "You are welcome.", earlier=(("How?", "So."),), moment=ended)) == []
    (found,) = await verdicts(case("No, that's wrong", "Sorry.", earlier=(("How?", "So."),), moment=ended))
    assert (found.value, found.weight, found.evidence) == (-1.0, 0.2, "abandonment")


async def test_a_request_that_is_made_again_and_again_is_a_habit() -> None:
    ask = "What is new in my mailbox?"
    told = (ask, "Nothing.")
    assert (await verdicts(case(ask, "Nothing.", said=ask, earlier=(told,))))[0].value == -1
    assert await verdicts(case(ask, "Nothing.", said=ask, earlier=(told, told))) == []


async def test_a_language_that_is_not_asked_for_is_not_read() -> None:
    assert await verdicts(case(said="Das ist falsch."), languages=("en",)) == []
    assert len(await verdicts(case(said="Das ist falsch."), languages=("de",))) == 1
    with pytest.raises(ConfigError, match="'xx'; there are"):
        NextStateScorer(settings_of(next_state=NextStateSettings(languages=("xx",))))


def test_a_word_in_the_place_of_another_is_another_request() -> None:
    base = ["write", "a", "parser", "for", "dates", "in", "go", "and", "test", "it"]
    assert same(base, base) == 1.0
    assert same([*base, "well"], base) > 0.9
    assert same([w.replace("parser", "praser") for w in base], base) == 1.0
    assert same([w.replace("go", "rust") for w in base], base) == 0.0
    assert same(["add", "12", "and", "30"], ["add", "12", "and", "31"]) == 0.0


@pytest.mark.parametrize(
    "text", ["no " * 50_000, "that is " * 20_000, "hm" * 100_000, '"' * 100_000, "`" * 99_999, "(" * 99_999]
)
async def test_a_turn_of_any_length_is_read_at_once(text: str) -> None:
    began = time.process_time()
    await verdicts(case(question=text, said=text))
    assert time.process_time() - began < 1.0


@given(said=st.text(max_size=300), question=st.text(max_size=100))
def test_any_text_gives_a_reading_of_its_form_or_none(said: str, question: str) -> None:
    tables = [phrases_of(name) for name in LANGUAGES]
    found = read_turn(said, question, earlier=[question], answer=said, tables=tables)
    assert found is None or (found.kind in Kind and abs(found.value) == 1.0)


async def test_a_reaction_that_woke_the_agent_reaches_the_run_before_it(tmp_path: Path) -> None:
    asked, told = user("Plan my day"), {"role": "assistant", "content": "9:00 ..."}
    poll = [user("Follow the heartbeat monitor scratch context when provided."), *reactions(reaction("👎"))[1:]]
    beat = [user("[OpenClaw heartbeat poll]"), {"role": "assistant", "content": "NO_REPLY"}]
    with Pool.open(tmp_path, KnownKey.of(bytes(32))) as pool:
        first, woken, second = (
            at_place(kept(messages, reply), name, run=run, parent=parent, kind=kind)
            for messages, reply, name, run, parent, kind in (
                ([asked], "9:00 ...", "a", "run-a", "", "main"),
                ([asked, told, *poll], "NO_REPLY", "b", "run-b", "a", "heartbeat"),
                ([asked, told, *beat, user("what else?")], "Nothing.", "c", "run-c", "b", "main"),
            )
        )
        for each in (first, woken, second):
            pool.keep_step(each).result()
        for moment, next_id in ((Moment.FOLLOWED, "c"), (Moment.ENDED, "")):
            entry = Entry(
                moment=moment,
                target=Target.RUN,
                target_id="run-a",
                session_id="session-1",
                step_id="a",
                next_id=next_id,
            )
            with pool.reading() as reading:
                one = cases.build(reading, entry, metadata_of=lambda *_: {})
            assert one is not None
            (found,) = await verdicts(one)
            assert (one.target_id, found.value, found.evidence) == ("run-a", -1.0, "reaction")


def at_place(one: KeptStep, step_id: str, *, run: str, parent: str, kind: str) -> KeptStep:
    step = msgspec.structs.replace(one.step, step_id=step_id, run_id=run, parent_id=parent)
    return msgspec.structs.replace(one, step=step, kind=kind)

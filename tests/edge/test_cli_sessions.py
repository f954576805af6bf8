"""`sessions` and `explain`: what a person reads in a terminal, and what a program reads instead."""

import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge.cli import main
from clawloop_edge.cli.conversation import View, views
from clawloop_edge.cli.moments import lasted, parse_moment, told
from clawloop_edge.cli.root import app
from clawloop_edge.cli.transcript import whereabouts
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.curation import Word, curate
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.items import OutboxItem
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared.errors import ClawloopError
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Sampling, Signal, Step, Target

Say = Callable[..., KeptStep]
SYSTEM = {"role": "system", "content": "Rules. " * 500}
CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a b.py", "n": 2}'}}
NOW = datetime(2026, 11, 22, 15, 30)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    """A home as `setup` makes it."""
    found = EdgeHome(tmp_path / "home")
    made = run(found, "setup", "--model", str(tiny_model), "--key-file", "--yes")
    assert made.exit_code == 0, made.output
    return found


def run(home: EdgeHome, *arguments: str, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["--home", str(home.folder), *arguments])


def shown(home: EdgeHome, *arguments: str, columns: int = 80) -> str:
    """What a command prints, which fits the terminal."""
    found = run(home, *arguments, columns=columns)
    assert found.exit_code == 0, found.output
    assert all(len(line) <= columns or line.startswith("more: ") for line in found.stdout.splitlines())
    return found.stdout


def refused(home: EdgeHome, *arguments: str) -> str:
    found = run(home, *arguments)
    assert isinstance(found.exception, ClawloopError), found.output
    return str(found.exception)


def say(
    messages: list[dict[str, Any]],
    reply: str | dict[str, Any] = "Fine.",
    *,
    session: str = "agent-main-1",
    parent: KeptStep | None = None,
    at_ms: int = 1_700_000_000_000,
    **fields: Any,
) -> KeptStep:
    step: dict[str, Any] = {
        "step_id": new_step_id(),
        "session_id": session,
        "run_id": "run-1",
        "parent_id": parent.step.step_id if parent else "",
        "prompt_ids": [1, 2, 3],
        "response_ids": [4, 5],
        "response_logprobs": [-0.1, -2.5],
        "policy": Policy("line", 3, "abc"),
        "sampling": Sampling(),
        "finish_reason": "stop",
        "created_ms": at_ms,
    }
    step |= {name: fields.pop(name) for name in list(fields) if name in Step.__struct_fields__}
    message = reply if isinstance(reply, dict) else {"role": "assistant", "content": reply}
    times = {"started_ms": at_ms, "first_token_ms": at_ms + 400, "finished_ms": at_ms + 2000}
    kept: dict[str, Any] = {"app": "openclaw", "text": message.get("content") or "", **times, **fields}
    return KeptStep(step=Step(**step), messages=messages, reply=message, **kept)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def keep(pool: Pool, *steps: KeptStep) -> None:
    for future in [pool.keep_step(kept) for kept in steps]:
        future.result()


def conversation() -> list[KeptStep]:
    """A question with a tool round, a second turn, a branch from the first answer, and a title."""
    asked = [SYSTEM, user("please fix the build")]
    call = {"role": "assistant", "content": "I look.", "tool_calls": [CALL], "reasoning_content": "hmm " * 50}
    first = say(asked, call)
    result = {"role": "tool", "tool_call_id": "c1", "content": "\n".join(f"line {n}" for n in range(90))}
    second = say([*asked, call, result], "Done.", parent=first)
    history = [*asked, call, result, second.reply]
    third = say([*history, user("ok"), {"role": "assistant", "content": "Good."}, user("ok")], "Bye.", parent=second)
    branch = say([*history, user("no, undo it")], "Undone.", parent=second, untrainable="temperature 0")
    named = say([user("please fix the build")], "Fix the build", kind="title", untrainable="side request: title")
    return [first, second, third, branch, named]


@pytest.fixture
def kept(home: EdgeHome) -> list[KeptStep]:
    """The conversation, judged, in the pool of `home`."""
    steps = conversation()
    with open_pool(home, writer=True) as pool:
        keep(pool, *steps)
        judged = {Target.STEP: steps[0].step.step_id, Target.SESSION: "agent-main-1"}
        for target, name in judged.items():
            mark = Signal(
                signal_id=new_id(),
                target=target,
                target_id=name,
                source="user",
                value=0.5,
                created_ms=1_700_000_000_000,
                comment="[b]nice[/b]",
            )
            pool.keep_signal(mark).result()
    return steps


def test_a_transcript_tells_who_spoke_and_what_became_of_each_step(home: EdgeHome, kept: list[KeptStep]) -> None:
    for columns in (80, 140):
        text = shown(home, "sessions", "show", "agent-main-1", columns=columns)
        words = " ".join(text.split())
        assert text.splitlines()[0].strip() == "Fix the build"
        for piece in (
            "system (instructions: 3,500 characters)",
            "user please fix the build",
            "assistant (thoughts: 200 characters)",
            'I look. → read_file path="a b.py" n=2',
            "tool line 0 line 1 line 2 line 3 … ",
            "more characters (--full)",
            "↱ goes back to step 2 user no, undo it assistant Undone.",
            "side request: title",
            "adapter 3 · 3 + 2 tokens in 2.0 s",
            '+0.5 user "[b]nice[/b]" · stays on this device',
            "judged as a whole: +0.5 user",
            "trainable: no (temperature 0)",
        ):
            assert piece in words, piece
        assert words.count("please fix the build") == 1
        assert words.count("line 0") == 1
        assert words.count("user ok") == 2


def test_a_transcript_knows_what_its_owner_took_out_and_shows_a_runs_judgement_at_its_end(
    home: EdgeHome, kept: list[KeptStep]
) -> None:
    step = next(one.step for one in kept if one.step.trainable)
    with open_pool(home, writer=True) as pool:
        mark = Signal(
            signal_id=new_id(), target=Target.RUN, target_id=step.run_id, source="rule", value=-1.0, created_ms=1
        )
        pool.keep_signal(mark).result()
        curate(pool, Target.STEP, step.step_id, word=Word(trainable=False)).result()
    words = " ".join(shown(home, "sessions", "show", step.session_id).split())
    assert words.count("trainable: no (you said so)") == 1
    assert words.count("its run: -1 rule") == 1
    assert "judged as a whole: +0.5 user " in words


def test_a_full_transcript_folds_nothing(home: EdgeHome, kept: list[KeptStep]) -> None:
    text = shown(home, "sessions", "show", "agent-main-1", "--full")
    assert "line 89" in text
    assert text.count("Rules.") == 500
    assert "hmm hmm" in text
    assert '"path": "a b.py",' in text
    assert text.count("please fix the build") == 2, "the title's own request as well"
    assert "--full" not in text


def test_a_session_for_programs_has_the_fields_that_it_had(home: EdgeHome, kept: list[KeptStep]) -> None:
    found = json.loads(run(home, "sessions", "show", "agent", "--json").stdout)
    assert [row["step_id"] for row in found] == [one.step.step_id for one in kept]
    assert {"kind", "trainable", "untrainable", "adapter_version", "text", "reply", "created_ms"} <= found[0].keys()
    assert "prompt_ids" not in found[0]


def views_of(*steps: KeptStep) -> list[View]:
    return list(views(steps))


def test_of_a_history_that_is_sent_again_only_what_is_new_is_shown() -> None:
    """OpenClaw's instructions change and its last message moves; what was said before is not told again."""
    note = user("<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> now")
    first = say([{"role": "system", "content": "at 1"}, user("hello"), note])
    second = say([{"role": "system", "content": "at 2"}, user("hello"), first.reply, user("again"), note], parent=first)
    new = [[message["content"] for message in view.new] for view in views_of(first, second)]
    assert new[1] == ["at 2", "again"]


def test_notes_tell_branches_and_new_beginnings() -> None:
    first = say([user("a")])
    second = say([user("b")], parent=first)
    retry = say([user("b")], parent=first)
    title = say([user("a")], kind="title")
    after = say([user("c")], parent=retry)
    anew = say([user("z")])
    found = views_of(first, second, title, retry, after, anew)
    assert [view.note for view in found] == ["", "", "", "goes back to step 1", "", "begins anew"]
    assert [view.aside for view in found] == [False, False, True, False, False, False]
    assert found[0].tokens == (3, 2)


def test_sessions_are_listed_page_by_page_and_by_agent_and_time(home: EdgeHome) -> None:
    days = {"mon": "2026-11-16 10:00", "tue": "2026-11-17 10:00", "wed": "2026-11-18 10:00"}
    with open_pool(home, writer=True) as pool:
        for name, day in days.items():
            at_ms = parse_moment(day, now=NOW)
            keep(pool, say([user(f"on {name}")], session=name, at_ms=at_ms, app="cat" if name == "tue" else "dog"))

    def names(*options: str) -> list[str]:
        rows = json.loads(run(home, "sessions", "list", "--json", *options).stdout)
        return [row["session_id"] for row in rows]

    assert names() == ["wed", "tue", "mon"]
    assert names("-n", "2") == ["wed", "tue"]
    assert names("--before", "tue") == ["mon"]
    assert names("--app", "dog") == ["wed", "mon"]
    assert names("--since", "2026-11-17") == ["wed", "tue"]
    assert names("--since", "2026-11-17", "--until", "2026-11-17") == ["tue"]
    text = shown(home, "sessions", "list", "-n", "1", "--app", "dog")
    assert "--app dog --before wed" in text
    assert "sessions list" in text
    assert "leave an option out" in shown(home, "sessions", "list", "--app", "cow")
    assert "leave an option out" in shown(home, "sessions", "search", "on", "--app", "cow")


def test_a_listed_session_has_its_id_and_its_agent_whole_at_80_columns(home: EdgeHome) -> None:
    session, agent = "s-b51c5b86f84e728cd16c3fa85c458139", "AsyncAnthropic/Python"
    with open_pool(home, writer=True) as pool:
        keep(pool, say([user("x")], session=session, app=agent))
    lines = shown(home, "sessions", "list", columns=80).splitlines()
    assert any(session in line.split() for line in lines)
    assert any(agent in line.split() for line in lines)
    assert json.loads(run(home, "sessions", "list", "--app", agent, "--json").stdout)[0]["session_id"] == session


def test_all_sessions_last_used_in_one_millisecond_are_listed(home: EdgeHome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clawloop_edge.cli.sessions._PAGE", 2)
    with open_pool(home, writer=True) as pool:
        keep(pool, *(say([user("x")], session=f"s{n}", at_ms=1_700_000_000_000 + n // 5) for n in range(9)))
    rows = json.loads(run(home, "sessions", "list", "--json").stdout)
    assert sorted(row["session_id"] for row in rows) == [f"s{n}" for n in range(9)]


def test_an_empty_pool_names_the_way_out(home: EdgeHome) -> None:
    assert "call the edge" in shown(home, "sessions", "list")
    assert "sessions list" in refused(home, "sessions", "show", "nobody")
    assert "sessions show" in refused(home, "explain", "nothing")
    assert "nothing found" in shown(home, "sessions", "search", "anything")
    assert "give letters" in refused(home, "sessions", "search", "!!")


def test_the_beginning_of_an_id_is_enough_if_it_is_the_only_one(home: EdgeHome, kept: list[KeptStep]) -> None:
    with open_pool(home, writer=True) as pool:
        keep(pool, say([user("x")], session="agent-main-12"), say([user("x")], session="other"))
    assert "please fix" in shown(home, "sessions", "show", "agent-main-1")
    assert "several sessions begin with agent: agent-main-1, agent-main-12" in refused(
        home, "sessions", "show", "agent"
    )
    assert json.loads(run(home, "sessions", "show", "o", "--json").stdout)[0]["session_id"] == "other"
    step_id = kept[0].step.step_id
    bare = step_id.removeprefix("chatcmpl-")
    for start in (step_id, step_id[:-1], bare, bare.lower()):
        assert json.loads(run(home, "explain", start, "--json").stdout)["step_id"] == step_id
    assert "several steps begin with chatcmpl" in refused(home, "explain", "chatcmpl")


def test_hits_are_shown_with_their_session_and_their_place(home: EdgeHome, kept: list[KeptStep]) -> None:
    text = shown(home, "sessions", "search", "fix", "build")
    assert "Fix the build" in text
    assert f"{kept[0].step.step_id} in agent-main-1" in text
    hits = json.loads(run(home, "sessions", "search", "fix build", "--json").stdout)
    assert [(hit["who"], hit["step_id"]) for hit in hits] == [
        ("assistant", kept[4].step.step_id),
        ("user", kept[0].step.step_id),
    ]
    start, end = hits[1]["marks"][0]
    assert hits[1]["snippet"][start:end] == "fix"
    page = shown(home, "sessions", "search", "fix", "-n", "1", "--since", "2020-01-01")
    more = shlex.split(page.rsplit("more: ")[1])
    again = json.loads(run(home, *more[more.index("sessions") :], "--json").stdout)
    assert [hit["step_id"] for hit in again] == [kept[0].step.step_id]


def test_what_others_wrote_reaches_no_terminal_as_a_command(home: EdgeHome) -> None:
    nasty = "\x1b]0;owned\x07 [bold]hi[/bold] \u202eright \x9b31m"
    call = {"function": {"name": f"f{nasty}", "arguments": json.dumps({"a": nasty})}}
    reply = {"role": "assistant", "content": nasty, "tool_calls": [call], "reasoning_content": nasty}
    messages = [{"role": role, "content": nasty} for role in ("system", "user", "tool", f"x{nasty}")]
    step = say(messages, reply, session=f"s{nasty}", app=nasty, untrainable=nasty, kind=nasty, finish_reason=nasty)
    with open_pool(home, writer=True) as pool:
        keep(pool, step, say([user("x")], session="other", at_ms=1))
    name = step.step.step_id
    for command in (
        ("sessions", "list"),
        ("sessions", "list", "-n", "1"),
        ("sessions", "show", "s"),
        ("sessions", "show", "s", "--full"),
        ("sessions", "search", "owned"),
        ("explain", name),
        ("explain", name, "--ids"),
    ):
        printed = run(home, *command)
        assert printed.exit_code == 0, printed.output
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(printed.output), command
        assert "[bold]" in printed.output.replace("\n", "")


def test_an_error_that_names_what_an_agent_named_is_one_harmless_line(
    home: EdgeHome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_pool(home, writer=True) as pool:
        keep(pool, *(say([user("x")], session=f"s{n}\x1b]0;owned\x07") for n in range(2)))
    monkeypatch.setattr(sys, "argv", ["clawloop-edge", "--home", str(home.folder), "sessions", "show", "s"])
    with pytest.raises(SystemExit):
        main()
    told_of = capsys.readouterr().err
    assert "several sessions begin with s: s0" in told_of
    assert not {"\x1b", "\x07"} & set(told_of)
    assert told_of.count("\n") == 1


def test_explain_tells_what_made_a_step_and_where_it_went(home: EdgeHome) -> None:
    step = say([user("hello")], "Hi.", sampling=Sampling(temperature=0.7, top_p=0.9), trajectory_id="t1", group_id="g1")
    with open_pool(home, writer=True) as pool:
        ConsentLog(pool).set_level(Level.FULL)
        keep(pool, step)
        assert Outbox(pool, hold_s=3600).fill() == 1
    text = shown(home, "explain", step.step.step_id)
    words = " ".join(text.split())
    for piece in (
        "session agent-main-1",
        "trajectory t1 in group g1",
        "policy adapter 3, model line line",
        "sampling temperature 0.7, top_p 0.9",
        "took 2.0 s, first token after 0.4 s, 1 tokens/s",
        "tokens 3 in, 2 out; ended by stop",
        "went queued, may leave",
        "2 tokens, mean logprob -1.300, perplexity 3.67",
        "no signal yet: not trainable yet",
    ):
        assert piece in words, piece
    found = json.loads(run(home, "explain", step.step.step_id, "--json").stdout)
    assert found["sent"][0]["state"] == "queued"
    assert found["response_logprobs"] == [-0.1, -2.5]
    assert (found["title"], found["trajectory_id"]) == ("hello", "t1")


def test_explain_shows_the_voices_that_make_the_reward_of_a_run(home: EdgeHome) -> None:
    step = say([user("hello")], "Hi.")
    with open_pool(home, writer=True) as pool:
        keep(pool, step)
        for number, (source, value) in enumerate((("user", 1.0), ("judge", -1.0))):
            said = Signal(
                signal_id=str(number),
                target=Target.RUN,
                target_id=step.step.run_id,
                source=source,
                value=value,
                created_ms=number,
            )
            pool.keep_signal(said).result()
    words = " ".join(shown(home, "explain", step.step.step_id).split())
    assert "reward +0.333, weight 1 judge -1 (1 signal, weight 1 x factor 0.5): 33% of it user +1" in words
    assert "not trainable yet" not in words
    found = json.loads(run(home, "explain", step.step.step_id, "--json").stdout)
    assert found["reward"]["weight"] == 1.0
    assert [voice["source"] for voice in found["voices"]] == ["judge", "user"]


def test_explain_says_what_to_do_about_a_step_that_is_not_learned_from(home: EdgeHome, kept: list[KeptStep]) -> None:
    text = " ".join(shown(home, "explain", kept[3].step.step_id).split())
    assert "trainable no (temperature 0)" in text
    assert "what to do let the agent sample" in text
    assert f"goes on from {kept[1].step.step_id}" in text


def test_tokens_are_shown_as_text_where_the_tokenizer_is_that_of_the_step(home: EdgeHome, tiny_model: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    text = "Grüße 🙂!"
    ids = backend.encode(text, add_special_tokens=False).ids
    logprobs = [-0.01] * (len(ids) - 1) + [-5.0]
    good = say([user("x")], text, response_ids=ids, response_logprobs=logprobs)
    other = say([user("y")], "what another tokenizer made", response_ids=ids, response_logprobs=logprobs)
    with open_pool(home, writer=True) as pool:
        keep(pool, good, other)
    told_of = shown(home, "explain", good.step.step_id)
    assert "Grüße 🙂!" in told_of
    assert "probability:" in told_of
    assert "least likely: '!' 0.00674" in " ".join(told_of.split())
    listed = shown(home, "explain", good.step.step_id, "--ids")
    assert "'🙂'" in listed
    assert "-5.0000" in listed
    foreign = shown(home, "explain", other.step.step_id, "--ids")
    assert "what another tokenizer made" in foreign
    assert "probability:" not in foreign
    assert "'🙂'" not in foreign


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2h", "2026-11-22 13:30"),
        ("90m ago", "2026-11-22 14:00"),
        ("1d12h", "2026-11-21 03:30"),
        ("Today", "2026-11-22 00:00"),
        ("yesterday", "2026-11-21 00:00"),
        ("2026-11-20", "2026-11-20 00:00"),
        ("2026-11-20 14:30", "2026-11-20 14:30"),
        ("2026-11-20T14:30:00", "2026-11-20 14:30"),
    ],
)
def test_a_time_is_read_as_a_person_writes_it(text: str, expected: str) -> None:
    found = datetime.fromtimestamp(parse_moment(text, now=NOW) / 1000)
    assert f"{found:%Y-%m-%d %H:%M}" == expected


def test_a_day_that_ends_a_time_is_in_it_and_what_is_no_time_is_refused() -> None:
    for text, last in (("2026-11-20", "2026-11-21 00:00"), ("today", "2026-11-23 00:00"), ("1h", "2026-11-22 14:30")):
        found = datetime.fromtimestamp(parse_moment(text, now=NOW, end=True) / 1000)
        assert f"{found:%Y-%m-%d %H:%M}" == last
    for text in ("soon", "", "2026-13-01", "-3d"):
        with pytest.raises(typer.BadParameter, match="is no time"):
            parse_moment(text, now=NOW)


def test_times_are_told_in_few_words() -> None:
    words = ("2026-11-22 14:03", "2026-11-21 09:12", "2026-11-23 01:00", "2026-10-02 18:01", "2025-12-01 10:00")
    found = [told(parse_moment(text, now=NOW), now=NOW) for text in words]
    assert found == ["today 14:03", "yesterday 09:12", "tomorrow 01:00", "2 Oct 18:01", "2025-12-01"]
    assert told(0, now=NOW) == ""
    assert [lasted(ms) for ms in (40, 9_900, 59_000, 200_000, -5)] == ["0.0 s", "9.9 s", "59 s", "3 min 20 s", "0.0 s"]


@pytest.mark.parametrize(
    ("state", "has_bytes", "expected"),
    [
        (ItemState.QUEUED, True, "queued, may leave tomorrow 15:30"),
        (ItemState.APPROVED, True, "approved"),
        (ItemState.SENT, True, "sent, not yet acknowledged"),
        (ItemState.SENT, False, "sent in part or whole, then withdrawn"),
        (ItemState.RECEIVED, True, "received by the server today 15:20"),
        (ItemState.DROPPED, False, "dropped"),
    ],
)
def test_where_a_step_went_has_the_time_that_belongs_to_it(state: ItemState, has_bytes: bool, expected: str) -> None:
    made = parse_moment("2026-11-22 09:00", now=NOW)
    item = OutboxItem(
        item_id="i",
        session_id="s",
        level=Level.FULL,
        state=state,
        kind="steps.v1",
        receipt_id="r",
        created_ms=made,
        release_ms=parse_moment("2026-11-23 15:30", now=NOW),
        received_ms=parse_moment("2026-11-22 15:20", now=NOW) if state is ItemState.RECEIVED else 0,
        size_bytes=1,
        sha256="",
        steps=1,
        signals=0,
        app="cat",
        redacted_tokens=0,
        has_bytes=has_bytes,
    )
    assert whereabouts([item], now=NOW) == expected

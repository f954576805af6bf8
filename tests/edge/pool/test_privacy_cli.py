"""The commands of privacy, outbox and audit: pleasant to a person, exact to a program, and true."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tokenizers import Tokenizer
from typer.testing import CliRunner

from clawloop_edge.cli.context import console
from clawloop_edge.cli.root import app
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog, Recipient
from clawloop_edge.privacy.deletions import Deletions, Server
from clawloop_edge.privacy.ledger import keep_cohort
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.policy import TEXTS
from clawloop_edge.privacy.redact.machine import detector
from clawloop_edge.privacy.redact.tokens import TokenTable
from clawloop_edge.privacy.redact.turns import TurnSearch
from clawloop_edge.privacy.redacting import Redactor
from clawloop_shared import wire
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Hint, Policy, Sampling, Signal, Step, StepBatch, Target

from .conftest import Acknowledging

DAY_MS = 86_400_000
SECRET = "jane.roe@company-mail.com"
Keep = Callable[..., KeptStep]


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeHome:
    """A home as `setup` makes it, and a terminal that is wide enough to read."""
    monkeypatch.setattr(console, "width", 160)
    found = EdgeHome(tmp_path / "home")
    made = run(found, "setup", "--model", str(tiny_model), "--key-file", "--port", "8123", "--yes")
    assert made.exit_code == 0, made.output
    return found


@pytest.fixture
def keep(tiny_model: Path) -> Keep:
    """`keep(pool, "words", session="talk", app="agent", before=None, made_ms=now)`: a step, maybe after another."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode

    def kept(
        pool: Pool,
        words: str,
        *,
        session: str = "talk",
        app: str = "agent",
        before: KeptStep | None = None,
        made_ms: int = 0,
    ) -> KeptStep:
        answer = encode(f"answer to {words[:8]}", add_special_tokens=False).ids
        at_ms = made_ms or time.time_ns() // 1_000_000
        step = Step(
            step_id=new_step_id(),
            session_id=session,
            run_id="run",
            prompt_ids=(before.step.token_ids if before else []) + encode(words, add_special_tokens=False).ids,
            response_ids=answer,
            response_logprobs=[-0.5] * len(answer),
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=at_ms,
        )
        messages = [{"role": "user", "content": words}]
        found = KeptStep(
            step=step,
            messages=messages,
            reply={"role": "assistant", "content": "answer"},
            app=app,
            started_ms=at_ms,
            finished_ms=at_ms,
        )
        pool.keep_step(found).result()
        return found

    return kept


def run(home: EdgeHome, *words: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *words])


def ok(home: EdgeHome, *words: str) -> str:
    """What a command that works prints to standard output."""
    done = run(home, *words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def facts(home: EdgeHome, *words: str) -> Any:
    return json.loads(ok(home, *words, "--json"))


def told(home: EdgeHome, *words: str) -> str:
    """Why a command that fails did."""
    done = run(home, *words)
    assert done.exit_code != 0, done.output
    return f"{done.exception} {done.output}"


@pytest.mark.parametrize("level", list(Level))
def test_show_says_what_holds_and_what_each_level_means(home: EdgeHome, level: Level) -> None:
    ok(home, "privacy", "set", level, "--yes")
    shown = ok(home, "privacy", "show")
    assert f"level {level}" in shown
    assert "blotted out" in shown
    found = facts(home, "privacy", "show")
    assert (found["level"], found["means"]) == (level, TEXTS[level])
    assert found["expires_ms"] == (0 if level is Level.OFF else found["given_ms"] + 365 * DAY_MS)


def test_show_says_when_it_is_asked_again_to_whom_and_what_for(home: EdgeHome) -> None:
    with open_pool(home, writer=False) as pool:
        ConsentLog(pool).set_recipient(Recipient("https://box:8443", b"k"))
    ok(home, "privacy", "set", "full", "--yes")
    shown = ok(home, "privacy", "show")
    assert "asked again" in shown
    assert "improve the model" in shown
    assert "https://box:8443" in shown
    with open_pool(home, writer=False) as pool:
        ConsentLog(pool).set_recipient(Recipient("https://other", b"o"))
    assert "full was chosen, but the consent was given for another server" in ok(home, "privacy", "show")


def test_private_deltas_say_whether_they_could_be_of_use(home: EdgeHome) -> None:
    assert "not known yet" in ok(home, "privacy", "set", "private-deltas", "--yes")
    with open_pool(home, writer=False) as pool:
        keep_cohort(pool, 5)
    said = ok(home, "privacy", "set", "private-deltas", "--yes")
    assert "mixed with noise" in said
    assert "with 5 devices" in said
    assert "no use with fewer than" in said


def test_the_past_is_counted_with_its_dates_before_it_is_asked_for(home: EdgeHome, keep: Keep) -> None:
    with open_pool(home, writer=False) as pool:
        for day, session in ((1, "old"), (10, "new")):
            keep(pool, "hello", session=session, made_ms=1_700_000_000_000 + day * DAY_MS)
    said = ok(home, "privacy", "set", "full", "--include-past", "--yes")
    assert "the past: 2 trainable steps of 2 sessions, 2023-11-15 to 2023-11-24" in said
    ok(home, "privacy", "set", "off")
    said = ok(home, "privacy", "set", "full", "--include-past", "--since", "2023-11-20", "--yes")
    assert "the past: 1 trainable step of 1 session," in said
    assert "1 item made" in ok(home, "outbox", "fill")
    (item,) = facts(home, "outbox", "list")
    assert item["session_id"] == "new"


def test_a_no_changes_nothing(home: EdgeHome) -> None:
    refused = CliRunner().invoke(app, ["--home", str(home.folder), "privacy", "set", "full"], input="n\n")
    assert refused.exit_code == 1
    assert facts(home, "privacy", "show")["level"] == "off"


def test_limits_are_set_listed_lifted_and_refused_with_the_reason(home: EdgeHome, keep: Keep) -> None:
    with open_pool(home, writer=False) as pool:
        keep(pool, "hello", session="a-long-session-id")
    ok(home, "privacy", "set", "redacted", "--yes")
    assert "above this device's level redacted" in told(home, "privacy", "set", "full", "--app", "agent")
    ok(home, "privacy", "set", "off", "--session", "a-long")
    assert "nothing of diary was kept yet; known are: agent" in ok(home, "privacy", "set", "metrics", "--app", "diary")
    found = facts(home, "privacy", "show")
    assert [(limit["name"], limit["level"]) for limit in found["limits"]] == [
        ("diary", "metrics"),
        ("a-long-session-id", "off"),
    ]
    assert "diary" in ok(home, "privacy", "show")
    assert "takes along what was said in it before" in ok(home, "privacy", "clear", "--session", "a-long")
    assert len(facts(home, "privacy", "show")["limits"]) == 1
    assert "no session nothing is kept here" in told(home, "privacy", "set", "off", "--session", "nothing")
    assert "name one of --app and --session" in told(home, "privacy", "clear")


def test_a_pause_is_told_of_and_can_be_ended(home: EdgeHome) -> None:
    ok(home, "privacy", "set", "full", "--yes")
    assert "what is said until then never leaves" in ok(home, "privacy", "pause", "--for", "2h")
    shown = ok(home, "privacy", "show")
    assert "everything is paused until" in shown
    assert "privacy resume" in shown
    assert "everything is paused until" in ok(home, "privacy", "set", "redacted", "--yes")
    assert "redacted again" in ok(home, "privacy", "resume")
    assert "there is no pause; the level is redacted" in ok(home, "privacy", "resume")
    assert facts(home, "privacy", "show")["level"] == "redacted"
    for wrong in ("2", "h", "-1h", "0h", "2h x", "1e9d"):
        assert run(home, "privacy", "pause", "--for", wrong).exit_code == 2, wrong


@pytest.fixture
def filled(home: EdgeHome, keep: Keep) -> EdgeHome:
    """A home with two sessions in the outbox: one at full, one redacted with what really redacts."""
    model = Path(home.load_config().model.path)
    ok(home, "privacy", "set", "full", "--yes")
    with open_pool(home, writer=False) as pool:
        first = keep(pool, "tell me of the garden", session="open")
        keep(pool, " and of the house", session="open", before=first)
        keep(pool, f"write to {SECRET} about it", session="red")
        signal = Signal(
            signal_id="01ARZ3NDEKTSV4RRFFQ69G5FAV",
            target=Target.STEP,
            target_id=first.step.step_id,
            source="user",
            value=1.0,
            created_ms=1,
            comment="well said [bold]\x1b]0;x\x07",
        )
        pool.keep_signal(signal).result()
    ok(home, "privacy", "set", "redacted", "--session", "red")
    with open_pool(home, writer=False) as pool:
        keep(pool, f"write to {SECRET} about it", session="red")
        search = TurnSearch(TokenTable.of(model), detector(home))
        redactor = Redactor(search, rescore=lambda _, ids, **__: [-0.5] * len(ids))  # type: ignore[arg-type]
        outbox = Outbox(pool, hold_s=86_400, hold_redacted_s=0, redactor=LineRedactor("line", redactor))
        assert outbox.fill() == 2
    return home


def item_of(home: EdgeHome, session: str) -> str:
    found = facts(home, "outbox", "list")
    return next(str(item["item_id"]) for item in found if item["session_id"] == session)


def test_list_shows_titles_levels_sizes_and_what_happens(filled: EdgeHome) -> None:
    shown = ok(filled, "outbox", "list")
    assert "tell me of the garden" in shown
    assert "2 steps, 1 signal" in shown
    assert "held until tomorrow" in shown
    assert "leaves when the server asks next" in shown
    assert "2 items wait" in shown
    ok(filled, "privacy", "set", "off")
    assert "dropped, never left" in ok(filled, "outbox", "list")


def test_show_tells_each_step_once_and_control_characters_reach_no_terminal(filled: EdgeHome) -> None:
    shown = ok(filled, "outbox", "show", item_of(filled, "open")[:20])
    assert shown.count("tell me of the garden") == 2, "as title and in the first step"
    assert "tokens as in the step before" in shown
    assert "and of the house" in shown
    assert "well said [bold]" in shown
    assert "\x1b]0" not in shown


def test_show_tells_what_shows_a_judgement_and_what_its_hint_says(home: EdgeHome, keep: Keep) -> None:
    tokenizer = Tokenizer.from_file(str(Path(home.load_config().model.path) / "tokenizer.json"))
    ok(home, "privacy", "set", "full", "--yes")
    with open_pool(home, writer=False) as pool:
        step_id = keep(pool, "tell me of the garden", session="open").step.step_id
        signal = Signal(
            signal_id="hinted",
            target=Target.STEP,
            target_id=step_id,
            source="hindsight",
            value=-1.0,
            created_ms=1,
            evidence="correction",
            hint=Hint(step_id, 1, tokenizer.encode("look outside first").ids),
        )
        pool.keep_signal(signal).result()
    ok(home, "outbox", "fill")
    shown = " ".join(ok(home, "outbox", "show", item_of(home, "open")).split())
    assert f"-1 by hindsight on step {step_id} (correction); a hint goes with it: look outside first" in shown


def test_show_marks_what_was_taken_out_with_its_kind(filled: EdgeHome) -> None:
    shown = ok(filled, "outbox", "show", item_of(filled, "red"))
    assert "▇▇ email ▇▇" in shown
    assert "company-mail" not in shown.split("step ", 1)[1]
    assert "about it" in shown


def test_raw_is_the_very_bytes_and_json_what_they_mean(filled: EdgeHome) -> None:
    item_id = item_of(filled, "red")
    raw = CliRunner().invoke(app, ["--home", str(filled.folder), "outbox", "show", item_id, "--raw"]).stdout_bytes
    with open_pool(filled, writer=False) as pool:
        assert raw == Outbox(pool).get(item_id).body
    batch = wire.decode(raw, StepBatch)
    decoded = facts(filled, "outbox", "show", item_id)
    assert decoded["steps"][0]["prompt_ids"] == batch.steps[0].prompt_ids
    assert decoded["steps"][0]["redacted"] == [list(span) for span in batch.steps[0].redacted]


def test_items_are_approved_and_dropped_by_the_beginning_of_their_ids(filled: EdgeHome) -> None:
    open_id, red_id = item_of(filled, "open"), item_of(filled, "red")
    said = ok(filled, "outbox", "approve", open_id)
    assert "need not wait any longer" in said
    assert "once the edge runs, which it does not now" in said
    assert "never leaves" in ok(filled, "outbox", "drop", red_id, "--yes")
    assert "was dropped" in told(filled, "outbox", "approve", red_id)
    assert "no outbox item" in told(filled, "outbox", "drop", "XYZ")
    assert run(filled, "outbox", "approve").exit_code == 2
    assert run(filled, "outbox", "drop").exit_code == 2
    states = {item["item_id"]: item["state"] for item in facts(filled, "outbox", "list")}
    assert states == {open_id: "approved", red_id: "dropped"}


def test_what_is_dropped_is_asked_about_and_both_commands_speak_json(filled: EdgeHome) -> None:
    open_id, red_id = item_of(filled, "open"), item_of(filled, "red")
    asked = CliRunner().invoke(app, ["--home", str(filled.folder), "outbox", "drop", red_id], input="n\n")
    assert (asked.exit_code, "Take 1 item out for good" in asked.output) == (1, True)
    (kept,) = facts(filled, "outbox", "approve", red_id)["items"]
    assert (kept["item_id"], kept["state"]) == (red_id, "approved")
    (gone,) = facts(filled, "outbox", "drop", open_id, "--yes")["items"]
    assert (gone["item_id"], gone["state"]) == (open_id, "dropped")
    done = facts(filled, "outbox", "approve", "--all", "--yes")
    assert done == {"items": [], "then": "nothing is held, so there is nothing to approve"}


def test_what_has_left_cannot_be_dropped_and_the_way_to_have_it_deleted_is_named(filled: EdgeHome) -> None:
    open_id, red_id = item_of(filled, "open"), item_of(filled, "red")
    ok(filled, "outbox", "approve", open_id)
    server = Acknowledging()
    with open_pool(filled, writer=False) as pool:
        outbox = Outbox(pool)
        outbox.mark_sent([open_id, red_id])
        server.acknowledge(outbox, [open_id])
    listed = ok(filled, "outbox", "list")
    assert "1 item sent, not yet acknowledged" in listed
    assert "wait" not in listed
    found = facts(filled, "privacy", "show")
    assert (found["outbox_waiting"], found["outbox_unacknowledged"]) == (0, 1)
    assert "has left: the server has it" in told(filled, "outbox", "drop", open_id, "--yes")
    said = told(filled, "outbox", "drop", red_id, "--yes")
    assert "it was sent, at least in part" in said
    assert "sessions forget red" in said
    said = ok(filled, "privacy", "set", "off", "--session", "red")
    assert "3 names of it had left for" in said
    assert "sessions forget red" in said
    assert run(filled, "sessions", "forget", "red", "--yes").exit_code == 0
    assert "its session was forgotten here" in told(filled, "outbox", "drop", red_id, "--yes")


def test_a_title_that_does_not_leave_is_said_to_be_only_here(filled: EdgeHome) -> None:
    assert "only here" in ok(filled, "outbox", "show", item_of(filled, "red"))
    assert "only here" not in ok(filled, "outbox", "show", item_of(filled, "open"))


def test_all_that_is_held_can_be_approved_at_once(filled: EdgeHome) -> None:
    asked = CliRunner().invoke(app, ["--home", str(filled.folder), "outbox", "approve", "--all"], input="n\n")
    assert (asked.exit_code, "Let 2 items leave" in asked.output) == (1, True)
    ok(filled, "outbox", "approve", "--all", "--yes")
    assert {item["state"] for item in facts(filled, "outbox", "list")} == {"approved"}


def test_a_dry_run_tells_what_would_be_put_there_and_puts_nothing(home: EdgeHome, keep: Keep) -> None:
    with open_pool(home, writer=False) as pool:
        keep(pool, "hello", session="one", app="mail")
        keep(pool, "hello", session="two", app="code")
    assert "no trainable step" in ok(home, "outbox", "fill", "--dry-run")
    assert "2 trainable steps of 2 sessions" in ok(home, "outbox", "fill", "--dry-run", "--level", "full")
    found = facts(home, "outbox", "fill", "--dry-run", "--level", "redacted")
    assert [(each["app"], each["steps"]) for each in found["apps"]] == [("code", 1), ("mail", 1)]
    assert facts(home, "outbox", "list") == []
    assert run(home, "outbox", "fill", "--level", "full").exit_code == 2


def test_filling_by_command_leaves_to_the_edge_what_must_be_redacted(home: EdgeHome, keep: Keep) -> None:
    ok(home, "privacy", "set", "redacted", "--yes")
    with open_pool(home, writer=False) as pool:
        keep(pool, "hello")
    assert "the running edge does" in told(home, "outbox", "fill")


def test_the_audit_log_is_shown_filtered_verified_and_exported(filled: EdgeHome, tmp_path: Path) -> None:
    item_id, server = item_of(filled, "red"), Acknowledging()
    with open_pool(filled, writer=False) as pool:
        outbox = Outbox(pool)
        outbox.approve(item_of(filled, "open"))
        outbox.mark_sent([item_id, item_of(filled, "open")])
        server.acknowledge(outbox, [item_id])
    shown = ok(filled, "audit", "show", "--item", item_id[:24])
    assert "received, signed" in shown
    assert len(facts(filled, "audit", "show")) == 3
    assert facts(filled, "audit", "show", "--since", "2100-01-01") == []
    assert len(facts(filled, "audit", "show", "--limit", "1")) == 1
    report = facts(filled, "audit", "verify")
    assert report == {"entries": 3, "signed_by_server": 1, "restored": 0, "rolled_back": 0, "receipts": 1}
    assert "the server signed for 1 of the entries" in ok(filled, "audit", "verify")
    lines = ok(filled, "audit", "export").splitlines()
    ok(filled, "audit", "export", str(tmp_path / "log.jsonl"))
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines
    assert [json.loads(line)["kind"] for line in lines] == ["sent", "sent", "received"]
    assert SECRET not in "".join(lines)


def test_doctor_says_why_less_leaves_than_was_chosen(home: EdgeHome, keep: Keep) -> None:
    def finding() -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(run(home, "doctor", "--json").stdout)["findings"]
        return next(each for each in found if each["check"] == "privacy")

    assert finding()["reason"] == "level off"
    ok(home, "privacy", "set", "redacted", "--yes")
    with open_pool(home, writer=False) as pool:
        keep(pool, "hello")
        search = TurnSearch(TokenTable.of(Path(home.load_config().model.path)), detector(home))
        Outbox(pool, redactor=LineRedactor("another line", Redactor(search))).fill()  # type: ignore[arg-type]
    assert "stayed at home: 1 steps of another model" in finding()["reason"]
    ok(home, "privacy", "pause", "--for", "1h")
    assert "everything is paused until" in finding()["reason"]
    ok(home, "privacy", "resume")
    with open_pool(home, writer=False) as pool:
        ConsentLog(pool).set_recipient(Recipient("https://other", b"o"))
    assert (finding()["state"], "given for another server" in finding()["reason"]) == ("warn", True)


def test_the_audit_log_fits_eighty_columns_and_tells_of_a_restore(
    filled: EdgeHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_pool(filled, writer=False) as pool:
        Outbox(pool).mark_sent([item_of(filled, "red")])
    ok(filled, "pool", "backup", str(tmp_path / "b"))
    ok(filled, "pool", "restore", str(tmp_path / "b"), "--replace", "--yes")
    monkeypatch.setattr(console, "width", 80)
    shown = ok(filled, "audit", "show").splitlines()
    assert max(len(line) for line in shown) <= 80
    assert len([line for line in shown if "│" in line and ("sent" in line or "restored" in line)]) == 2, "a line each"
    assert "went on" in " ".join(shown)
    assert "1 backup restored" in ok(filled, "audit", "verify")


def test_a_level_that_lets_nothing_out_has_no_end(home: EdgeHome) -> None:
    ok(home, "privacy", "set", "metrics", "--yes")
    ok(home, "privacy", "set", "off")
    rows = [line for line in ok(home, "privacy", "receipts").splitlines() if "off" in line or "metrics" in line]
    assert [line.split("│")[4].strip() != "" for line in rows] == [True, False]


def test_a_doubt_is_told_as_the_reason_of_the_receipt_that_it_made(home: EdgeHome) -> None:
    ok(home, "privacy", "set", "full", "--yes")
    with open_pool(home, writer=False) as pool:
        ConsentLog(pool).set_recipient(Recipient("https://other", b"o"))
        ConsentLog(pool).set_recipient(Recipient())
    assert "the consent was given for another server" in ok(home, "privacy", "receipts")
    shown = ok(home, "privacy", "show")
    assert "full was chosen, but the consent was given for another server; to allow it again" in shown


def test_requests_to_delete_that_wait_are_told_of(home: EdgeHome) -> None:
    server = Server(url="https://box", root_key=b"k", ca_pem="c")
    with open_pool(home, writer=False) as pool:
        deletions = Deletions(pool)
        (one,) = pool.submit(lambda database: deletions.add_in(database, server, names=["a"])).result()
        deletions.failed(one, "https://box refused (410): gone")
    said = " ".join(ok(home, "privacy", "show").split())
    assert (
        "1 request to delete waits for the server's signed word (asked 1 time: https://box refused (410): gone)" in said
    )
    assert facts(home, "privacy", "show")["deletions_waiting"] == 1


def test_setup_run_again_says_the_level_that_holds(home: EdgeHome) -> None:
    ok(home, "privacy", "set", "metrics", "--yes")
    assert "privacy level metrics" in ok(home, "setup", "--model", home.load_config().model.path, "--yes")


def test_doctor_says_what_encrypts_the_pool(home: EdgeHome) -> None:
    found = json.loads(run(home, "doctor", "--json").stdout)["findings"]
    assert next(each for each in found if each["check"] == "encryption")["reason"]


@pytest.mark.parametrize("words", [("sessions", "forget"), ("outbox", "fill"), ("redact", "test"), ("pool", "backup")])
def test_help_breaks_where_the_terminal_ends(words: tuple[str, ...]) -> None:
    said = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "1000", "TERMINAL_WIDTH": "1000"}).output
    text = said.split("╭─", 1)[0].strip().splitlines()
    paragraphs = [line for line in text if line.strip()]
    assert len(paragraphs) == 3, "usage, summary, and the rest as one paragraph"

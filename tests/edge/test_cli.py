"""The command line: what others wrote breaks no table, facts are one JSON value, and known failures are one line."""

import json
import os
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge import state
from clawloop_edge.cli import service
from clawloop_edge.cli.root import app
from clawloop_edge.cli.service import ask
from clawloop_edge.config import EdgeConfig
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.records import KeptStep
from clawloop_shared import config
from clawloop_shared.errors import ConfigError
from clawloop_shared.ids import new_step_id
from clawloop_shared.records import Policy, Sampling, Step

NASTY = "[/INST] \x1b]0;owned\x07 say [bold]hi[/bold]"


def kept(words: str, *, session: str = "s", untrainable: str = "") -> KeptStep:
    step = Step(
        step_id=new_step_id(),
        session_id=session,
        run_id="r",
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.5],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
        untrainable=untrainable,
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": words}]}]
    reply = {"role": "assistant", "content": words}
    return KeptStep(step=step, messages=messages, reply=reply, text=words, started_ms=1, finished_ms=2)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    """A home as `setup` makes it."""
    found = EdgeHome(tmp_path / "home")
    made = run(found, "setup", "--model", str(tiny_model), "--key-file", "--port", "8123", "--yes")
    assert made.exit_code == 0, made.output
    return found


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


def test_what_a_model_or_a_person_wrote_is_shown_as_it_is(home: EdgeHome) -> None:
    with open_pool(home, writer=True) as pool:
        pool.keep_step(kept(NASTY)).result()
    for command in (("sessions", "list"), ("sessions", "show", "s")):
        shown = run(home, *command)
        assert shown.exit_code == 0, shown.output
        assert "[/INST]" in shown.output
        assert "\x1b]0" not in shown.output
    assert "[bold]" in shown.output.replace("\n", "")


def test_a_session_is_two_lines_with_its_whole_id(home: EdgeHome) -> None:
    session = "agent-main-0123456789abcdef01234567"
    with open_pool(home, writer=True) as pool:
        pool.keep_step(kept("many words\n" * 20, session=session)).result()
    listed = run(home, "sessions", "list").stdout
    assert session in listed
    assert sum("many" in line for line in listed.splitlines()) == 1
    assert "1970-01-01" in listed
    assert max(map(len, listed.splitlines())) <= 80


def test_explain_says_yes_or_why_not_and_what_a_step_waits_for(home: EdgeHome) -> None:
    good, never = kept("x"), kept("y", untrainable="temperature 0")
    with open_pool(home, writer=True) as pool:
        for step in (good, never):
            pool.keep_step(step).result()
    waiting = run(home, "explain", good.step.step_id).stdout
    assert "no signal yet: not trainable yet" in waiting
    refused = run(home, "explain", never.step.step_id).stdout
    assert "no (temperature 0)" in refused
    assert "not trainable yet" not in refused
    assert "trainable: no (temperature 0)" in run(home, "sessions", "show", "s").stdout


@pytest.mark.parametrize("words", [("status",), ("sessions", "list")])
def test_the_home_may_be_named_behind_the_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    for arguments in (
        ["--home", "{}", *words],
        [*words, "--home", "{}"],
        ["--home", "/elsewhere", *words, "--home={}"],
    ):
        refused = CliRunner().invoke(app, [argument.format(tmp_path) for argument in arguments])
        assert str(refused.exception).startswith(f"no edge at {tmp_path};")


def test_a_hint_names_the_home_only_where_it_is_needed(home: EdgeHome, monkeypatch: pytest.MonkeyPatch) -> None:
    named = f"start it with: clawloop-edge --home {shlex.quote(str(home.folder))} serve\n"
    assert named in run(home, "status").stdout
    monkeypatch.setenv("CLAWLOOP_EDGE_HOME", str(home.folder))
    assert "start it with: clawloop-edge serve\n" in run(home, "status").stdout


def test_an_edge_that_holds_the_pool_and_does_not_answer_is_starting_or_stopping(home: EdgeHome) -> None:
    with open_pool(home, writer=True):
        asked = run(home, "status")
        assert (asked.exit_code, ask(home)) == (1, {"running": False, "process": os.getpid()})
        assert f"starting or stopping (process {os.getpid()})" in asked.stdout
    assert ask(home) == {"running": False}


def test_setup_without_a_keychain_sets_up_nothing(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keyring.core
    from keyring.backends import fail

    monkeypatch.setattr(keyring.core, "_keyring_backend", fail.Keyring())  # type: ignore[no-untyped-call]
    home = EdgeHome(tmp_path / "home")
    failed = run(home, "setup", "--model", str(tiny_model))
    assert "--key-file" in str(failed.exception)
    assert not home.exists
    assert not home.token_file.exists()
    assert run(home, "setup", "--model", str(tiny_model), "--key-file").exit_code == 0, "nothing is asked"


def test_a_question_that_nobody_can_answer_names_the_option(home: EdgeHome, tiny_model: Path) -> None:
    failed = run(home, "setup", "--model", str(tiny_model))
    assert isinstance(failed.exception, ConfigError)
    assert "give --yes" in str(failed.exception)


def test_a_level_can_be_set_by_a_program(home: EdgeHome) -> None:
    done = run(home, "privacy", "set", "full", "--yes", "--json")
    assert json.loads(done.stdout)["level"] == "full"
    shown = json.loads(run(home, "privacy", "show", "--json").stdout)
    assert (shown["level"], shown["chosen"], shown["reason"]) == ("full", "full", "")
    assert "1 receipt, unbroken" in run(home, "audit", "verify").output


def test_setup_run_again_keeps_what_was_set(home: EdgeHome, tiny_model: Path) -> None:
    before = home.load_config()
    config.save(home.config_file, EdgeConfig(before.model, before.gateway, before.engine, before.pool))
    assert run(home, "setup", "--model", str(tiny_model), "--yes").exit_code == 0
    after = home.load_config()
    assert (after.pool.key, after.gateway.port) == ("file", 8123)


def test_an_adapter_can_be_chosen_only_where_a_server_was_joined(home: EdgeHome) -> None:
    failed = run(home, "adapters", "rollback")
    assert isinstance(failed.exception, ConfigError)
    assert "joined no server" in str(failed.exception)
    with open_pool(home, writer=False) as pool:
        assert state.wanted_adapter(pool) is None


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a program that is not an edge."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: object) -> None:
            """Not to the test's output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_status_tells_an_edge_from_another_program_and_asks_no_proxy(
    home: EdgeHome, tiny_model: Path, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{stranger}")
    monkeypatch.delenv("no_proxy", raising=False)
    down = run(home, "status", "--json")
    assert (down.exit_code, json.loads(down.stdout)) == (1, {"running": False})
    run(home, "setup", "--model", str(tiny_model), "--port", str(stranger), "--yes")
    failed = run(home, "status")
    assert isinstance(failed.exception, ConfigError)
    assert "not as this edge does" in str(failed.exception)


def test_status_is_told_in_words_and_not_as_python_has_it() -> None:
    counts = {"judged": 2, "made": 1, "failed": {"not scorable": 1}, "given_up": 0, "problem": ""}
    facts = {
        "running": True,
        "versions_loaded": [0, 1],
        "left_out": {},
        "scorers": {"rule": counts, "exact": {"judged": 0}},
        "rewards": {"sources": {}, "warnings": []},
    }
    assert list(service._told(facts)) == [
        ("running", "yes"),
        ("versions loaded", "0, 1"),
        ("left out", ""),
        ("scorer rule", "judged 2, made 1, failed not scorable 1"),
        ("scorer exact", "nothing yet"),
        ("rewards", "nothing odd; see clawloop-edge rewards"),
    ]


def test_a_table_that_stands_twice_is_named_with_its_line(home: EdgeHome) -> None:
    home.config_file.write_text("[signals.rule]\ncall_s = 1.0\n[signals.rule]\n")
    with pytest.raises(
        ConfigError, match=r"the table \[signals.rule\] is there already \(at line 3\); change that one"
    ):
        home.load_config()


@pytest.mark.parametrize("line", ["[privacy]\nhold_s = inf", "[node]\npoll_s = 0", "[gateway]\nport = 99999"])
def test_a_setting_out_of_bounds_is_refused_by_name(home: EdgeHome, line: str) -> None:
    home.config_file.write_text(line)
    with pytest.raises(ConfigError, match=line.split()[1]):
        home.load_config()

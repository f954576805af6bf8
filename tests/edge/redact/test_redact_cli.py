"""`clawloop-edge redact`: what a person and a program read of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clawloop_edge.cli.root import app

TEXT = "password: hunter2secret\nmail jana@corp.io [bold]not ours[/bold] \x1b[31m\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(tmp_path: Path, *words: str, given: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["--home", str(tmp_path / "home"), "redact", *words], input=given)
    return result.exit_code, result.output


def test_the_text_is_printed_without_what_would_be_taken_out(tmp_path: Path, file: Path) -> None:
    code, out = run(tmp_path, "test", str(file))
    assert code == 0
    assert "password: ▇password▇" in out
    assert "mail ▇email▇ [bold]not ours[/bold]" in out
    assert "hunter2secret" not in out
    assert "jana" not in out
    assert "\x1b[31m" not in out


def test_show_prints_it_behind_its_mark(tmp_path: Path) -> None:
    code, out = run(tmp_path, "test", "-", "--show", given=TEXT)
    assert code == 0
    assert "▇password▇hunter2secret" in out


def test_json_has_places_and_counts_and_the_text_only_when_asked(tmp_path: Path, file: Path) -> None:
    facts = json.loads(run(tmp_path, "test", str(file), "--json")[1])
    assert facts["counts"] == {"password": 1, "email": 1}
    assert [TEXT[span["start"] : span["end"]] for span in facts["spans"]] == ["hunter2secret", "jana@corp.io"]
    assert "text" not in facts["spans"][0]
    shown = json.loads(run(tmp_path, "test", str(file), "--json", "--show")[1])
    assert shown["spans"][0]["text"] == "hunter2secret"


def test_a_text_that_holds_nothing_is_said_to(tmp_path: Path) -> None:
    assert "nothing would be taken out" in run(tmp_path, "test", "-", given="a quiet day\n")[1]


@pytest.mark.parametrize("word", ["none", "my password is hunter2", "long" * 2000])
def test_where_there_is_no_such_file_a_pipe_is_offered_and_what_may_be_a_text_not_repeated(word: str) -> None:
    said = str(CliRunner().invoke(app, ["redact", "test", word]).exception)
    assert "there is no such file" in said
    assert "redact test -" in said
    assert word not in said


def test_the_kinds_are_listed_for_a_person_and_for_a_program(tmp_path: Path) -> None:
    code, out = run(tmp_path, "kinds")
    assert code == 0
    assert "keys of" in out
    facts = json.loads(run(tmp_path, "kinds", "--json")[1])
    assert {"password", "github-key", "email", "own-word"} <= facts.keys()

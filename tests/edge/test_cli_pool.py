"""`pool` on the command line, and the key's places: what is asked, what is told, and one line for each refusal."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge.cli.root import app
from clawloop_edge.errors import AnchorError, PoolError
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import PASSPHRASE, open_pool
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.ledger import Ledger
from clawloop_shared.errors import ConfigError, KeyMissing
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Sampling, Step

WORDS = "correct horse battery staple"


def kept(session: str) -> KeptStep:
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
    )
    reply = {"role": "assistant", "content": "hello"}
    said = [{"role": "user", "content": "hi"}]
    return KeptStep(step=step, messages=said, reply=reply, started_ms=1, finished_ms=2)


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


def done(home: EdgeHome, *arguments: str) -> str:
    """What a command prints that is to succeed."""
    found = run(home, *arguments)
    assert found.exit_code == 0, (found.output, found.exception)
    return found.stdout


def fails(home: EdgeHome, *arguments: str) -> str:
    """What a known failure says; one line."""
    found = run(home, *arguments)
    assert found.exit_code == 1
    said = str(found.exception)
    assert said != ""
    assert "\n" not in said
    return said


def serve(home: EdgeHome, *sessions: str) -> None:
    """What an edge does that serves for one step a session."""
    with open_pool(home, writer=True) as pool:
        for session in sessions:
            pool.keep_step(kept(session)).result()


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    """A home with a key file and two steps."""
    found = EdgeHome(tmp_path / "home")
    done(found, "setup", "--model", str(tiny_model), "--key-file", "--yes")
    serve(found, "one", "two")
    return found


def test_stats_tell_what_encrypts_it_where_the_key_is_and_how_far_the_anchor_is(home: EdgeHome) -> None:
    found = json.loads(done(home, "pool", "stats", "--json"))
    assert (found["steps"], found["sessions"], found["last_seq"]) == (2, 2, 2)
    assert found["encryption"] == "file (SQLCipher) and rows"
    assert found["key"] == {"place": f"key file {home.key_file}", "version": 1}
    assert found["anchor"]["seq"] == 2
    shown = done(home, "pool", "stats")
    for words in ("2 in 2 sessions", "kB", "SQLCipher", "version 1", "2 changes", "change 2, 20"):
        assert words in shown


def test_a_key_is_rotated_and_everything_verifies(home: EdgeHome) -> None:
    assert json.loads(done(home, "pool", "rotate-key", "--json"))["version"] == 2
    rotated = done(home, "pool", "rotate-key")
    assert "version 3 of the key is in force" in rotated
    assert "pool backup FILE" in rotated
    assert "2 steps in 2 sessions, 0 signals; all is as it was kept" in done(home, "pool", "verify")
    assert json.loads(done(home, "pool", "verify", "--json"))["problems"] == []


def test_a_backup_comes_back_at_level_off_and_what_was_spent_stays_spent(home: EdgeHome, tmp_path: Path) -> None:
    done(home, "privacy", "set", "full", "--yes")
    (tmp_path / "words").write_text(f"{WORDS}\n")
    words = ("--passphrase-file", str(tmp_path / "words"))
    made = json.loads(done(home, "pool", "backup", str(tmp_path / "b"), *words, "--json"))
    assert (made["steps"], made["with_keys"]) == (2, True)
    serve(home, "three")
    with open_pool(home, writer=False) as pool:
        reserve = partial(Ledger(pool).reserve_in, line="line", sigma=5.0, clip=1.0, round_id="r")
        pool.submit(reserve).result()
    assert "give --replace" in fails(home, "pool", "restore", str(tmp_path / "b"), *words)
    shown = done(home, "pool", "restore", str(tmp_path / "b"), "--replace", "--yes", *words)
    assert "restored: 2 steps of 2 sessions" in shown
    assert "privacy set LEVEL" in shown
    with open_pool(home, writer=True) as pool:
        assert len(pool.step_ids()) == 2
        assert ConsentLog(pool).state().level is Level.OFF
        assert len(Ledger(pool).entries()) == 1
    assert json.loads(done(home, "pool", "verify", "--json"))["problems"] == []


def test_a_backup_without_keys_says_which_key_opens_it(home: EdgeHome, tmp_path: Path) -> None:
    shown = " ".join(done(home, "pool", "backup", str(tmp_path / "b")).split())
    assert "version 1, alone" in shown
    assert "once that key is rotated" in shown
    done(home, "pool", "rotate-key")
    assert "opens with key" in fails(home, "pool", "restore", str(tmp_path / "b"), "--replace", "--yes")
    assert "2 steps" in done(home, "pool", "verify")


def test_an_older_pool_is_taken_only_at_its_owners_word(home: EdgeHome) -> None:
    early = (home.folder / "pool.db").read_bytes()
    assert "nothing to accept" in done(home, "pool", "accept")
    serve(home, "three")
    (home.folder / "pool.db").write_bytes(early)
    assert "older than it was: it ends with change 2, and had change 3" in fails(home, "pool", "stats")
    assert isinstance(run(home, "pool", "verify").exception, AnchorError)
    asked = run(home, "pool", "accept")
    assert "give --yes" in str(asked.exception), "there is nobody to ask"
    assert (home.folder / "pool.db").read_bytes() == early
    assert "accepted: 2 steps, 2 changes" in done(home, "pool", "accept", "--yes")
    serve(home, "other")
    assert "3 steps" in done(home, "pool", "verify")


def test_each_thing_wrong_with_the_key_is_one_line_and_makes_nothing(home: EdgeHome, tmp_path: Path) -> None:
    key, aside = home.key_file, tmp_path / "aside"
    before = (home.folder / "pool.db").read_bytes()
    key.chmod(0o644)
    assert "mode 0644" in fails(home, "pool", "stats")
    key.rename(aside)
    assert "is there, but its key is not" in fails(home, "pool", "stats")
    assert not key.exists()
    shutil.copy(aside, key)
    key.chmod(0o600)
    key.write_text(os.urandom(32).hex() + "\n")
    assert "does not open with this key" in fails(home, "pool", "stats")
    key.unlink()
    key.symlink_to(aside)
    assert "must be a plain file of yours" in fails(home, "pool", "stats")
    assert (home.folder / "pool.db").read_bytes() == before


def test_a_passphrase_comes_from_the_environment_where_nobody_sits_at_a_terminal(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = EdgeHome(tmp_path / "home")
    setup = ("setup", "--model", str(tiny_model), "--passphrase", "--yes")
    assert f"set {PASSPHRASE}" in fails(home, *setup)
    assert not home.exists
    monkeypatch.setenv(PASSPHRASE, "short")
    assert "choose one of at least 8" in fails(home, *setup)
    assert not home.key_file.exists()
    monkeypatch.setenv(PASSPHRASE, WORDS)
    done(home, *setup)
    assert home.load_config().pool.key == "passphrase"
    assert "sealed key file" in json.loads(done(home, "pool", "stats", "--json"))["key"]["place"]
    assert "version 2" in done(home, "pool", "rotate-key")
    monkeypatch.setenv(PASSPHRASE, "something else")
    assert "the passphrase does not open" in fails(home, "pool", "stats")
    monkeypatch.delenv(PASSPHRASE)
    assert "no terminal to ask at" in fails(home, "pool", "stats")
    with pytest.raises(ConfigError):
        open_pool(home, writer=False)


def test_two_places_for_one_key_are_wrong_usage(tmp_path: Path, tiny_model: Path) -> None:
    home = EdgeHome(tmp_path / "home")
    found = run(home, "setup", "--model", str(tiny_model), "--key-file", "--passphrase", "--yes")
    assert found.exit_code == 2
    assert not home.folder.exists()


def test_another_place_for_the_key_of_a_pool_is_refused(home: EdgeHome, tiny_model: Path) -> None:
    before = home.config_file.read_bytes()
    found = run(home, "setup", "--model", str(tiny_model), "--passphrase", "--yes")
    assert isinstance(found.exception, PoolError | KeyMissing | ConfigError)
    assert home.config_file.read_bytes() == before
    assert "2 steps" in done(home, "pool", "verify")


def at_a_terminal(command: list[str], *, types: list[str]) -> tuple[int, str]:
    """Run a command at a terminal, typing a line at each question; its exit code, and all that the screen shows."""
    control, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=take_terminal, close_fds=True
    )
    os.close(terminal)
    shown, answers = b"", list(types)
    while True:
        try:
            data = os.read(control, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not data:
            break
        shown += data
        if answers and shown.rstrip(b" ").endswith(b":"):
            os.write(control, answers.pop(0).encode() + b"\n")
    os.close(control)
    return process.wait(), shown.decode(errors="replace")


def test_a_person_is_asked_for_the_passphrase_once_and_it_is_not_shown(tmp_path: Path, tiny_model: Path) -> None:
    edge = [str(Path(sys.executable).parent / "clawloop-edge"), "--home", str(tmp_path / "home")]
    code, shown = at_a_terminal(
        [*edge, "setup", "--model", str(tiny_model), "--passphrase", "--yes"], types=[WORDS, WORDS]
    )
    assert code == 0, shown
    assert (shown.count("assphrase for"), shown.count("Again")) == (1, 1)
    code, stats = at_a_terminal([*edge, "pool", "stats"], types=[WORDS])
    assert (code, stats.count("Passphrase for")) == (0, 1)
    code, wrong = at_a_terminal([*edge, "pool", "stats"], types=["wrong horse"])
    assert code == 1
    assert wrong.count("\n") == 2, "the question, and one line"
    assert "horse" not in shown + stats + wrong


def test_keys_are_moved_under_a_passphrase_which_is_changed_and_the_configuration_keeps_its_comments(
    home: EdgeHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, others = tmp_path / "new", "another battery, another staple"
    words.write_text(f"{others}\n")
    config = home.config_file.read_text().replace("[pool]\n", "[pool]  # where the key is\n# mine\n")
    home.config_file.write_text(config)
    assert "no passphrase opens key file" in fails(home, "pool", "passphrase")
    monkeypatch.setenv(PASSPHRASE, WORDS)
    assert json.loads(done(home, "pool", "move-keys", "--to", "passphrase", "--json"))["key"] == "passphrase"
    assert not home.key_file.exists()
    changed = home.config_file.read_text()
    assert "[pool]  # where the key is" in changed
    assert "# mine" in changed
    assert len(changed.splitlines()) == len(config.splitlines())
    done(home, "pool", "passphrase", "--passphrase-file", str(words))
    assert "the passphrase does not open" in fails(home, "pool", "stats")
    monkeypatch.setenv(PASSPHRASE, others)
    assert "2 steps" in done(home, "pool", "verify")
    assert "give --passphrase-file" in fails(home, "pool", "passphrase")
    done(home, "pool", "move-keys", "--to", "file")
    monkeypatch.delenv(PASSPHRASE)
    assert "2 steps" in done(home, "pool", "verify")
    assert [path.name for path in home.folder.glob("*.key")] == ["pool.key"]
    assert "is there already" in done(home, "pool", "move-keys", "--to", "file")

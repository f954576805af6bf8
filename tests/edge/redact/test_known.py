"""What a machine is known to hold: which values are taken, which say too little, and that none of them is ever told."""

import logging
import os
from pathlib import Path

import pytest

from clawloop_edge.home import EdgeHome
from clawloop_edge.privacy.redact import known, words
from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.known import Machine, known_values
from clawloop_edge.privacy.redact.machine import detector
from clawloop_edge.privacy.redact.patterns import patterns
from clawloop_shared.errors import ConfigError


def machine(
    home: Path,
    environment: dict[str, str] | None = None,
    *,
    user: str = "root",
    full_name: str = "",
    host: str = "localhost",
) -> Machine:
    return Machine(home, environment or {}, user=user, full_name=full_name, host=host)


def texts(machine: Machine) -> set[str]:
    return {value.text for value in known_values(machine, patterns())}


def taken_out(text: str, machine: Machine) -> list[str]:
    found = Detector(patterns(), known_values(machine, patterns())).find(text)
    return [text[start:end] for start, end, _ in found]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_secrets_of_the_environment_are_known_and_ordinary_values_are_not(tmp_path: Path) -> None:
    environment = {
        "ACME_API_KEY": "zebra-93-lantern",
        "DB_PASSWORD": "postgres",
        "TOKEN_FILE": "/run/secrets/token",
        "SSH_AUTH_SOCK": "/tmp/ssh-1/agent.7",
        "MAX_TOKENS": "4096",
        "LANG": "en_GB.UTF-8",
        "MY_SECRET": "short",
        "DATABASE_URL": "postgres://app:Lavender_77@db/x",
    }
    assert texts(machine(tmp_path, environment)) == {"zebra-93-lantern", "Lavender_77"}


@pytest.mark.parametrize(
    ("file", "content", "secret"),
    [
        (".aws/credentials", "[default]\naws_secret_access_key = {}\n", "wJalrXUtnFEMIK7MDENGbPxRfiCYzzzz1234567A"),
        (".netrc", "machine api.x.io login jana password {}\n", "tulip-harbor-19"),
        (".config/gh/hosts.yml", "github.com:\n    oauth_token: {}\n", "gho_16C7e42F292c6912E7710c838347Ae178B4a"),
        (".env", "export STRIPE_KEY='{}'\n", "sk_live_4eC39HqLyjWDarjtT1zdp7dc"),
        (".env.local", "SESSION_SECRET={}\n", "mango+cedar+88"),
        (".npmrc", "//registry.npmjs.org/:_authToken={}\n", "8f14e45f-ceea-467f-a7f1-0d1b2c3d4e5f"),
        (".git-credentials", "https://jana:{}@git.x.io\n", "Cobalt-Sails-3"),
        (".docker/config.json", '{"auths": {"x.io": {"auth": "{}"}}}', "amFuYTpDb2JhbHQtU2FpbHMtMw=="),
        (".openclaw/openclaw.json", '{"gateway": {"auth": {"mode": "token", "token": "{}"}}}', "gw-93kd-mallow"),
        (".openclaw/.env", "TELEGRAM_BOT_TOKEN={}\n", "8123456789:AAHq3kd9f0sl2mZxYtW7vU5rT1pQnMkLjHg"),
        (".cache/huggingface/token", "{}\n", "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"),
    ],
)
def test_values_of_credential_files_are_known(tmp_path: Path, file: str, content: str, secret: str) -> None:
    write(tmp_path / file, content.replace("{}", secret))
    assert secret in texts(machine(tmp_path))
    assert taken_out(f"<<{secret}>>", machine(tmp_path)) == [secret]


def test_the_edges_own_token_is_known(tmp_path: Path) -> None:
    home = EdgeHome.at(tmp_path / "edge")
    home.make()
    token = home.token()
    text = f"curl -H 'x: {token}' localhost"
    assert [text[s.start : s.end] for s in detector(home).find(text)] == [token]


def test_names_of_owner_and_machine_are_taken_out_and_generic_ones_are_not(tmp_path: Path) -> None:
    write(
        tmp_path / ".gitconfig",
        '[user]\n\tname = "Jana Marková"\n\temail = jana@markova.example\n[alias]\n\tname = x\n',
    )
    write(tmp_path / ".ssh/id_ed25519.pub", "ssh-ed25519 AAAAC3Nza jmarkova@Janas-MacBook.local\n")
    own = machine(tmp_path, user="jmarkova", host="Janas-MacBook.local")
    text = "Jana wrote as JMARKOVA on janas-macbook: Marková, jana marková, banjana, localhost, root"
    assert taken_out(text, own) == ["Jana", "JMARKOVA", "janas-macbook", "Marková", "jana marková"]
    assert texts(machine(tmp_path / "none", user="admin", host="macbook-pro", full_name="Root")) == set()


def test_a_name_that_is_a_word_is_only_taken_out_whole(tmp_path: Path) -> None:
    own = machine(tmp_path, full_name="Will Young", user="will")
    assert taken_out("Will you mark it? Young people will. Ask Will Young.", own) == ["Will Young"]


def test_what_is_too_large_or_unreadable_or_no_file_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / ".env", "API_KEY=zebra-93-lantern\n" + "#" * known.MAX_FILE_BYTES)
    (tmp_path / ".netrc").mkdir()
    os.mkfifo(tmp_path / ".npmrc")
    (tmp_path / ".pypirc").symlink_to(tmp_path / "nowhere")
    assert texts(machine(tmp_path)) == set()


def test_no_more_values_are_taken_than_the_bound(tmp_path: Path) -> None:
    lines = "".join(f"KEY_{n}_SECRET=w{n * 7919:07}x-{n * 104729:09}\n" for n in range(known.MAX_VALUES + 50))
    write(tmp_path / ".env", lines)
    assert len(known_values(machine(tmp_path), patterns())) == known.MAX_VALUES


def test_values_are_neither_logged_nor_shown_by_the_detector(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    own = machine(tmp_path, {"ACME_API_KEY": "zebra-93-lantern"})
    made = Detector(patterns(), known_values(own, patterns()))
    made.find("zebra-93-lantern")
    assert "zebra-93" not in caplog.text + "".join(capsys.readouterr()) + repr(made) + str(made)
    assert not list(tmp_path.iterdir())


def test_words_come_from_the_configuration_and_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / words.FILE
    file.write_text("# projects\nBluebird\n\n  Žižkov 12  \n")
    assert words.own_words(["Kestrel"], file) == ["Kestrel", "Bluebird", "Žižkov 12"]
    assert words.own_words([], tmp_path / "none") == []


@pytest.mark.parametrize("bad", ["ab", "x" * 201])
def test_a_word_that_would_stand_everywhere_or_nowhere_is_refused_without_being_told(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="word 2 of redact_words") as caught:
        words.own_words(["Kestrel", bad], tmp_path / words.FILE)
    assert bad not in str(caught.value)


def test_a_file_of_words_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / words.FILE
    file.write_bytes(b"ok\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        words.own_words([], file)


def test_configured_words_reach_the_edges_detector(tmp_path: Path) -> None:
    home = EdgeHome.at(tmp_path)
    home.make()
    home.config_file.write_text('[privacy]\nredact_words = ["Bluebird"]\n')
    (home.folder / words.FILE).write_text("Kestrel\n")
    assert [span.kind for span in detector(home).find("the bluebird and the KESTREL")] == ["own-word", "own-word"]

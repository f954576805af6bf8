"""`openclaw connect` and `disconnect`: shown without secrets, asked OpenClaw, written whole, undone to the byte."""

import json
import os
import stat
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clawloop_edge.cli.root import app
from clawloop_edge.home import EdgeHome
from clawloop_edge.openclaw import connect, entries, json5, program
from clawloop_edge.openclaw.entries import MODEL, PLUGIN, Edge, Wish
from clawloop_edge.openclaw.served import edge_of, loopback
from clawloop_edge.openclaw.shown import diff, masked
from clawloop_shared.errors import ConfigError, UncheckedError

EDGE = Edge(url="http://127.0.0.1:8100", token_file="/home/a b/token", context_tokens=32768, max_tokens=4096)
NOW = datetime(2026, 11, 23, 1, 2, 3)
EMPTY = "{}"
COMMENTED = """// my agent
{
  models: { catalogRefresh: { enabled: false } }, // no catalog
  agents: {
    defaults: {
      model: { primary: 'anthropic/claude', fallbacks: ["openai/gpt"], }, /* the good one */
    },
  },
  gateway: { auth: { token: "gwtoken-4711" } } // last
}
"""
FULL = json.dumps(
    {
        "models": {
            "mode": "merge",
            "providers": {"other": {"baseUrl": "http://h/v1", "apiKey": "sk-4711", "models": []}},
        },
        "agents": {
            "defaults": {"model": "other/big", "modelPolicy": {"allow": ["other/*"]}},
            "entries": {"main": {}, "work": {"model": "other/small"}},
        },
        "plugins": {
            "allow": ["memory"],
            "load": {"paths": ["/somebody's/plugin"]},
            "entries": {"memory": {"enabled": True}},
        },
        "secrets": {"providers": {"default": {"source": "env"}}},
    },
    indent=4,
)
BY_HAND = """{
\t"models": {"providers": {"clawloop": {"baseUrl": "http://127.0.0.1:1/v1", "apiKey": "token-by-hand-4711"}}},
\t"agents": {"defaults": {"model": {"primary": "clawloop/clawloop"}}}
}"""
SAMPLES = {
    "empty": EMPTY,
    "nothing": "",
    "one line": '{"gateway":{"mode":"local"}}',
    "commented": COMMENTED,
    "full": FULL,
    "by hand": BY_HAND,
    "windows": COMMENTED.replace("\n", "\r\n"),
}


@pytest.fixture
def home(tmp_path: Path) -> EdgeHome:
    found = EdgeHome(tmp_path / "an edge")
    found.make()
    return found


def config_of(tmp_path: Path, text: str, *, mode: int = 0o600) -> Path:
    path = tmp_path / "open claw" / "openclaw.json"
    path.parent.mkdir()
    path.write_bytes(text.encode())
    path.chmod(mode)
    return path


def connected(home: EdgeHome, config: Path, wish: Wish = Wish(primary=True)) -> connect.Plan:  # noqa: B008
    plan = connect.plan_connect(home, config, EDGE, wish)
    if plan.changed:
        connect.carry_out(plan, home, now=NOW, check=None, environment={})
    return plan


def disconnected(home: EdgeHome, config: Path) -> None:
    plan = connect.plan_disconnect(home, config)
    connect.carry_out(plan, home, now=NOW, check=None, environment={})


def value_of(config: Path) -> Any:
    return json5.read(config.read_text()).value


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_connecting_twice_changes_nothing_more_and_disconnecting_gives_the_same_bytes_back(
    text: str, home: EdgeHome, tmp_path: Path
) -> None:
    config = config_of(tmp_path, text)
    connected(home, config)
    found = value_of(config)
    provider = found["models"]["providers"]["clawloop"]
    assert (provider["baseUrl"], provider["models"][0]["contextWindow"]) == ("http://127.0.0.1:8100/v1", 32768)
    assert provider["apiKey"] == {"source": "file", "provider": "clawloop", "id": "value"}
    assert found["secrets"]["providers"]["clawloop"]["path"] == "/home/a b/token"
    assert found["plugins"]["load"]["paths"][-1] == str(PLUGIN)
    assert found["plugins"]["entries"]["clawloop"]["hooks"]["allowPromptInjection"] is False
    model = found["agents"]["defaults"]["model"]
    assert MODEL in (model, model["primary"] if isinstance(model, dict) else "")
    written = config.read_bytes()
    assert not connected(home, config).changed
    assert config.read_bytes() == written
    disconnected(home, config)
    assert config.read_bytes() == text.encode()
    assert connect.read_record(home, config) is None


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_after_somebody_else_wrote_the_file_only_our_entries_go(text: str, home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, text)
    before = json5.read(text or "{}").value
    connected(home, config)
    rewritten = {**value_of(config), "meta": {"lastTouchedVersion": "2026.9.6"}}
    config.write_text(json.dumps(rewritten))
    disconnected(home, config)
    assert value_of(config) == {**before, "meta": {"lastTouchedVersion": "2026.9.6"}}


def test_without_a_record_what_bears_our_name_goes_and_nothing_else(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, FULL)
    connected(home, config, Wish(primary=False))
    connect.forget_record(home, config)
    assert not connected(home, config, Wish(primary=False)).changed
    disconnected(home, config)
    assert value_of(config) == json.loads(FULL)


def test_comments_and_all_other_bytes_stay(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, COMMENTED)
    connected(home, config)
    text = config.read_text()
    for kept in ("// my agent\n", "// no catalog", 'fallbacks: ["openai/gpt"], }, /* the good one */', "// last"):
        assert kept in text


def test_the_primary_model_and_lists_that_restrict_are_changed_only_as_wished(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, FULL)
    connected(home, config, Wish(primary=False, plugin=False, api=entries.Api.MESSAGES))
    found = value_of(config)
    assert found["agents"]["defaults"]["model"] == "other/big"
    assert found["plugins"] == json.loads(FULL)["plugins"]
    assert found["agents"]["defaults"]["modelPolicy"]["allow"] == ["other/*", MODEL]
    assert found["models"]["providers"]["clawloop"]["baseUrl"] == "http://127.0.0.1:8100"
    plan = connected(home, config, Wish(primary=True))
    found = value_of(config)
    assert (found["agents"]["defaults"]["model"], found["plugins"]["allow"]) == (MODEL, ["memory", "clawloop"])
    assert plan.remarks == ["agent work names a model of its own; --agent work gives it this one"]
    connected(home, config, Wish(agent="work"))
    found = value_of(config)
    assert (found["agents"]["defaults"]["model"], found["agents"]["entries"]["work"]) == ("other/big", {"model": MODEL})
    disconnected(home, config)
    assert config.read_text() == FULL
    with pytest.raises(ConfigError, match="no agent play"):
        connect.plan_connect(home, config, EDGE, Wish(agent="play"))


@pytest.mark.parametrize(
    ("api", "option", "base_url"),
    [
        (entries.Api.COMPLETIONS, "openai-completions", "http://127.0.0.1:8100/v1"),
        (entries.Api.RESPONSES, "openai-responses", "http://127.0.0.1:8100/v1"),
        (entries.Api.MESSAGES, "anthropic-messages", "http://127.0.0.1:8100"),
    ],
)
def test_each_api_has_its_name_and_its_base_url(api: entries.Api, option: str, base_url: str) -> None:
    found = entries.provider(EDGE, api)
    assert (found["api"], found["baseUrl"]) == (option, base_url)


def test_a_model_that_the_owner_chose_since_stays(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, COMMENTED)
    connected(home, config)
    config.write_text(config.read_text().replace(f'"{MODEL}"', '"openai/gpt"'))
    disconnected(home, config)
    assert config.read_text() == COMMENTED.replace("'anthropic/claude'", '"openai/gpt"')


def test_the_file_keeps_its_mode_and_its_backup_is_private(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, COMMENTED, mode=0o640)
    plan = connect.plan_connect(home, config, EDGE, Wish())
    backup = connect.carry_out(plan, home, now=NOW, check=None, environment={})
    assert [stat.S_IMODE(path.stat().st_mode) for path in (config, backup)] == [0o640, 0o600]
    assert backup.read_text() == COMMENTED
    assert backup.name == "openclaw.json.before-clawloop-20261123-010203"
    assert {path.name for path in config.parent.iterdir()} == {config.name, backup.name}


def test_a_link_is_followed_and_stays(tmp_path: Path, home: EdgeHome) -> None:
    config = config_of(tmp_path, COMMENTED)
    link = tmp_path / "link.json"
    link.symlink_to(config)
    found = connect.config_path(link, {})
    connected(home, found)
    assert (found, link.is_symlink()) == (config, True)
    assert MODEL in link.read_text()


def test_openclaws_own_ways_of_naming_its_file_are_known(tmp_path: Path) -> None:
    config = config_of(tmp_path, EMPTY)
    assert connect.config_path(None, {"OPENCLAW_CONFIG_PATH": str(config)}) == config
    assert connect.config_path(None, {"OPENCLAW_STATE_DIR": str(config.parent)}) == config
    with pytest.raises(ConfigError, match=r"no configuration at .*\.openclaw/openclaw\.json; run `openclaw setup`"):
        connect.config_path(None, {"OPENCLAW_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": }', "line 1, column 7: expected a value"),
        ('{"a": 1', "line 1, column 8: expected , or }"),
        ('{\n "a": nope\n}', "line 2, column 7: neither a value"),
        ('{"a": "x\n"}', "line 1, column 7: a text in quotes"),
        ('{"models": []}', "models is not an object"),
        ('{"plugins": {"load": {"paths": "x"}}}', "plugins.load.paths is not an array"),
        ("[" * 200, "nested deeper"),
        ("{} {}", "line 1, column 4: something after the end"),
    ],
)
def test_a_broken_file_is_named_by_line_and_left_alone(text: str, said: str, home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        connect.plan_connect(home, config, EDGE, Wish())
    assert said in str(error.value)
    assert str(config) in str(error.value)
    assert config.read_text() == text


def test_a_file_that_is_not_to_be_written_or_changed_meanwhile_is_left_alone(home: EdgeHome, tmp_path: Path) -> None:
    config = config_of(tmp_path, EMPTY, mode=0o400)
    plan = connect.plan_connect(home, config, EDGE, Wish())
    with pytest.raises(ConfigError, match=r"read-only \(its mode is 400\)"):
        connect.carry_out(plan, home, now=NOW, check=None, environment={})
    config.chmod(0o600)
    with pytest.raises(ConfigError, match="OPENCLAW_CONFIG_READONLY=1 is set"):
        connect.carry_out(plan, home, now=NOW, check=None, environment={"OPENCLAW_CONFIG_READONLY": "1"})
    config.write_text('{"new": 1}')
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        connect.carry_out(plan, home, now=NOW, check=None, environment={})
    assert [path.name for path in config.parent.iterdir()] == [config.name]
    assert config.read_text() == '{"new": 1}'


def test_what_openclaw_does_not_take_is_not_written(home: EdgeHome, tmp_path: Path, monkeypatch: Any) -> None:
    config = config_of(tmp_path, COMMENTED)
    plan = connect.plan_connect(home, config, EDGE, Wish())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = tmp_path / "openclaw"

    def answer(script: str) -> None:
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)

    seen = tmp_path / "seen"
    answer(
        f'cat "$OPENCLAW_CONFIG_PATH" > "{seen}"; '
        'echo \'{"valid": false, "issues": [{"path": "models", "message": "no"}]}\'; exit 1'
    )
    with pytest.raises(ConfigError, match="does not take the configuration: models: no"):
        connect.carry_out(plan, home, now=NOW, check=program.validate, environment={})
    assert seen.read_bytes() == plan.after
    answer("echo oops")
    with pytest.raises(UncheckedError, match="gave no answer"):
        connect.carry_out(plan, home, now=NOW, check=program.validate, environment={})
    assert ([path.name for path in config.parent.iterdir()], config.read_text()) == ([config.name], COMMENTED)
    answer("echo '{\"valid\": true}'")
    connect.carry_out(plan, home, now=NOW, check=program.validate, environment={})
    assert config.read_bytes() == plan.after


def test_a_diff_shows_no_secret() -> None:
    secret = [
        '{"apiKey": "s3cr3t"}',
        "{botToken: 's3cr3t', list: {password: 's3cr3t'}}",
        '{"env": {"vars": {"ANY": "s3cr3t"}}}',
        '{"x": {"headers": {"X-Tenant": "s3cr3t"}}}',
        '{"allow": ["sk-proj-s3cr3ts3cr3ts3cr3t"]}',
        '{"url": "http://me:s3cr3t@host/"}',
        "{} // old: s3cr3tabcdefghij1234",
        '{"signingSecret": ["s3cr3t"]}',
        "{token: 's3cr3t', broken",
    ]
    for text in secret[:-1]:
        assert "s3cr3t" not in masked(text), text
        assert "s3cr3t" not in diff(text, json5.put(text, ("a",), 1), name="x"), text
    shown = diff(BY_HAND, json5.put(BY_HAND, ("models", "providers", "clawloop"), {"a": 1}), name="openclaw.json")
    assert "4711" not in shown
    assert "clawloop/clawloop" in shown
    plain = '{"primary": "anthropic/claude-opus", "contextWindow": 32768, "maxTokens": 4096, "tokenFile": "/home/t"}'
    assert masked(plain) == plain


def run(home: EdgeHome, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), "openclaw", *arguments], input=answer)


def test_the_commands_show_ask_and_tell(home: EdgeHome, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    home.config_file.write_text("[gateway]\nport = 8177\n")
    config = config_of(tmp_path, COMMENTED)
    named = ("--config", str(config))
    refused = run(home, "connect", *named, "--context", "1000", answer="n\nn\n")
    assert (refused.exit_code, config.read_text()) == (1, COMMENTED)
    tried = json.loads(run(home, "connect", *named, "--context", "1000", "--dry-run", "--json").stdout)
    assert (tried["changed"], "http://127.0.0.1:8177/v1" in tried["diff"]) == (False, True)
    assert config.read_text() == COMMENTED
    done = run(home, "connect", *named, "--context", "1000", answer="y\ny\n")
    assert done.exit_code == 0, done.output
    assert "gwtoken-4711" not in done.output
    assert home.token() not in done.output + config.read_text()
    told = json.loads(run(home, "status", *named, "--json").stdout)
    assert told == {
        "config": str(config),
        "connected": True,
        "url": "http://127.0.0.1:8177/v1",
        "primary": True,
        "plugin": "not checked",
    }
    again = json.loads(run(home, "connect", *named, "--context", "1000", "--yes", "--json").stdout)
    assert (again["changed"], again["remarks"]) == (False, [])
    gone = run(home, "disconnect", *named, "--yes")
    assert (gone.exit_code, config.read_text()) == (0, COMMENTED)
    assert json.loads(run(home, "status", *named, "--json").stdout)["connected"] is False


def test_how_much_the_model_takes_is_read_from_its_folder(home: EdgeHome, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    home.config_file.write_text(f'[model]\npath = "{model}"\n[gateway]\nport = 1\nhost = "0.0.0.0"\n')
    with pytest.raises(ConfigError, match="give --context"):
        edge_of(home, context_tokens=None)
    (model / "config.json").write_text('{"text_config": {"max_position_embeddings": 2048}}')
    found = edge_of(home, context_tokens=None)
    assert (found.url, found.context_tokens, found.max_tokens) == ("http://127.0.0.1:1", 2048, 2048)
    assert [loopback(host) for host in ("localhost", "::", "127.0.0.2")] == ["localhost", "::1", "127.0.0.2"]
    with pytest.raises(ConfigError, match=r"listens on 192\.168\.1\.2 alone"):
        loopback("192.168.1.2")


_NAMES = st.text("ab$_é\"'\\/ \n", max_size=4)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | _NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(_NAMES, _VALUES, max_size=4), st.sampled_from([None, 1, 4, "\t"]), _VALUES)
def test_any_member_can_be_put_into_any_json_and_taken_out_again(config: Any, indent: Any, value: Any) -> None:
    text = json.dumps(config, indent=indent, ensure_ascii=False)
    more = json5.put(text, ("new", "er"), value)
    assert json5.read(more).value == {**config, "new": {"er": value}}
    assert json5.drop(more, ("new",)) == text
    for key in config:
        rest = {name: each for name, each in config.items() if name != key}
        assert json5.read(json5.drop(text, (key,))).value == rest
        assert json5.read(json5.put(text, (key,), value)).value == {**config, key: value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: +1, 'b': .5, $c: 0xFF, d: 1., e: -1e3,}", {"a": 1, "b": 0.5, "$c": 255, "d": 1.0, "e": -1000.0}),
        (
            "\ufeff[null, true, /* , */ 'it\\'s', 'a\\\nb', \"\\u0041\\x42\\n\",] // end",
            [None, True, "it's", "ab", "AB\n"],
        ),
        ("{a: 1, a: 2}", {"a": 2}),
        ("-Infinity", float("-inf")),
    ],
)
def test_json5_is_read_as_its_grammar_says(text: str, value: Any) -> None:
    assert json5.read(text).value == value


def test_the_plugins_judging_holds_its_own_tests() -> None:
    """Run by `node --test`, where there is Node."""
    try:
        done = subprocess.run(
            ["node", "--test", str(Path(__file__).with_name("openclaw_plugin.test.mjs"))], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no node here")
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

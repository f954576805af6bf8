"""`clawloop-edge doctor`: what is well, what is not, and how to mend it, on a real home, pool and running edge."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from typer.testing import CliRunner

from clawloop_edge.app import serve
from clawloop_edge.cli import doctor
from clawloop_edge.cli.root import app
from clawloop_edge.config import ModelConfig
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.settings import RetentionSettings
from clawloop_edge.privacy.deletions import Deletions, Server
from clawloop_shared import config
from clawloop_shared.errors import ConfigError
from clawloop_shared.ids import new_step_id
from clawloop_shared.records import Policy, Sampling, Step

Found = dict[str, dict[str, Any]]


def kept(*, kind: str = "main", untrainable: str = "", app: str = "openclaw") -> KeptStep:
    step = Step(
        step_id=new_step_id(),
        session_id="s",
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
    reply = {"role": "assistant", "content": "x"}
    return KeptStep(step=step, messages=[], reply=reply, kind=kind, app=app, started_ms=1, finished_ms=2)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeHome:
    """A home as `setup` makes it, of a user with no OpenClaw."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPENCLAW_CONFIG_PATH", "OPENCLAW_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "script.json"
    script.write_text('["hello"]')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = EdgeHome(tmp_path / "home")
    options = ["--model", str(tiny_model), "--script", str(script), "--key-file", "--port", port, "--yes"]
    made = CliRunner().invoke(app, ["--home", str(found.folder), "setup", *options])
    assert made.exit_code == 0, made.output
    return found


def examined(home: EdgeHome) -> tuple[int, Found]:
    done = CliRunner().invoke(app, ["--home", str(home.folder), "doctor", "--json"])
    said = json.loads(done.stdout)
    assert said["ok"] is (done.exit_code == 0)
    worst = {"ok": 0, "warn": 1, "fail": 2}
    found: Found = {}
    for finding in said["findings"]:
        if finding["check"] not in found or worst[finding["state"]] > worst[found[finding["check"]]["state"]]:
            found[finding["check"]] = finding
    return done.exit_code, found


@asynccontextmanager
async def running(home: EdgeHome) -> AsyncIterator[None]:
    """The edge of this home, serving."""
    settings = home.load_config()
    with open_pool(home, writer=True) as pool:
        task = asyncio.create_task(serve(home, settings, pool=pool))
        url = f"http://127.0.0.1:{settings.gateway.port}/readyz"
        async with aiohttp.ClientSession() as http:
            while not task.done():
                with suppress(aiohttp.ClientError):
                    async with http.get(url):
                        break
                await asyncio.sleep(0.02)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_all_is_well_with_an_edge_that_runs(home: EdgeHome) -> None:
    async with running(home):
        code, found = await asyncio.to_thread(examined, home)
    assert {name: f["state"] for name, f in found.items()} == dict.fromkeys(
        (
            "home",
            "token",
            "model",
            "pool",
            "encryption",
            "steps",
            "room",
            "privacy",
            "learning",
            "scorers",
            "service",
            "openclaw",
        ),
        "ok",
    )
    assert code == 0


def test_an_edge_that_does_not_run_fails_and_says_how_to_start_it(home: EdgeHome) -> None:
    code, found = examined(home)
    assert code == 1
    mend = f"clawloop-edge --home {home.folder} serve"
    assert (found["service"]["state"], found["service"]["mend"]) == ("fail", mend)


def test_an_edge_that_loads_its_model_is_not_told_to_start(home: EdgeHome) -> None:
    with open_pool(home, writer=True):
        service = examined(home)[1]["service"]
    assert f"starting or stopping (process {os.getpid()})" in service["reason"]
    assert "look again" in service["mend"]


async def test_an_upstream_server_that_is_away_is_named_with_what_to_do(home: EdgeHome) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        upstream = UpstreamSettings(url=url, model="m", connect_timeout_s=1.0)
        chosen = msgspec.structs.replace(home.load_config(), model=ModelConfig(kind="upstream"), upstream=upstream)
        config.save(home.config_file, chosen)
        async with running(home):
            service = (await asyncio.to_thread(examined, home))[1]["service"]
    assert "engine gone: cannot reach" in service["reason"]
    assert f"start the server at {url}" in service["mend"]


def test_steps_are_counted_by_kind_program_and_reason(home: EdgeHome) -> None:
    title = kept(kind="title", untrainable="side request: title")
    with open_pool(home, writer=True) as pool:
        for step in (kept(), kept(), title, kept(untrainable="temperature 0", app="x")):
            pool.keep_step(step).result(10)
            pool.keep_step(step).result(10)
    steps = examined(home)[1]["steps"]
    assert (steps["state"], steps["reason"]) == ("ok", "2 of 4 may be learned from")
    assert steps["facts"]["counts"] == [
        {"kind": "main", "app": "openclaw", "untrainable": "", "steps": 2},
        {"kind": "main", "app": "x", "untrainable": "temperature 0", "steps": 1},
        {"kind": "title", "app": "openclaw", "untrainable": "side request: title", "steps": 1},
    ]
    printed = CliRunner().invoke(app, ["--home", str(home.folder), "doctor"]).output
    assert "temperature 0" in printed


def test_it_says_what_retention_lets_go_and_when_nothing_more_is_kept(home: EdgeHome) -> None:
    with open_pool(home, writer=True) as pool:
        pool.keep_step(kept()).result(10)
    room = examined(home)[1]["room"]
    assert (room["state"], room["reason"]) == ("ok", "1 sessions (0 MiB) go within the hour: 1 for age")
    limits = RetentionSettings(days=0, free_floor_bytes=1 << 60)
    config.save(home.config_file, msgspec.structs.replace(home.load_config(), retention=limits))
    room = examined(home)[1]["room"]
    assert (room["state"], "nothing more is kept" in room["reason"]) == ("warn", True)


def test_what_is_left_to_do_of_a_forgetting_is_a_warning(home: EdgeHome) -> None:
    with open_pool(home, writer=True) as pool:
        server = Server(url="https://gone.invalid:1", root_key=b"r" * 32)
        deletions = Deletions(pool)
        pool.submit(lambda database: deletions.add_in(database, server, names=["step-1"])).result(10)
    forgetting = examined(home)[1]["forgetting"]
    assert (forgetting["state"], "1 cannot be sent" in forgetting["reason"]) == ("warn", True)
    assert forgetting["mend"].endswith("privacy deletions")


@pytest.mark.parametrize(
    ("steps", "reason", "mend"),
    [
        ([kept(untrainable="temperature 0")], "no ordinary turn: temperature 0", "a temperature above 0"),
        ([kept(), kept(kind="unknown", untrainable="unknown traffic")], "1 unknown", "without tools"),
    ],
)
def test_steps_that_are_not_learned_from_without_need_are_a_warning(
    home: EdgeHome, steps: list[KeptStep], reason: str, mend: str
) -> None:
    with open_pool(home, writer=True) as pool:
        for step in steps:
            pool.keep_step(step).result(10)
    found = examined(home)[1]["steps"]
    assert found["state"] == "warn"
    assert reason in found["reason"]
    assert mend in found["mend"]


def broken_token(home: EdgeHome) -> None:
    home.token_file.chmod(0o644)


def empty_token(home: EdgeHome) -> None:
    home.token_file.write_text("")


def no_model(home: EdgeHome) -> None:
    text = home.config_file.read_text()
    at = home.load_config().model.path
    home.config_file.write_text(text.replace(at, "/nowhere"))


def lost_key(home: EdgeHome) -> None:
    home.key_file.unlink()


def bad_config(home: EdgeHome) -> None:
    home.config_file.write_text("[gateway]\nport = 99999999\n")


def open_home(home: EdgeHome) -> None:
    home.folder.chmod(0o755)


def unknown_scorer(home: EdgeHome) -> None:
    configure_scorers(home, scorers=("tool-outcome", "oracle"))


def rule_without_function(home: EdgeHome) -> None:
    configure_scorers(home, scorers=("rule",))


def configure_scorers(home: EdgeHome, *, scorers: tuple[str, ...]) -> None:
    settings = home.load_config()
    signals = msgspec.structs.replace(settings.signals, scorers=scorers)
    config.save(home.config_file, msgspec.structs.replace(settings, signals=signals))


@pytest.mark.parametrize(
    ("harm", "check", "state"),
    [
        (broken_token, "token", "fail"),
        (empty_token, "token", "fail"),
        (no_model, "model", "fail"),
        (lost_key, "pool", "fail"),
        (bad_config, "home", "fail"),
        (open_home, "home", "warn"),
        (unknown_scorer, "scorers", "fail"),
        (rule_without_function, "scorers", "fail"),
    ],
)
def test_what_is_wrong_is_named_with_a_way_to_mend_it(
    home: EdgeHome, harm: Callable[[EdgeHome], None], check: str, state: str
) -> None:
    assert examined(home)[1][check]["state"] == "ok"
    harm(home)
    code, found = examined(home)
    assert (found[check]["state"], code) == (state, 1)
    assert found[check]["reason"]
    assert home.token_file.read_text().strip() not in found[check]["reason"] or harm is empty_token


async def test_a_scorer_that_cannot_work_stops_the_edge_before_its_model_is_loaded(
    home: EdgeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule_without_function(home)
    monkeypatch.setattr("clawloop_edge.app.open_engine", None)
    with open_pool(home, writer=True) as pool, pytest.raises(ConfigError, match="rule"):
        await serve(home, home.load_config(), pool=pool)


async def test_a_scorer_that_fails_while_the_edge_runs_is_a_warning(
    home: EdgeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"running": True, "state": "ready", "scorers": {"next-state": {"problem": "no answer", "waiting": 3}}}
    monkeypatch.setattr("clawloop_edge.cli.doctor.ask", lambda home: said)
    found = examined(home)[1]["scorers"]
    assert (found["state"], found["reason"]) == ("warn", "next-state failed last: no answer; 3 cases waiting")


def openclaw(home: EdgeHome, **provider: Any) -> str:
    """The state that `doctor` finds OpenClaw in, with this provider in its configuration."""
    port = home.load_config().gateway.port
    url = provider.pop("baseUrl", f"http://localhost:{port}/v1").replace("PORT", str(port))
    entry = {"baseUrl": url, "apiKey": home.token(), "api": "openai-completions", **provider}
    primary = {"agents": {"defaults": {"model": {"primary": "clawloop/clawloop"}}}}
    config = {"models": {"providers": {"clawloop": entry, "other": {"baseUrl": "https://x.invalid/v1"}}}, **primary}
    file = home.folder.parent / ".openclaw" / "openclaw.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(config))
    found = examined(home)[1]
    worst = [found[name]["state"] for name in found if name.startswith("openclaw")]
    return "fail" if "fail" in worst else "warn" if "warn" in worst else "ok"


@pytest.mark.parametrize(
    ("provider", "state"),
    [
        ({}, "ok"),
        ({"apiKey": "${CLAWLOOP_TOKEN}"}, "ok"),
        ({"api": "anthropic-messages", "baseUrl": "http://127.0.0.1:PORT"}, "ok"),
        ({"api": "anthropic-messages"}, "fail"),
        ({"baseUrl": "http://127.0.0.1:PORT"}, "fail"),
        ({"apiKey": "another"}, "fail"),
        ({"baseUrl": "http://127.0.0.1:1/v1"}, "warn"),
        ({"baseUrl": "http://[::broken/v1"}, "warn"),
    ],
)
def test_openclaws_configuration_is_held_against_this_edge(
    home: EdgeHome, provider: dict[str, Any], state: str
) -> None:
    assert openclaw(home, **provider) == state


def test_a_configuration_that_is_no_json_or_another_main_model_is_a_warning(
    home: EdgeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home.folder / "own.json5"
    monkeypatch.setenv("OPENCLAW_CONFIG_PATH", str(file))
    file.write_text("{models: {}} // mine")
    assert "cannot be read as JSON" in examined(home)[1]["openclaw"]["reason"]
    port = home.load_config().gateway.port
    providers = {"a": {"baseUrl": f"http://127.0.0.1:{port}/v1", "apiKey": home.token()}}
    file.write_text(json.dumps({"models": {"providers": providers}, "agents": {"defaults": {"model": "b/c"}}}))
    assert "b/c" in examined(home)[1]["openclaw"]["reason"]


def test_a_new_check_is_one_function_more(home: EdgeHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_weather(home: EdgeHome) -> Any:
        yield doctor.Finding(check="weather", state=doctor.State.WARN, reason="rain", mend="wait")

    monkeypatch.setattr(doctor, "CHECKS", (check_weather,))
    code, found = examined(home)
    assert (code, list(found), found["weather"]["mend"]) == (0, ["weather"], "wait")

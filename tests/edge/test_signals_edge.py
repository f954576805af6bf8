"""The scorers of an edge that serves: from calls over HTTP to signals, status and metrics."""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from clawloop_edge.app import serve
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.signals.settings import RuleSettings, SignalsSettings
from clawloop_shared import config
from clawloop_shared.errors import ConfigError

RULE = """
def rule(case):
    return 0.5 if case["metadata"].get("task") == "t1" and case["text"] == "two" and case["steps"] == 2 else -0.5
"""


def chosen_with(port: int, tiny_model: Path, signals: SignalsSettings) -> EdgeConfig:
    return EdgeConfig(model=ModelConfig(path=str(tiny_model)), gateway=GatewaySettings(port=port), signals=signals)


async def test_a_rollout_is_judged_by_a_rule_and_counted(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scripted(config: EdgeConfig) -> ScriptedEngine:
        return ScriptedEngine(tiny_model, ["one", "two"])

    monkeypatch.setattr("clawloop_edge.app.open_engine", scripted)
    caplog.set_level(logging.INFO, logger="clawloop_edge.app")
    home = EdgeHome(tmp_path / "home")
    home.make()
    (tmp_path / "own_rule.py").write_text(RULE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rule = RuleSettings(function="own_rule:rule", path=str(tmp_path), call_s=20.0)
    signals = SignalsSettings(scorers=("rule", "tool-outcome"), untrainable=True, rule=rule)
    chosen = chosen_with(port, tiny_model, signals)
    config.save(home.config_file, chosen)
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        headers = {"Authorization": f"Bearer {home.token()}"}
        async with ClientSession(f"http://127.0.0.1:{port}", headers=headers) as http:
            serving = asyncio.create_task(serve(home, chosen, pool=pool))

            async def post(path: str, body: Any = None) -> Any:
                async with http.post(path, json=body or {}) as reply:
                    assert reply.status == 200, await reply.text()
                    return await reply.json()

            async def get(path: str) -> str:
                async with http.get(path) as reply:
                    return await reply.text()

            async with asyncio.timeout(60):
                while "serving on" not in caplog.text:  # noqa: ASYNC110 - a log has no event
                    await asyncio.sleep(0.01)
                name = (await post("/init_trajectory"))["trajectory_uid"]
                await post(f"/{name}/g1/v1/register_trajectory", {"metadata": {"task": "t1"}})
                talk = [{"role": "user", "content": "first"}]
                said = await post(f"/{name}/g1/v1/chat/completions", {"messages": talk})
                talk += [said["choices"][0]["message"], {"role": "user", "content": "second"}]
                await post(f"/{name}/g1/v1/chat/completions", {"messages": talk})
                await post(f"/{name}/g1/v1/complete_trajectory")
                while 'clawloop_signals_made_total{source="rule"} 1.0' not in await get("/metrics"):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                while '"rule": {"judged": 1,' not in (status := await get("/v1/status")):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(serving, 30)
        with pool.reading() as reading:
            kept = reading.session_signals(name)
    assert [(each.source, each.target_id, each.value) for each in kept] == [("rule", name, 0.5)]
    assert '"rule": {"judged": 1, "made": 1, "failed": {}' in status


async def test_a_scorer_that_there_is_not_is_told_at_the_start(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scripted(config: EdgeConfig) -> ScriptedEngine:
        return ScriptedEngine(tiny_model, [])

    monkeypatch.setattr("clawloop_edge.app.open_engine", scripted)
    home = EdgeHome(tmp_path / "home")
    home.make()
    for settings, problem in (
        (SignalsSettings(scorers=("judgement",)), r"names the scorer 'judgement'; there are exact, hindsight"),
        (SignalsSettings(scorers=("rule",)), r"\[signals.rule\] function is ''"),
    ):
        with (
            Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool,
            pytest.raises(ConfigError, match=problem),
        ):
            await serve(home, chosen_with(0, tiny_model, settings), pool=pool)

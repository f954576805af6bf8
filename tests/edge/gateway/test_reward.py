"""`/compute_reward` before a real scorer: what it answers, and that nothing is kept."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.pool.store import Pool
from clawloop_edge.scoring import open_reward
from clawloop_edge.signals.registry import Deps
from clawloop_edge.signals.settings import RegexSettings, SignalsSettings

TOKEN = "test-token-0123456789"
REGEX = RegexSettings(pattern=r"(a+)+$", call_s=0.3)


@pytest.fixture(params=["exact", "regex"])
async def ask(request: Any, tiny_model: Path, pool: Pool) -> AsyncIterator[Any]:
    engine = ScriptedEngine(tiny_model, [])
    settings = SignalsSettings(scorers=("next-state", request.param), regex=REGEX)
    scorer = open_reward(Deps(settings=settings, engine=engine, folder=tiny_model))
    assert scorer is not None
    runner = make_runner(make_app(engine, pool, settings=GatewaySettings(), token=TOKEN, scorer=scorer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:

        async def ask(text: str, **fields: Any) -> tuple[str, int, Any]:
            ids = engine.tokenizer.encode
            body = {"prompt_ids": ids("what?"), "response_ids": ids(text), "dataset_fields": fields}
            async with http.post("/compute_reward", json=body, headers={"Authorization": f"Bearer {TOKEN}"}) as reply:
                return request.param, reply.status, await reply.json()

        yield ask
    await runner.cleanup()
    await scorer.close()
    await engine.close()


async def test_a_reward_is_computed_and_nothing_is_kept(ask: Any, pool: Pool) -> None:
    name, status, reply = await ask("aaa", answer="aaa")
    assert (status, reply["reward_score"], reply["reward_extra_info"]["scorer"]) == (200, 1.0, name)
    assert (await ask("b", answer="aaa"))[2]["reward_score"] == -1.0
    _, status, reply = await ask("aaa", other="field")
    assert (status, reply["reward_score"]) == (200, None)
    assert (pool.stats().steps, pool.stats().signals) == (0, 0)


async def test_a_scorer_that_fails_at_a_response_says_so(ask: Any) -> None:
    name, status, reply = await ask("a" * 40 + "!", answer="aaa")
    if name == "regex":
        assert (status, reply["error"]["code"]) == (422, "not_scorable")
        assert "did not end within" in reply["error"]["message"]
    else:
        assert (status, reply["reward_score"]) == (200, -1.0)

"""Six hundred calls at the same moment: all are taken, all are answered, and none waits while later ones are served."""

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, TCPConnector

from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.settings import EngineSettings

from .conftest import Serve, Served

CALLS = 600


async def _call(http: ClientSession, served: Served, number: int) -> tuple[int, Any, Any]:
    body = {
        "messages": [{"role": "user", "content": f"{number} is a number"}],
        "max_tokens": 6,
        "stream": number % 2 == 0,
    }
    auth = {"Authorization": f"Bearer {served.token}"}
    async with http.post(f"{served.base_url}/v1/chat/completions", json=body, headers=auth) as reply:
        return reply.status, reply.headers, await reply.read()


async def test_six_hundred_calls_at_once_are_all_answered_in_turn(real: Served) -> None:
    async with ClientSession(connector=TCPConnector(limit=0)) as http:
        replies = await asyncio.gather(*(_call(http, real, number) for number in range(CALLS)))
    assert [status for status, _, _ in replies] == [200] * CALLS
    kept = [real.kept(headers["x-clawloop-step"]) for _, headers, _ in replies]
    assert len({found.step.step_id for found in kept}) == CALLS
    assert all(found.step.trainable for found in kept)
    overtaken = [
        sum(later.started_ms > found.started_ms and later.finished_ms < found.first_token_ms for later in kept)
        for found in kept
    ]
    assert max(overtaken) <= 64, "a call waited while two whole batches of later ones were answered"


async def test_more_than_the_bound_is_told_to_come_back(serve: Serve, tiny_model: Path) -> None:
    small = await MlxEngine.open(tiny_model, EngineSettings(max_queue=20))
    served = await serve(small)
    async with ClientSession(connector=TCPConnector(limit=0)) as http:
        replies = await asyncio.gather(*(_call(http, served, number) for number in range(100)))
    await small.close()
    statuses = [status for status, _, _ in replies]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 20
    assert all(headers["Retry-After"] == "2" for status, headers, _ in replies if status == 503)
    status, _, body = await served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 503, "the engine was closed"
    assert body["error"]["code"] == "engine_gone"
